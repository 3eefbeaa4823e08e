"""Packing: every document whole and once an epoch, rows never overfull, the same rows from the same seed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni.data.packing import Packing
from omni_tokenizers.errors import OmniError

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=120)


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(40, 90), st.integers(0, 5), st.integers(0, 5))
def test_every_document_once_and_capacity_kept(lengths, capacity, seed, epoch):
    """Each document is in exactly one row of an epoch, and no row holds more than fits."""
    rows = Packing(np.asarray(lengths), capacity, seed).epoch(epoch)
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(lengths)))
    assert all(0 < np.asarray(lengths)[row].sum() <= capacity for row in rows)


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.integers(10, 39))
def test_long_documents_are_left_out_and_counted(lengths, capacity):
    """A document longer than a row is in no row, and `dropped` says how many there are."""
    long = [i for i, length in enumerate(lengths) if length > capacity]
    if len(long) == len(lengths):
        with pytest.raises(OmniError, match="longer rows"):
            Packing(np.array(lengths), capacity, 0)
        return
    packing = Packing(np.array(lengths), capacity, 0)
    packed = np.concatenate(packing.epoch(0)).tolist()
    assert packing.dropped == len(long)
    assert sorted(packed + long) == list(range(len(lengths)))


def test_pure_function_of_seed_and_epoch():
    """The same seed and epoch give the same rows; another epoch or seed gives others, as many."""
    lengths = np.random.default_rng(0).integers(5, 60, 500)

    def rows(seed, epoch):
        return [row.tolist() for row in Packing(np.asarray(lengths), 128, seed).epoch(epoch)]

    assert rows(1, 2) == rows(1, 2)
    assert rows(1, 2) != rows(1, 3)
    assert rows(1, 2) != rows(2, 2)
    assert len(rows(1, 2)) == len(rows(1, 3))


def test_rows_are_nearly_full():
    """More than 98 % of the tokens of packed rows are no padding, for lengths that can fill a row."""
    lengths = np.random.default_rng(0).integers(20, 71, 20_000)
    packing = Packing(lengths, 256, 0)
    assert packing.efficiency > 0.98
    assert packing.efficiency == pytest.approx(lengths.sum() / (packing.rows * 256))
