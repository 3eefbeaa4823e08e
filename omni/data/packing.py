"""Packing: whole documents into rows of a fixed capacity, as a pure function of (lengths, capacity, seed, epoch).

Which *lengths* share a row is decided once for all epochs: documents are drawn at random, but only those behind which
the rest of the row can still be filled (a subset sum, kept as bits). An epoch then deals documents of equal length anew
to the places of their length and shuffles the rows. So every epoch has the same number of rows, and row i of an endless
run is found without packing the epochs before it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable

import numpy as np
from jaxtyping import Int

from omni_tokenizers.errors import OmniError


class Packing:
    """The rows of every epoch of a set of documents.

    Attributes:
      rows: number of rows of an epoch.
      dropped: number of documents that are longer than a row and belong to none.
      efficiency: part of the rows' tokens that is no padding.

    Raises:
      OmniError: no document fits a row.
    """

    def __init__(self, lengths: Int[np.ndarray, " documents"], capacity: int, seed: int):
        lengths = np.asarray(lengths)
        fitting = np.flatnonzero((lengths > 0) & (lengths <= capacity))
        if not fitting.size:
            raise OmniError(f"none of {lengths.size} documents fits a row of {capacity} tokens; use longer rows")
        self._seed, self._lengths = seed, lengths
        bins = _fill(lengths, np.random.default_rng([seed, 0]).permutation(fitting), capacity)
        self._places = np.fromiter(itertools.chain.from_iterable(bins), np.int64, fitting.size)
        self._bounds = np.cumsum([0, *map(len, bins)])
        self._by_length = fitting[np.argsort(lengths[fitting], kind="stable")]
        self.rows = len(bins)
        self.dropped = int((lengths > capacity).sum())
        self.efficiency = float(lengths[fitting].sum() / (self.rows * capacity))

    def epoch(self, epoch: int) -> list[Int[np.ndarray, " documents"]]:
        """The document indices of each row of an epoch, in the order in which they are read."""
        random = np.random.default_rng([self._seed, 1, epoch])
        lengths = self._lengths[self._by_length]
        dealt = np.zeros(self._lengths.size, np.int64)
        dealt[self._by_length] = self._by_length[np.lexsort((random.random(lengths.size), lengths))]
        documents = dealt[self._places]
        return [documents[self._bounds[row] : self._bounds[row + 1]] for row in random.permutation(self.rows)]


def _fill(lengths: Int[np.ndarray, " documents"], order: Int[np.ndarray, " fitting"], capacity: int) -> list[list[int]]:
    """Rows of documents, taken at random but so that the space behind each can still be filled.

    A set of numbers is an integer whose bit n says that n is in it, so that whole sets are shifted and met at once.
    """
    waiting: dict[int, list[int]] = {}
    for document, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        waiting.setdefault(length, []).append(document)
    at_hand = sum(1 << length for length in waiting)
    stream = _Stream(lengths[order].tolist())
    sums = _Sums(waiting, capacity)
    rows: list[list[int]] = []
    while waiting:
        row: list[int] = []
        space = sums.largest(capacity)
        while space:
            options = at_hand & sums.missing(space)
            if options:
                length = stream.draw(options)
                row.append(waiting[length].pop())
                space -= length
                if not waiting[length]:
                    del waiting[length]
                    at_hand ^= 1 << length
            else:  # a length has run out since the sums were taken
                sums = _Sums(waiting, capacity)
                space = sums.largest(space)
        if row:
            rows.append(row)
    return rows


class _Sums:
    """What documents of some lengths can sum to, each length as often as one likes."""

    def __init__(self, lengths: Iterable[int], capacity: int):
        self._capacity, self._sums = capacity, 1
        for length in lengths:
            while length <= capacity:
                self._sums |= self._sums << length & (2 << capacity) - 1
                length *= 2
        self._mirrored = int(f"{self._sums:0{capacity + 1}b}"[::-1], 2)

    def largest(self, space: int) -> int:
        """The largest sum up to `space`."""
        return (self._sums & (2 << space) - 1).bit_length() - 1

    def missing(self, space: int) -> int:
        """The set of numbers that a sum lacks to `space`."""
        return self._mirrored >> (self._capacity - space)


class _Stream:
    """Lengths of documents in random order, of which one draws what fits; each is drawn once."""

    def __init__(self, lengths: list[int]):
        self._lengths, self._early = lengths, Counter()

    def draw(self, options: int) -> int:
        """The next length in the set `options`; past a few others, its largest, taken from further on."""
        lengths, last = self._lengths, len(self._lengths) - 1
        for place in range(last, max(last - 8, -1), -1):
            length = lengths[place]
            drawn, option = self._early[length], options >> length & 1
            if drawn or option:
                lengths[place] = lengths[-1]
                lengths.pop()
            if drawn:
                self._early[length] -= 1
            elif option:
                return length
        length = options.bit_length() - 1
        self._early[length] += 1
        return length
