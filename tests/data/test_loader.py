"""Rows and batches: segments, positions, an order that is one index, whoever reads it."""

import grain
import numpy as np
import pytest
from documents import make_documents, make_grammar

from omni.data.loader import PackedRows, batches, stack
from omni.data.shards import TokenShards, write_shards

ROW_LENGTH = 40


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    grammar = make_grammar()
    directory = tmp_path_factory.mktemp("loader") / "shards"
    return TokenShards(write_shards(directory, make_documents(grammar, 60), grammar.vocabulary, grammar, {}))


@pytest.fixture(scope="module")
def rows(shards):
    return PackedRows(shards, ROW_LENGTH, seed=3)


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


def test_rows_hold_whole_documents(shards, rows):
    """In every epoch the segments of all rows are the documents, each whole and once, with their own positions, and the
    numbers of a row's documents are theirs."""
    grammar = shards.grammar
    documents = sorted(tuple(shards[i]["ids"]) for i in range(len(shards)))
    for epoch in range(2):
        found = []
        for i in range(rows.packing.rows):
            row = rows[epoch * rows.packing.rows + i]
            for segment in range(1, row["segments"].max() + 1):
                place = np.flatnonzero(row["segments"] == segment)
                assert np.array_equal(place, np.arange(place[0], place[-1] + 1))
                ids = row["ids"][place]
                number = rows.documents(epoch * rows.packing.rows + i)[segment - 1]
                np.testing.assert_array_equal(ids, shards[number]["ids"])
                states = grammar.annotate(ids)
                np.testing.assert_array_equal(row["positions"][place], grammar.positions(states, np.arange(ids.size)))
                np.testing.assert_array_equal(row["modalities"][place], grammar.tables.modality[states])
                turn = np.flatnonzero(ids == grammar.control["turn"])[0]
                np.testing.assert_array_equal(row["target"][place], np.arange(ids.size) > turn)
                found.append(tuple(ids))
            padding = row["segments"] == 0
            assert (row["ids"][padding] == grammar.control["pad"]).all()
            assert not row["target"][padding].any()
        assert sorted(found) == documents


def test_resume_anywhere_gives_the_same_rows(rows):
    """From the state at every position of two epochs, the batches that remain are those of an undisturbed reader."""
    count = 2 * rows.packing.rows
    dataset = batches(grain.MapDataset.source(rows), batch_size=1)
    undisturbed, states, iterator = [], [], iter(dataset)
    for _ in range(count):
        states.append(iterator.get_state())
        undisturbed.append(next(iterator))
    for position, state in enumerate(states):
        iterator = iter(dataset)
        iterator.set_state(state)
        for expected in undisturbed[position:]:
            assert same(next(iterator), expected)
    assert len({str(state) for state in states}) == count


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_order_does_not_depend_on_processes(rows, processes):
    """The batches of all processes, joined, are the global batches."""
    source, size = grain.MapDataset.source(rows), 8
    share = size // processes
    readers = [
        iter(batches(source, size, range(process * share, (process + 1) * share))) for process in range(processes)
    ]
    for step in range(2 * rows.packing.rows // size + 2):
        parts = [next(reader) for reader in readers]
        joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        assert same(joined, stack([rows[step * size + row] for row in range(size)]))
    assert len({str(reader.get_state()) for reader in readers}) == 1


def test_seed_changes_the_order(shards, rows):
    """Another seed gives other rows."""
    other = PackedRows(shards, ROW_LENGTH, seed=4)
    assert not all(same(rows[i], other[i]) for i in range(5))


def test_dropped_documents_are_said_once(shards, caplog):
    """Documents longer than a row are counted in the log, once for all epochs."""
    length = int(np.median(shards.lengths))
    rows = PackedRows(shards, length, seed=0)
    for i in range(3 * rows.packing.rows):
        assert (rows[i]["segments"] > 0).any()
    lines = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(lines) == 1
    assert f"{(shards.lengths > length).sum()} documents" in lines[0]
