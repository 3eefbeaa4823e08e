"""Batches of any requests, and batches that requests join as they come."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import jax
from jax.sharding import Mesh

from omni.generate.programs import Programs, power_of_two
from omni.generate.requests import Generated, PreparedRequest, check_request, is_whole, useful_shadows
from omni.generate.slots import Progress, Slots
from omni.grammar import Grammar
from omni.model import Decoder
from omni_tokenizers.errors import UsageError


class Engine:
    """Answers prepared requests, any mix of them in one batch.

    Batches, pieces of prompts and what a batch has room for come in few sizes, so that few programs are compiled.

    Attributes:
      version: number of the way replies are drawn; the same request and seed get other replies from another version.
    """

    version = 2

    def __init__(
        self,
        decoder: Decoder,
        grammar: Grammar,
        *,
        context: int | None = None,
        max_rows: int = 256,
        mesh: Mesh | None = None,
        cache_dtype: str | None = None,
    ):
        """An engine.

        Args:
          context: most tokens of prompt and reply, None for no limit.
          max_rows: most sequences that `generate` and `stream` answer at a time, shadows among them; others wait.
          mesh: the devices over which the decoder lies (`decoder_on`), None for one. Sequences are split over them as
            rows of a training are, heads and vocabulary as its parameters; the replies are those of one device.
          cache_dtype: what keys and values are held in: float32, bfloat16 or int8; by default the compute type.
        """
        self.decoder, self.grammar, self.context, self.max_rows = decoder, grammar, context, max_rows
        self.programs = Programs(decoder, grammar, mesh, cache_dtype)

    @property
    def counts(self) -> Counter[str]:
        """See `Programs.counts`."""
        return self.programs.counts

    def generate(self, requests: Sequence[PreparedRequest]) -> list[Generated]:
        """Replies in the order of the requests; where they are more than `max_rows` allows, some wait for others.

        Raises:
          UsageError, OmniError: for any request that cannot be answered, before anything runs (see `check_request`).
        """
        replies: list[Generated | None] = [None] * len(requests)
        slots, order = self._lined_up(requests)
        while slots.busy:
            for progress in slots.step():
                if progress.reply:
                    replies[order[progress.number]] = progress.reply
        return replies

    def stream(self, requests: Sequence[PreparedRequest], hop: int = 16) -> Iterator[list[Progress]]:
        """What is new, by the numbers of the requests: after at most `hop` tokens, and whenever a part has ended.

        Errors as of `generate`, at once.
        """
        return self._progress(*self._lined_up(requests), hop)

    def _progress(self, slots: Slots, order: Sequence[int], hop: int) -> Iterator[list[Progress]]:
        while slots.busy:
            if found := [replace(each, number=order[each.number]) for each in slots.step(hop, parts=True)]:
                yield sorted(found, key=lambda progress: progress.number)

    def open(self, slots: int, *, capacity: int | None = None, shadows: int | None = None) -> Slots:
        """A batch that requests may join at any time (`Slots.add`) and that answers them step by step (`Slots.step`).

        Whatever was asked of it once compiles nothing when it is asked again.

        Args:
          slots: requests that are answered at a time, rounded up to a power of two that splits evenly over the mesh;
            others wait for their turn.
          capacity: most tokens of a prompt and its reply, by default the context.
          shadows: rows for guidance; by default none until a request needs them, then as many for each slot.

        Raises:
          UsageError: numbers that are none, or no capacity where the engine has no context either.
        """
        capacity = self.context if capacity is None else capacity
        if capacity is None:
            raise UsageError("an engine without a context needs the capacity of a batch")
        for name, value, least in (("slots", slots, 1), ("capacity", capacity, 1), ("shadows", shadows or 0, 0)):
            if not is_whole(value) or value < least:
                raise UsageError(f"{name} is a whole number, at least {least}, not {value!r}")
        size = self.programs.padded(slots)
        return Slots(self.programs, size, roomy(capacity), shadows=shadows, context=self.context)

    def _lined_up(self, requests: Sequence[PreparedRequest]) -> tuple[Slots, list[int]]:
        """A batch of just the size for these requests, in which they wait, and their order in it: the longest replies
        come first, so that at the end few slots are idle."""
        for request in requests:
            check_request(request, self.grammar, self.decoder.config.dim, self.context)

        def longest(i: int) -> int:
            want = requests[i].want
            return -requests[i].max_tokens if want is None else -int(self.grammar.tables.minimum[list(want)].sum())

        order = sorted(range(len(requests)), key=longest)
        rooms = [request.longest_prompt + request.max_tokens for request in requests]
        capacity = roomy(max(rooms, default=1))
        if self.context is not None:  # a reply that may fill the context has a budget that differs with each prompt
            capacity = min(capacity, roomy(self.context))
        size, shadows = self._sizes(requests)
        more = {"shadows": shadows, "context": self.context, "requests": requests}
        slots = Slots(self.programs, size, capacity, **more)
        for i in order:
            slots.add(requests[i])
        return slots, order

    def _sizes(self, requests: Sequence[PreparedRequest]) -> tuple[int, int]:
        """Slots and rows of shadows: for all requests, or for as many as `max_rows` allows."""
        shadows = [len(useful_shadows(request)) for request in requests]
        slots = self.programs.padded(max(1, len(requests)))
        while True:
            share = math.ceil(sum(shadows) * min(1, slots / max(1, len(requests))))
            rows = self.programs.padded(max(share, max(shadows, default=0)))
            if slots + rows <= self.max_rows or slots <= self.programs.row_shards:
                return slots, rows
            slots = self.programs.padded(slots // 2)

    def lower(self, requests: int, capacity: int) -> jax.stages.Lowered:
        """The program that emits the tokens of so many requests without guidance, not compiled yet.

        Args:
          capacity: tokens of prompt and reply that the cache has room for.
        """
        rows = self.programs.padded(requests)
        settings = Slots(self.programs, rows, capacity).settings()
        return self.programs.lower(settings, rows, capacity)


def roomy(tokens: int) -> int:
    """Slots of a cache for so many tokens: every token attends to all of them, so they are rounded up finely, in steps
    of an eighth of the power of two below and 32 at least."""
    step = max(32, power_of_two(tokens + 1) // 16)
    return -(-tokens // step) * step
