"""The compiled programs of generation: those of `omni.generate.loop`, of one decoder and grammar, on its devices."""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from omni.generate.loop import Block, Settings, State, advance, copy_rows, end, enter, everywhere, read_prompts
from omni.generate.rules import inner_blocks, make_rules
from omni.grammar import Grammar
from omni.model import CACHE_AXES, Decoder, init_cache
from omni.model.quantized import Held
from omni.sharding import ShardingRules, activations_on, constrain, named_sharding, spread

HEAD_AXES = ("vocabulary", "embed")


class Programs:
    """Each method gives the state away that it takes, and returns the next one.

    Attributes:
      counts: how often each program was traced, the `steps` taken by all batches and the tokens of prompts `read`.
    """

    def __init__(self, decoder: Decoder, grammar: Grammar, mesh: Mesh | None = None, cache_dtype: str | None = None):
        """The programs; `mesh` is where the decoder lies, None for one device, and `cache_dtype` what the cache is held
        in (see `init_cache`). Nothing is compiled yet."""
        self.decoder, self.grammar, self.rules = decoder, grammar, make_rules(grammar)
        self._mesh, self._places = mesh, ShardingRules()
        self.row_shards = 1 if mesh is None else spread(mesh, self._places.batch)
        self._blocks = self._inner_blocks()
        self.counts: Counter[str] = Counter()
        self._nothing = partial(_empty, self.rules.pad, cache_dtype)
        self._empty = jax.jit(self._nothing, static_argnames=_SIZES)
        self._widened = jax.jit(_widened, static_argnames=_SIZES)
        self._read_prompts = jax.jit(self._counted(read_prompts), donate_argnames="state")
        self._copy_rows = jax.jit(self._counted(copy_rows), donate_argnames="state")
        self._enter = jax.jit(self._counted(enter), donate_argnames="state")
        self._end = jax.jit(end, donate_argnames="state")
        self._advance = jax.jit(self._counted(advance), donate_argnames="state")

    def _counted(self, function):
        """The function, counting its traces: one for each program that is compiled."""

        def traced(*arguments, **named):
            self.counts[function.__name__] += 1
            return function(*arguments, **named)

        traced.__signature__ = inspect.signature(function)
        return traced

    def padded(self, sequences: int) -> int:
        """In how many rows they go: a power of two, that splits evenly over the mesh."""
        return -(-power_of_two(sequences) // self.row_shards) * self.row_shards

    def empty(self, *sizes: int) -> State:
        """A state in which nothing has been read or emitted.

        Args:
          sizes: rows, slots, capacity, and the columns of ids that were seen and of log-probabilities.
        """
        with self._on_mesh():
            return self._empty(self.decoder, **dict(zip(_SIZES, sizes, strict=True)))

    def widened(self, state: State, *sizes: int) -> State:
        """A state of larger sizes, as of `empty`; what it has more is as if empty."""
        with self._on_mesh():
            return self._widened(state, **dict(zip(_SIZES, sizes, strict=True)))

    def read_prompts(
        self,
        state: State,
        rows: Int[np.ndarray, " some"],
        ids: Int[np.ndarray, "some length"],
        positions: Int[np.ndarray, "some length 3"],
        start: Int[np.ndarray, " some"],
        last: Int[np.ndarray, " some"],
        features: Float[np.ndarray, "some length dim"] | None = None,
    ) -> State:
        """See `omni.generate.loop.read_prompts`; with features it is a program of its own."""
        with self._on_mesh():
            return self._read_prompts(self.decoder, state, rows, ids, positions, start, last, features)

    def copy_rows(self, state: State, sources: Int[np.ndarray, " some"], targets: Int[np.ndarray, " some"]) -> State:
        """See `omni.generate.loop.copy_rows`."""
        with self._on_mesh():
            return self._copy_rows(state, sources, targets)

    def enter(
        self,
        state: State,
        begins: Bool[np.ndarray, " requests"],
        grammar: Int[np.ndarray, " requests"],
        length: Int[np.ndarray, " rows"],
        seen: Bool[np.ndarray, "requests vocabulary_or_none"],
    ) -> State:
        """See `omni.generate.loop.enter`."""
        with self._on_mesh():
            return self._enter(state, begins, grammar, length, seen)

    def end(self, state: State, ends: Bool[np.ndarray, " requests"]) -> State:
        """See `omni.generate.loop.end`."""
        with self._on_mesh():
            return self._end(state, ends)

    def advance(self, settings: Settings, state: State, n: int, pause: int) -> State:
        """See `omni.generate.loop.advance`."""
        with self._on_mesh():
            return self._advance(self.decoder, self.rules, self._blocks, settings, state, np.int32(n), np.int32(pause))

    def lower(self, settings: Settings, rows: int, capacity: int) -> jax.stages.Lowered:
        """The program of `advance` for requests without shadows, each in a row, not compiled yet."""
        sizes = dict(zip(_SIZES, (rows, rows, capacity, 0, 0), strict=True))
        with self._on_mesh():
            state = jax.eval_shape(partial(self._nothing, **sizes), self.decoder)
            state = jax.tree.map_with_path(self._placed, state)
            arguments = self.rules, self._blocks, settings, state, np.int32(capacity), np.int32(0)
            shapes = jax.tree.map(lambda x: x if isinstance(x, jax.ShapeDtypeStruct) else _shape_of(x), arguments)
            return self._advance.lower(self.decoder, *shapes)

    def _placed(self, path, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """An array of the state, where it lies."""
        axes = {"cache": CACHE_AXES, "stream": ("batch", None)}.get(path[0].name, (None,) * len(x.shape))
        return self._shape(x.shape, x.dtype, *axes)

    def _shape(self, shape: tuple[int, ...], dtype, *axes: str | None) -> jax.ShapeDtypeStruct:
        place = None if self._mesh is None else named_sharding(axes, self._places, self._mesh, shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def _inner_blocks(self) -> list[Block]:
        """The head's rows for `inner_blocks`, taken once; of a decoder of shapes, shapes."""
        head, codes, embedded = self.decoder.head, self.decoder.codes, self.decoder.config.embedded
        shapes = isinstance(jax.tree.leaves(head)[0], jax.ShapeDtypeStruct)
        taken = jax.jit(lambda x, ids: constrain(x[ids], *HEAD_AXES[: x.ndim]))

        def shape(x: jax.ShapeDtypeStruct, rows: int) -> jax.ShapeDtypeStruct:
            return self._shape((rows, *x.shape[1:]), x.dtype, *HEAD_AXES[: len(x.shape)])

        def take(held: Held, ids: Int[np.ndarray, " ids"]) -> Held:
            return jax.tree.map(lambda x: shape(x, len(ids)) if shapes else taken(x, ids), held)

        def block(ids: Int[np.ndarray, " ids"]) -> Block:
            rows, own = ids[ids < embedded], ids[ids >= embedded] - embedded
            of_codes = replace(codes, rows=take(codes.rows, own), bias=take(codes.bias, own)) if len(own) else None
            return Block(_shape_of(ids) if shapes else jnp.asarray(ids), take(head, rows), of_codes)

        with self._on_mesh():
            return [block(ids) for ids in inner_blocks(self.grammar)]

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._mesh is None else activations_on(self._mesh, self._places)


_SIZES = ("rows", "slots", "capacity", "seen", "drawn")


def _empty(
    pad: int, cache_dtype: str | None, decoder: Decoder, rows: int, slots: int, capacity: int, seen: int, drawn: int
) -> State:
    config = decoder.config
    # Of the decoder's devices, whether or not anything told jax to keep arrays there.
    stream = jnp.zeros((rows, config.dim), config.compute_dtype) + 0 * decoder.norm.astype(config.compute_dtype)

    def zeros(*shape: int, dtype=jnp.int32) -> Array:
        return jnp.zeros(shape, dtype)

    return everywhere(
        State(
            cache=init_cache(config, rows, capacity, cache_dtype),
            stream=constrain(stream, "batch", None),
            length=zeros(rows),
            tokens=jnp.full((slots, capacity), pad, jnp.int32),
            count=zeros(slots),
            grammar=zeros(slots),
            begun=zeros(slots),
            done=jnp.ones(slots, bool),
            broken=zeros(slots, dtype=bool),
            ended=zeros(),
            steps=zeros(),
            seen=zeros(slots, seen, dtype=bool),
            log_probabilities=zeros(slots, drawn, dtype=jnp.float32),
        )
    )


def _widened(state: State, rows: int, slots: int, capacity: int, seen: int, drawn: int) -> State:
    del slots, capacity  # which never change

    def more(x: Array, size: int, axis: int) -> Array:
        return jnp.pad(x, [(0, size - length if place == axis else 0) for place, length in enumerate(x.shape)])

    wider = replace(
        state,
        cache=jax.tree.map(lambda stored: constrain(more(stored, rows, 0), *CACHE_AXES), state.cache),
        stream=constrain(more(state.stream, rows, 0), "batch", None),
        length=more(state.length, rows, 0),
        seen=more(state.seen, seen, 1),
        log_probabilities=more(state.log_probabilities, drawn, 1),
    )
    return everywhere(wider)


def _shape_of(x: jax.Array | np.ndarray) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def power_of_two(n: int) -> int:
    """The least power of two that is at least n; 0 for 0."""
    return 0 if n == 0 else 1 << (n - 1).bit_length()
