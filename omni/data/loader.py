"""Rows of packed documents by number, and batches of any examples for the processes of a run."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from omni.data.packing import Packing
from omni.data.shards import TokenShards

logger = logging.getLogger(__name__)
ENDLESS = 1 << 62
"""Length of a source that goes on for ever."""


class PackedRows:
    """Row i of an endless run over packed documents, as numpy arrays of `row_length` L:

    ids int32 `[L]`, segments int32 `[L]` (0 padding, 1.. the documents), positions int32 `[L, 3]` (they begin anew in
    each document), modalities int8 `[L]` (index into `grammar.modalities`), target uint8 `[L]`.

    Raises:
      OmniError: no document fits a row.
    """

    def __init__(self, shards: TokenShards, row_length: int, seed: int):
        self.shards, self.grammar, self.row_length = shards, shards.grammar, row_length
        self.packing = Packing(shards.lengths, row_length, seed)
        self._epoch = functools.lru_cache(maxsize=2)(self.packing.epoch)
        logger.info(
            "%s: %d documents in %d rows of %d tokens, %.2f %% filled",
            *(shards.directory, len(shards), self.packing.rows, row_length, 100 * self.packing.efficiency),
        )
        if self.packing.dropped:
            logger.warning(
                "%s: %d documents are longer than a row of %d tokens and are left out",
                *(shards.directory, self.packing.dropped, row_length),
            )

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        epoch, row = divmod(int(index), self.packing.rows)
        documents = [self.shards[document] for document in self._epoch(epoch)[row]]
        return pack_row(self.grammar, documents, self.row_length)


def pack_row(grammar, documents: Sequence[dict[str, np.ndarray]], row_length: int) -> dict[str, np.ndarray]:
    """One row that holds `documents` (`ids` and `target` each) whole, in order; see `PackedRows`."""
    row = {
        "ids": np.full(row_length, grammar.control["pad"], np.int32),
        "segments": np.zeros(row_length, np.int32),
        "positions": np.zeros((row_length, 3), np.int32),
        "modalities": np.zeros(row_length, np.int8),
        "target": np.zeros(row_length, np.uint8),
    }
    start = 0
    for segment, document in enumerate(documents, start=1):
        states = grammar.annotate(document["ids"])
        place = slice(start, start + states.size)
        row["ids"][place], row["target"][place] = document["ids"], document["target"]
        row["segments"][place] = segment
        row["positions"][place] = grammar.positions(states, np.arange(states.size))
        row["modalities"][place] = grammar.tables.modality[states]
        start = place.stop
    return row


class _Batches:
    """Item i holds the given rows of global batch i, stacked."""

    def __init__(self, examples: grain.MapDataset, batch_size: int, rows: Sequence[int]):
        self._examples, self._batch_size, self._rows = examples, batch_size, rows

    def __len__(self) -> int:
        return len(self._examples) // self._batch_size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        first = int(index) * self._batch_size
        return stack([self._examples[first + row] for row in self._rows])


def batches(examples: grain.MapDataset, batch_size: int, rows: Sequence[int] | None = None) -> grain.IterDataset:
    """Batches read ahead in a thread, in an order that does not depend on who reads which rows.

    Args:
      examples: endless dataset of dicts of fixed-shape arrays; example `step * batch_size + row` is that row of a step.
      batch_size: examples in a batch of all processes together.
      rows: the rows of each batch that this process loads; all of them by default.

    The state of its iterator is one index, the same in every process: the number of batches taken.
    """
    source = _Batches(examples, batch_size, range(batch_size) if rows is None else rows)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return grain.MapDataset.source(source).to_iter_dataset(options)


def stack(examples: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Examples as one batch: each array gets a first axis."""
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}
