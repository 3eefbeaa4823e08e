"""Rows of packed documents by number, and batches of any examples for the processes of a run."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from omni.data.packing import Packing
from omni.data.shards import TokenShards
from omni_tokenizers.errors import UsageError

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

    def documents(self, index: int) -> Int[np.ndarray, " segments"]:
        """The numbers of the documents of a row, in the order of its segments."""
        epoch, row = divmod(int(index), self.packing.rows)
        return self._epoch(epoch)[row]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        documents = [self.shards[document] for document in self.documents(index)]
        return pack_row(self.grammar, documents, self.row_length)


def mixed_rows(
    shards: Sequence[tuple[TokenShards, float]], row_length: int, seed: int, taken: Sequence[int] | None = None
) -> grain.MapDataset:
    """Rows of one or several shard sets, endless; each set in its own order, which is that of `PackedRows`.

    A row holds documents of one set. Which set is a pure function of the row's number, the weights and how well each
    set packs, so the position in a mixture is one index, too.

    Args:
      shards: sets, and the share of the tokens that comes from each (to one in a hundred, in any scale).
      seed: of the first set's order; the others have seeds made of it.
      taken: the row of each set that comes first; the very first by default.

    Raises:
      OmniError: no document of a set fits a row.
      UsageError: a weight is not above 0.
    """
    if bad := [weight for _, weight in shards if not 0 < weight < float("inf")]:
        raise UsageError(f"a share of a mixture is {bad[0]}; shares are numbers above 0 (leave out what has none)")
    rows = _rows(shards, row_length, seed)
    sources = [grain.MapDataset.source(each) for each in rows]
    if taken is not None:
        sources = [source[first:] for source, first in zip(sources, taken, strict=True)]
    return sources[0] if len(rows) == 1 else grain.MapDataset.mix(sources, _parts(shards, rows))


def rows_of_each(shards: Sequence[tuple[TokenShards, float]], row_length: int, seed: int, count: int) -> list[int]:
    """How many rows of each set are among the first `count` of `mixed_rows`."""
    if len(shards) == 1:
        return [count]
    numbers = [
        grain.MapDataset.range(ENDLESS).map(lambda row, place=place: (place, row)) for place in range(len(shards))
    ]
    mixed, next_rows = grain.MapDataset.mix(numbers, _parts(shards, _rows(shards, row_length, seed))), {}
    while len(next_rows) < len(shards):
        place, row = mixed[count]
        next_rows.setdefault(place, row)
        count += 1
    return [next_rows[place] for place in range(len(shards))]


def _rows(shards: Sequence[tuple[TokenShards, float]], row_length: int, seed: int) -> list[PackedRows]:
    # Sets of like lengths (one in two directions, say) would be shuffled alike under one seed.
    seeds = [seed, *np.random.SeedSequence(seed).generate_state(len(shards) - 1).tolist()]
    return [PackedRows(each, row_length, own) for (each, _), own in zip(shards, seeds, strict=True)]


def _parts(shards: Sequence[tuple[TokenShards, float]], rows: Sequence[PackedRows]) -> list[float]:
    """The rows of each set for each of the set that has fewest; grain mixes by whole hundredths of them."""
    counts = [weight / each.packing.efficiency for (_, weight), each in zip(shards, rows, strict=True)]
    return [count / min(counts) for count in counts]


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
