"""The compiled programs of generation, and batches of any requests over them."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from omni.generate.loop import Block, Cache, Settings, State, advance, copy_rows, enter, read_prompts
from omni.generate.requests import Generated, PreparedRequest, check_request, useful_shadows
from omni.generate.rules import inner_blocks, make_rules
from omni.generate.slots import Columns, Progress, Slots, power_of_two
from omni.grammar import Grammar
from omni.model import CACHE_AXES, Decoder, TransformerConfig, init_cache
from omni.sharding import ShardingRules, activations_on, constrain, named_sharding, spread

HEAD_AXES = ("vocabulary", "embed")


class Engine:
    """Answers prepared requests, any mix of them in one batch.

    Batches, pieces of prompts and what a batch has room for come in few sizes, so that few programs are compiled.

    Attributes:
      version: number of the way replies are drawn; the same request and seed get other replies from another version.
      counts: how often each program was traced, the `steps` taken by all batches and the tokens of prompts `read`.
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
    ):
        """An engine.

        Args:
          context: most tokens of prompt and reply, None for no limit.
          max_rows: most sequences that `generate` and `stream` answer at a time, shadows among them; others wait.
          mesh: the devices over which the decoder lies (`decoder_on`), None for one. Sequences are split over them as
            rows of a training are, heads and vocabulary as its parameters; the replies are those of one device.
        """
        self.decoder, self.grammar = decoder, grammar
        self.context, self.max_rows = context, max_rows
        self._mesh, self._places = mesh, ShardingRules()
        self.rules = make_rules(grammar)
        self._row_shards = 1 if mesh is None else spread(mesh, self._places.batch)
        self._blocks = self._inner_blocks()
        self.counts: Counter[str] = Counter()
        self._empty = jax.jit(partial(_empty, decoder.config), static_argnames=("rows", "capacity"))
        self._read_prompts = jax.jit(self._counted(read_prompts), donate_argnames=("cache", "stream"))
        self._copy_rows = jax.jit(self._counted(copy_rows), donate_argnames=("cache", "stream"))
        self._enter = jax.jit(self._counted(enter), donate_argnames="state")
        self._advance = jax.jit(self._counted(advance), donate_argnames="state")

    def _inner_blocks(self) -> list[Block]:
        """The head's rows for `inner_blocks`, taken once; of a decoder of shapes, shapes."""
        blocks, head = inner_blocks(self.grammar), self.decoder.head
        if isinstance(head, jax.ShapeDtypeStruct):
            shapes = [(len(ids), head.shape[1]) for ids in blocks]
            return [
                Block(_shape_of(ids), self._shape(shape, head.dtype, *HEAD_AXES))
                for ids, shape in zip(blocks, shapes, strict=True)
            ]
        take = jax.jit(lambda head, ids: constrain(head[ids], *HEAD_AXES))
        with self._on_mesh():
            return [Block(jnp.asarray(ids), take(head, ids)) for ids in blocks]

    def _counted(self, function):
        """The function, counting its traces: one for each program that is compiled."""

        def traced(*arguments, **named):
            self.counts[function.__name__] += 1
            return function(*arguments, **named)

        traced.__signature__ = inspect.signature(function)
        return traced

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
        """What is new, by the numbers of the requests: after at most `hop` tokens, and whenever a part has ended."""
        slots, order = self._lined_up(requests)
        while slots.busy:
            if found := [replace(each, number=order[each.number]) for each in slots.step(hop, parts=True)]:
                yield sorted(found, key=lambda progress: progress.number)

    def open(self, slots: int, *, capacity: int | None = None, shadows: int | None = None) -> Slots:
        """A batch that requests may join at any time (`Slots.add`) and that answers them step by step (`Slots.step`).

        Whatever was asked of it once compiles nothing when it is asked again.

        Args:
          slots: requests that are answered at a time; others wait for their turn.
          capacity: most tokens of a prompt and its reply, by default the context.
          shadows: rows for guidance, by default as many as slots.

        Raises:
          ValueError: without a capacity where the engine has no context either.
        """
        capacity = self.context if capacity is None else capacity
        if capacity is None:
            raise ValueError("an engine without a context needs the capacity of a batch")
        size = self.padded(slots)
        return Slots(self, size, self.padded(size if shadows is None else shadows), roomy(capacity), Columns())

    def _lined_up(self, requests: Sequence[PreparedRequest]) -> tuple[Slots, list[int]]:
        """A batch of just the size for these requests, in which they wait, and their order in it: the longest replies
        come first, so that at the end few slots are idle."""
        for request in requests:
            check_request(request, self.grammar, self.context)

        def longest(i: int) -> int:
            want = requests[i].want
            return -requests[i].max_tokens if want is None else -int(self.grammar.tables.minimum[list(want)].sum())

        order = sorted(range(len(requests)), key=longest)
        rooms = [max(map(len, _prompts(request))) + request.max_tokens for request in requests]
        capacity = roomy(max(rooms, default=1))
        if self.context is not None:  # a reply that may fill the context has a budget that differs with each prompt
            capacity = min(capacity, roomy(self.context))
        slots = Slots(self, *self._sizes(requests), capacity, Columns.of(requests))
        for i in order:
            slots.add(requests[i])
        return slots, order

    def _sizes(self, requests: Sequence[PreparedRequest]) -> tuple[int, int]:
        """Slots and rows of shadows: for all requests, or for as many as `max_rows` allows."""
        shadows = [len(useful_shadows(request)) for request in requests]
        slots = self.padded(max(1, len(requests)))
        while True:
            share = math.ceil(sum(shadows) * min(1, slots / max(1, len(requests))))
            rows = self.padded(max(share, max(shadows, default=0)))
            if slots + rows <= self.max_rows or slots <= self._row_shards:
                return slots, rows
            slots = self.padded(slots // 2)

    def padded(self, sequences: int) -> int:
        """In how many rows they go: a power of two, that splits evenly over the mesh."""
        return -(-power_of_two(sequences) // self._row_shards) * self._row_shards

    # The programs, on the mesh

    def empty(self, rows: int, capacity: int) -> tuple[Cache, Float[Array, "rows dim"]]:
        """A cache and the stream of rows that have read nothing."""
        with self._on_mesh():
            return self._empty(rows=rows, capacity=capacity)

    def read_prompts(self, *arguments) -> tuple[Cache, Float[Array, "rows dim"]]:
        """`omni.generate.loop.read_prompts` with this decoder; the cache and the stream are given away."""
        with self._on_mesh():
            return self._read_prompts(self.decoder, *arguments)

    def copy_rows(self, *arguments) -> tuple[Cache, Float[Array, "rows dim"]]:
        """`omni.generate.loop.copy_rows`; the cache and the stream are given away."""
        with self._on_mesh():
            return self._copy_rows(*arguments)

    def enter(self, state: State, *arguments) -> State:
        """`omni.generate.loop.enter`; the state is given away."""
        with self._on_mesh():
            return self._enter(state, *arguments)

    def run_loop(self, settings: Settings, state: State, n: int, pause: int) -> State:
        """`omni.generate.loop.advance` with this decoder and grammar; the state is given away."""
        with self._on_mesh():
            return self._advance(self.decoder, self.rules, self._blocks, settings, state, np.int32(n), np.int32(pause))

    def lower(self, requests: int, capacity: int) -> jax.stages.Lowered:
        """The program that emits the tokens of so many requests without guidance, not compiled yet.

        Args:
          capacity: tokens of prompt and reply that the cache has room for.
        """
        config, rows = self.decoder.config, self.padded(requests)
        shape = (rows, config.key_value_heads, capacity, config.head_dim)
        stored = self._shape(shape, config.compute_dtype, *CACHE_AXES)
        stream = self._shape((rows, config.dim), config.compute_dtype, "batch", None)
        slots = Slots(self, rows, 0, capacity, Columns())
        arguments = self.rules, self._blocks, slots.settings(), slots.state([(stored, stored)] * config.depth, stream)
        arguments = *arguments, np.int32(capacity), np.int32(0)
        shapes = jax.tree.map(lambda x: x if isinstance(x, jax.ShapeDtypeStruct) else _shape_of(x), arguments)
        with self._on_mesh():
            return self._advance.lower(self.decoder, *shapes)

    def _shape(self, shape: tuple[int, ...], dtype: str, *axes: str | None) -> jax.ShapeDtypeStruct:
        place = None if self._mesh is None else named_sharding(axes, self._places, self._mesh, shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._mesh is None else activations_on(self._mesh, self._places)


def _empty(config: TransformerConfig, rows: int, capacity: int) -> tuple[Cache, Float[Array, "rows dim"]]:
    stream = jnp.zeros((rows, config.dim), config.compute_dtype)
    return init_cache(config, rows, capacity), constrain(stream, "batch", None)


def _prompts(request: PreparedRequest) -> list[Int[np.ndarray, " tokens"]]:
    return [request.ids, *(shadow.ids for shadow in request.shadows)]


def _shape_of(x: jax.Array | np.ndarray) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def roomy(tokens: int) -> int:
    """Slots of a cache for so many tokens: every token attends to all of them, so they are rounded up finely, in steps
    of an eighth of the power of two below and 32 at least."""
    step = max(32, power_of_two(tokens + 1) // 16)
    return -(-tokens // step) * step
