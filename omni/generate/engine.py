"""The host side of generation: batches of any requests, in few shapes, over the compiled loop."""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from omni.generate.loop import Settings, State, advance, copy_rows, prefill
from omni.generate.requests import Generated, PreparedRequest, check_request, useful_shadows
from omni.generate.rules import make_rules
from omni.grammar import Grammar
from omni.model import CACHE_AXES, Decoder
from omni.sharding import ShardingRules, activations_on, named_sharding, spread
from omni_tokenizers.errors import UsageError

HOP = 16  # tokens after which the host looks whether text that has come ends a reply


class Engine:
    """Answers prepared requests, any mix of them in one batch.

    A prompt that several sequences of a batch have is read once, where that makes the batch of prompts smaller.

    Prompts, replies and batches are padded to few sizes (`bucket`, powers of two), so that few programs are compiled.

    Attributes:
      version: number of the way replies are drawn; the same request and seed get other replies from another version.
      counts: how often `prefill`, `copy_rows` and `advance` were compiled, and the `steps` taken by all batches.
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
          max_rows: most sequences in one batch.
          mesh: the devices over which the decoder lies (`decoder_on`), None for one. Sequences are split over them as
            rows of a training are, heads and vocabulary as its parameters; the replies are those of one device.
        """
        self.decoder, self.grammar, self.rules = decoder, grammar, make_rules(grammar)
        self.context, self.max_rows = context, max_rows
        self._mesh, self._places = mesh, ShardingRules()
        self._row_shards = 1 if mesh is None else spread(mesh, self._places.batch)
        self.counts: Counter[str] = Counter()
        self._prefill = jax.jit(self._counted(prefill), static_argnames="capacity")
        self._copy_rows = jax.jit(self._counted(copy_rows))
        self._advance = jax.jit(self._counted(advance), donate_argnames="state")

    def _counted(self, function):
        """The function, counting its traces: one for each program that is compiled."""

        def traced(*arguments, **named):
            self.counts[function.__name__] += 1
            return function(*arguments, **named)

        traced.__signature__ = inspect.signature(function)
        return traced

    def generate(self, requests: Sequence[PreparedRequest]) -> list[Generated]:
        """Replies in the order of the requests; as many batches as `max_rows` asks for.

        Raises:
          UsageError, OmniError: for any request that cannot be answered, before anything runs (see `check_request`).
        """
        replies: list[Generated | None] = [None] * len(requests)
        for batch in self._batches(requests):
            asked = [requests[i] for i in batch]
            hop = HOP if any(each.stop for each in asked) else max(each.max_tokens for each in asked)
            *_, (state, counts) = self._emit(asked, hop, pause=False)
            tokens = np.array(state.tokens)
            whole = ~np.array(state.broken) & (self.grammar.tables.cost[np.array(state.grammar)] == 0)
            whole = whole[: len(batch)] | (counts < np.array(state.count)[: len(batch)])  # what a stop keeps, parses
            drawn = np.array(state.log_probabilities)
            for place, i in enumerate(batch):
                kept = slice(counts[place])
                log_probabilities = drawn[place, kept] if requests[i].log_probabilities else None
                replies[i] = Generated(tokens[place, kept], bool(whole[place]), log_probabilities)
        return replies

    def stream(
        self, requests: Sequence[PreparedRequest], hop: int = 16
    ) -> Iterator[list[tuple[int, Int[np.ndarray, " tokens"]]]]:
        """Lists of (request, its new ids): after at most `hop` tokens, and whenever a part has ended.

        Raises:
          UsageError: also if the requests do not fit one batch.
        """
        batches = self._batches(requests)
        if len(batches) > 1:
            raise UsageError(f"{len(requests)} requests are more than one batch of {self.max_rows} sequences")
        for batch in batches:
            seen = np.zeros(len(batch), np.int32)
            for state, counts in self._emit([requests[i] for i in batch], hop, pause=True):
                tokens = np.array(state.tokens)
                new = [(i, tokens[place, seen[place] : counts[place]]) for place, i in enumerate(batch)]
                seen = counts
                yield sorted((increment for increment in new if len(increment[1])), key=lambda increment: increment[0])

    def _emit(
        self, requests: Sequence[PreparedRequest], hop: int, pause: bool
    ) -> Iterator[tuple[State, Int[np.ndarray, " requests"]]]:
        """The batch after every `hop` tokens at most, until all is done, and how many tokens each reply has of it."""
        settings, state = self._start(requests)
        ends: dict[int, int] = {}
        counts = before = np.zeros(len(requests), np.int32)
        while not state.done.all():
            state, before = self._run(settings, state, n=hop, pause=pause), counts
            counts = np.array(state.count)[: len(requests)]
            ends |= _ends(requests, state, np.flatnonzero(counts > before))
            if ends:
                state = replace(state, done=state.done | np.isin(np.arange(len(state.done)), list(ends)))
            yield state, np.array([ends.get(place, count) for place, count in enumerate(counts)], np.int32)
        self.counts["steps"] += int(state.steps)

    def lower(self, requests: int, capacity: int) -> jax.stages.Lowered:
        """The program that emits the tokens of so many requests without guidance, not compiled yet.

        Args:
          capacity: tokens of prompt and reply that the cache has room for.
        """
        config, rows = self.decoder.config, self._padded(requests)
        shape = (rows, config.key_value_heads, capacity, config.head_dim)
        stored = self._shape(shape, config.compute_dtype, *CACHE_AXES)
        logits = self._shape((rows, config.vocabulary_size), "float32", "batch", "vocabulary")
        every, none = np.arange(rows, dtype=np.int32), np.zeros(len(self.grammar.modalities), np.float32)
        request = PreparedRequest(self.grammar.prompt([]), capacity, none, none, none, none, none + 1)
        shadows = np.zeros((rows, 0), np.int32), np.zeros((rows, 0, len(none)), np.float32)
        settings = self._settings([request], rows, every, *shadows)
        state = self._state([(stored, stored)] * config.depth, logits, every, every, capacity, [request])
        arguments = self.rules, settings, state, np.int32(capacity), np.bool_(False)
        shapes = jax.tree.map(lambda x: x if isinstance(x, jax.ShapeDtypeStruct) else _shape_of(x), arguments)
        with self._on_mesh():
            return self._advance.lower(self.decoder, *shapes)

    def _shape(self, shape: tuple[int, ...], dtype: str, *axes: str | None) -> jax.ShapeDtypeStruct:
        place = None if self._mesh is None else named_sharding(axes, self._places, self._mesh, shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def _run(self, settings: Settings, state: State, n: int, pause: bool) -> State:
        with self._on_mesh():
            return self._advance(self.decoder, self.rules, settings, state, np.int32(n), np.bool_(pause))

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._mesh is None else activations_on(self._mesh, self._places)

    def _padded(self, sequences: int) -> int:
        """In how many rows they go: a power of two, that splits evenly over the mesh."""
        return -(-power_of_two(sequences) // self._row_shards) * self._row_shards

    def _batches(self, requests: Sequence[PreparedRequest]) -> list[list[int]]:
        """Indices of the requests of each batch; like sizes together, since a batch takes as long as its longest."""
        for request in requests:
            check_request(request, self.grammar, self.context)

        def size(i: int) -> tuple[int, int, int]:
            request = requests[i]
            wanted = 0 if request.want is None else int(self.grammar.tables.minimum[list(request.want)].sum())
            return len(useful_shadows(request)), wanted or request.max_tokens, len(request.ids)

        batches: list[list[int]] = []
        leaders = shadows = 0
        for i in sorted(range(len(requests)), key=size):
            leaders, shadows = leaders + 1, shadows + len(useful_shadows(requests[i]))
            if not batches or self._padded(leaders) + self._padded(shadows) > self.max_rows:
                batches.append([])
                leaders, shadows = 1, len(useful_shadows(requests[i]))
            batches[-1].append(i)
        return batches

    def _start(self, requests: Sequence[PreparedRequest]) -> tuple[Settings, State]:
        """The batch, padded, with its prompts read."""
        shadows = [useful_shadows(request) for request in requests]
        size = self._padded(len(requests))
        prompts = [request.ids for request in requests] + [requests[0].ids] * (size - len(requests))
        leader = list(range(size))
        most = max(map(len, shadows))
        shadow_rows = np.tile(np.arange(size, dtype=np.int32)[:, None], most)
        weight = np.zeros((size, most, self.rules.modalities), np.float32)
        for request, mine in enumerate(shadows):
            for place, shadow in enumerate(mine):
                shadow_rows[request, place], weight[request, place] = len(prompts), shadow.weight
                prompts.append(shadow.ids)
                leader.append(request)
        padding = self._padded(len(prompts) - size) - (len(prompts) - size)
        prompts += [requests[0].ids] * padding
        leader += [0] * padding
        state = self._read_prompts(prompts, size, requests)
        state = replace(state, done=np.arange(size) >= len(requests))
        return self._settings(requests, size, np.array(leader, np.int32), shadow_rows, weight), state

    def _capacity(self, longest: int, max_tokens: int) -> int:
        """Slots of the cache for prompts padded to `longest`: each token attends to all of them, so they are rounded
        up more finely than prompts.

        Never more than the context needs: a reply that may fill it has a budget that differs with each prompt, and
        would be compiled for each anew.
        """
        capacity = bucket(longest + max_tokens, step=32)
        return capacity if self.context is None else max(longest, min(capacity, bucket(self.context, step=32)))

    def _settings(self, requests, size: int, leader, shadow, weight) -> Settings:
        """The requests' own settings as arrays; padding repeats the first request."""
        requests = [*requests, *[requests[0]] * (size - len(requests))]
        wants = power_of_two(max(8, *(len(request.want or ()) for request in requests)))
        stops = np.full((size, power_of_two(max(len(request.stop_tokens) for request in requests))), -1, np.int32)
        want = np.full((size, wants + 1), self.rules.end, np.int32)
        reserve = np.zeros((size, wants + 2), np.int32)
        for i, request in enumerate(requests):
            stops[i, : len(request.stop_tokens)] = request.stop_tokens
            if request.want is not None:
                want[i, : len(request.want)] = request.want
                needs = [*self.grammar.tables.minimum[list(request.want)], 1]
                reserve[i, : len(needs)] = np.cumsum(needs[::-1])[::-1]

        def column(name: str, dtype) -> np.ndarray:
            return np.array([getattr(request, name) for request in requests], dtype)

        return Settings(
            leader=leader,
            shadow=shadow,
            weight=weight,
            want=want,
            reserve=reserve,
            free=np.array([request.want is None for request in requests]),
            constrained=column("constrained", bool),
            limit=column("max_tokens", np.int32),
            seed=np.array([request.seed % 2**32 for request in requests], np.uint32),
            temperature=column("temperature", np.float32),
            top_k=column("top_k", np.int32),
            top_p=column("top_p", np.float32),
            min_p=column("min_p", np.float32),
            repetition_penalty=column("repetition_penalty", np.float32),
            stop_tokens=stops,
        )

    def _read_prompts(self, prompts: Sequence[np.ndarray], size: int, requests: Sequence[PreparedRequest]) -> State:
        prompts, source = self._distinct(prompts)
        rows, longest = len(prompts), bucket(max(map(len, prompts)))
        ids = np.full((rows, longest), self.rules.pad, np.int32)
        positions = np.zeros((rows, longest, 3), np.int32)
        length = np.array([len(prompt) for prompt in prompts], np.int32)
        last_state = np.zeros(rows, np.int32)
        for row, prompt in enumerate(prompts):
            states = self.grammar.annotate(prompt)
            ids[row, : len(prompt)] = prompt
            positions[row, : len(prompt)] = self.grammar.positions(states, np.arange(len(prompt)))
            last_state[row] = states[-1]
        capacity = self._capacity(longest, max(request.max_tokens for request in requests))
        with self._on_mesh():
            cache, logits = self._prefill(self.decoder, ids, positions, length, capacity=capacity)
            if len(source) > rows:
                cache, logits = self._copy_rows(cache, logits, source)
        return self._state(cache, logits, length[source], last_state[source[:size]], capacity, requests)

    def _distinct(self, prompts: Sequence[np.ndarray]) -> tuple[list[np.ndarray], Int[np.ndarray, " rows"]]:
        """Different prompts, padded, and which of them each one is; all as they are where that saves no rows."""
        keys = [np.asarray(prompt, np.int32).tobytes() for prompt in prompts]
        different = dict(zip(keys, prompts, strict=True))
        size = self._padded(len(different))
        if size >= len(prompts):
            return list(prompts), np.arange(len(prompts), dtype=np.int32)
        place = {key: i for i, key in enumerate(different)}
        padding = [prompts[0]] * (size - len(different))
        return [*different.values(), *padding], np.array([place[key] for key in keys], np.int32)

    def _state(
        self, cache, logits, length, grammar: Int[np.ndarray, " rows"], capacity: int, asked: Sequence[PreparedRequest]
    ) -> State:
        """Nothing has been emitted yet."""
        requests = len(grammar)
        seen = np.zeros((requests, len(self.rules.class_of) if any(each.penalises for each in asked) else 0), bool)
        if seen.size:
            for row, request in zip(seen, asked, strict=False):
                row[request.ids] = True
        return State(
            cache=cache,
            logits=logits,
            length=length,
            tokens=np.full((requests, capacity), self.rules.pad, np.int32),
            count=np.zeros(requests, np.int32),
            grammar=grammar,
            begun=np.zeros(requests, np.int32),
            done=np.zeros(requests, bool),
            broken=np.zeros(requests, bool),
            part_ended=np.zeros((), bool),
            steps=np.zeros((), np.int32),
            seen=seen,
            log_probabilities=np.zeros(
                (requests, capacity if any(each.log_probabilities for each in asked) else 0), np.float32
            ),
        )


def _ends(requests: Sequence[PreparedRequest], state: State, places: Int[np.ndarray, " n"]) -> dict[int, int]:
    """How many tokens are kept of those of these requests that their text has ended."""
    asking = [int(place) for place in places if requests[place].stop is not None]
    if not asking:
        return {}
    tokens, counts = np.array(state.tokens), np.array(state.count)
    found = {place: requests[place].stop(tokens[place, : counts[place]]) for place in asking}
    return {place: end for place, end in found.items() if end is not None}


def _shape_of(x: jax.Array | np.ndarray) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def bucket(length: int, step: int = 64) -> int:
    """The padded length: a multiple of `step` up to 512, then a power of two."""
    return -(-length // step) * step if length <= 512 else power_of_two(length)


def power_of_two(n: int) -> int:
    """The least power of two that is at least n; 0 for 0."""
    return 0 if n == 0 else 1 << (n - 1).bit_length()
