"""Samples of a source as they come from their files, several at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import grain

from omni.data.sources import Samples
from omni.parts import Part
from omni.processor import Processor
from omni.storage import StorageError
from omni_tokenizers.errors import OmniError


@dataclass(frozen=True)
class Read:
    """A sample as it came from its files: its parts, or what is wrong with it."""

    index: int
    parts: Sequence[Part] = ()
    mistake: str | None = None
    failure: StorageError | None = None
    """Why it could not be read, be it good or bad."""


class _Reader:
    """A sample by its place in the order in which this process reads; what cannot be read is an answer, too."""

    def __init__(self, samples: Samples, order: Sequence[int], processor: Processor | None):
        self._samples, self._order, self._processor = samples, order, processor

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, place: int) -> Read:
        index = int(self._order[place])
        try:
            parts = self._samples[index]
            return Read(index, [self._processor.prepared(part) for part in parts] if self._processor else parts)
        except StorageError as error:
            return Read(index, failure=error)  # not raised, since grain writes lines of its own into errors
        except OmniError as error:
            return Read(index, mistake=str(error))


def read_ahead(
    samples: Samples, order: Sequence[int], threads: int, processor: Processor | None = None
) -> Iterator[Read]:
    """Samples in that order, read ahead by threads; with a processor, their parts as its tokenizers take them.

    Raises:
      StorageError: a bucket does not answer.
    """
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=8 * threads)
    for read in grain.MapDataset.source(_Reader(samples, order, processor)).to_iter_dataset(options):
        if read.failure is not None:
            raise read.failure  # no bad sample: the same command goes on when the bucket answers
        yield read
