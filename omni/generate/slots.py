"""The host side of a running batch: requests wait for a slot, read their prompts, emit, and leave."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int

from omni.generate.loop import NOTHING, PARTS, REPLIES, Settings, State
from omni.generate.programs import Programs, power_of_two
from omni.generate.prompt import Prompt, shared
from omni.generate.requests import Generated, PreparedRequest, check_request, is_whole, useful_shadows
from omni_tokenizers.errors import UsageError

HOP = 16  # tokens after which the host looks whether text that has come ends a reply
# Prompts are read in pieces of few sizes, of few rows at once, so that few programs are compiled.
CHUNKS = (32, 128, 512)
ROWS = (1, 4, 16, 64, 256)
READING_HOP = 8  # tokens that others emit between two pieces of a prompt
READ_TOKENS = 8192  # tokens of prompts that are read at once, at most


@dataclass(frozen=True)
class Columns:
    """How wide the settings and the state of a batch are: as its widest request needs, and never narrower again, since
    each width is a program of its own."""

    shadows: int = 0
    wants: int = 8
    stops: int = 0
    seen: bool = False
    log_probabilities: bool = False

    @classmethod
    def of(cls, requests: Sequence[PreparedRequest]) -> Columns:
        """Those that some requests need."""
        found = cls()
        for request in requests:
            found |= cls(
                len(useful_shadows(request)),
                power_of_two(len(request.want or ())),
                power_of_two(len(request.stop_tokens)),
                request.penalises,
                request.log_probabilities,
            )
        return found

    def __or__(self, other: Columns) -> Columns:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Columns(*(max(own, others) for own, others in pairs))


@dataclass(frozen=True, eq=False)
class Progress:
    """What a request has emitted since the last that was heard of it.

    Attributes:
      number: the request's, as `Slots.add` gave it.
      ids: the new tokens.
      reply: the whole reply, once it has ended.
    """

    number: int
    ids: Int[np.ndarray, " tokens"]
    reply: Generated | None = None


@dataclass(eq=False)
class _Occupant:
    """A request that waits, or that is in a slot, with its rows: its own and those of its shadows."""

    number: int
    request: PreparedRequest
    prompts: list[Prompt]
    """Its own and its shadows'."""
    rows: list[int] = field(default_factory=list)
    unread: int = 0
    running: bool = False
    cancelled: bool = False
    given: int = 0
    """Tokens of the reply that were given out."""


@dataclass(eq=False)
class _Reading:
    """A prompt that is being read into a row, for that row's occupant and for others that begin alike."""

    prompt: Prompt
    row: int
    at: int
    """The next token to read."""
    occupants: list[_Occupant] = field(default_factory=list)
    copies: list[int] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Tokens to read."""
        return len(self.prompt.ids) - self.at


class Slots:
    """A batch that requests join and leave while it runs; see `Engine.open`.

    A prompt that several requests which join together have is read once. A slot keeps what its cache holds when its
    request has left, and a request takes the free slot that holds most of the beginning of its prompt: the next turn of
    a conversation reads what is new alone.

    Attributes:
      size: slots, one for each request that is answered at a time.
      capacity: most tokens of a prompt and its reply.
    """

    def __init__(
        self,
        programs: Programs,
        size: int,
        capacity: int,
        *,
        shadows: int | None = None,
        context: int | None = None,
        requests: Sequence[PreparedRequest] = (),
    ):
        """An empty batch.

        Args:
          shadows: rows for the shadows of guided requests; by default none until one comes, then as many for each slot
            as it needs.
          context: what prompts and replies may not exceed in any batch.
          requests: some that will come, for which it is made wide enough at once.
        """
        self.size, self.capacity = size, capacity
        self._programs, self._context = programs, context
        self._columns = Columns.of(requests)
        self._grows, self._rows = shadows is None, size + programs.padded(shadows or 0)
        self._waiting: deque[_Occupant] = deque()
        self._occupants: list[_Occupant | None] = [None] * size
        self._readings: list[_Reading] = []
        self._free_rows = set(range(size, self._rows))
        self._held = [np.zeros(0, np.int32)] * self._rows
        self._left = [-1] * self._rows  # the number of the request that left it last
        self._added = 0
        self._settings: Settings | None = None
        self._state: State | None = None
        self._sizes: tuple[int, ...] = ()

    @property
    def busy(self) -> bool:
        """Whether any request waits or is being answered."""
        return bool(self._waiting) or any(self._occupants)

    def add(self, request: PreparedRequest) -> int:
        """Lines a request up; returns its number, counted from 0.

        Raises:
          UsageError, OmniError: if it cannot be answered, at all or with this capacity (see `check_request`).
        """
        grammar = self._programs.grammar
        check_request(request, grammar, self._programs.decoder.config.dim, self._context, self.capacity)
        shadows = useful_shadows(request)
        if not self._grows and len(shadows) > self._rows - self.size:
            raise UsageError(
                f"guidance of this request takes {len(shadows)} more rows, the batch has {self._rows - self.size} for "
                "it; open it with more shadows"
            )
        prompts = [Prompt.of(grammar, request, request.is_chat)]
        prompts += [Prompt.of(grammar, shadow, request.is_chat or shadow.is_chat) for shadow in shadows]
        self._waiting.append(_Occupant(self._added, request, prompts))
        self._added += 1
        return self._added - 1

    def warm_up(self, requests: Sequence[PreparedRequest] = ()) -> None:
        """Compiles all that requests like these will run (by default plain ones, without guidance), so that no reply
        waits for a compiler; nothing is generated."""
        self._make_room([useful_shadows(request) for request in requests])
        self._columns |= Columns.of(requests)
        self._renew()
        width = self._programs.decoder.config.dim if any(each.features is not None for each in requests) else 0
        nobody = [size for size in ROWS if size < self._rows * 2]
        for rows in (self._padded([self._rows] * size) for size in nobody):
            zeros = np.zeros(len(rows), np.int32)
            for size in (size for size in CHUNKS if size < self.capacity * 2 and len(rows) * size <= READ_TOKENS):
                ids = np.full((len(rows), size), self._programs.rules.pad, np.int32)
                pieces = rows, ids, np.zeros((*ids.shape, 3), np.int32), zeros, zeros
                for features in (None, np.zeros((*ids.shape, width), np.float32))[: 1 + bool(width)]:
                    self._state = self._programs.read_prompts(self._state, *pieces, features)
            self._state = self._programs.copy_rows(self._state, zeros, rows)
        self._enter([])
        self._state = self._programs.end(self._state, np.zeros(self.size, bool))
        self._state = self._programs.advance(self._settings, self._state, 0, NOTHING)

    def cancel(self, number: int) -> None:
        """Drops a request that waits or is being answered; of one that has ended nothing is left to drop."""
        self._waiting = deque(each for each in self._waiting if each.number != number)
        for slot, occupant in enumerate(self._occupants):
            if occupant and occupant.number == number and not occupant.running:
                occupant.cancelled = True  # others may wait for what it reads
            elif occupant and occupant.number == number:
                emitted = np.array(self._state.tokens)[slot, : np.array(self._state.count)[slot]]
                self._state = self._programs.end(self._state, np.arange(self.size) == slot)
                self._leave(slot, occupant, emitted)

    def step(self, hop: int | None = None, *, parts: bool = False) -> list[Progress]:
        """Goes on until a request ends that another one waits for, or all have ended; returns what came until then.

        Args:
          hop: most tokens that each request emits.
          parts: stops at the end of every part.

        Raises:
          UsageError: a hop that is no number of tokens.
        """
        if hop is not None and not (is_whole(hop) and hop >= 1):
            raise UsageError(f"hop is a whole number of tokens, at least 1, not {hop!r}")
        self._admit()
        if self._readings:
            self._read()
        running = [each for each in self._occupants if each and each.running]
        if not running:
            return []
        limits = [hop] if hop else []
        limits += [READING_HOP] if self._readings else []
        limits += [HOP] if any(each.request.stop for each in running) else []
        pause = PARTS if parts else REPLIES if self._waiting or self._readings else NOTHING
        steps = int(self._state.steps)
        self._state = self._programs.advance(self._settings, self._state, min(limits, default=self.capacity), pause)
        self._programs.counts["steps"] += int(self._state.steps) - steps
        return self._collect()

    # Joining

    def _admit(self) -> None:
        """Gives free slots to those that wait, in their order."""
        joined = False
        while self._waiting and (free := [slot for slot, each in enumerate(self._occupants) if each is None]):
            occupant = self._waiting[0]
            shadows = occupant.prompts[1:]
            self._make_room([shadows])
            if len(shadows) > len(self._free_rows):
                break
            self._waiting.popleft()
            occupant.rows = [self._best(free, occupant.prompts[0].ids)]
            for shadow in shadows:
                occupant.rows.append(self._best(self._free_rows, shadow.ids))
                self._free_rows.remove(occupant.rows[-1])
            self._occupants[occupant.rows[0]] = occupant
            self._columns |= Columns.of([occupant.request])
            for row, prompt in zip(occupant.rows, occupant.prompts, strict=True):
                self._line_up(occupant, row, prompt)
            joined = True
        if joined:
            self._renew()

    def _make_room(self, shadows: Sequence[Sequence]) -> None:
        """Adds rows for shadows, if the batch may grow, so that every slot has as many as one of these requests."""
        most = max(map(len, shadows), default=0)
        rows = self.size + self._programs.padded(self.size * most)
        if self._grows and most and rows > self._rows:
            self._free_rows |= set(range(self._rows, rows))
            self._held += [np.zeros(0, np.int32)] * (rows - self._rows)
            self._left += [-1] * (rows - self._rows)
            self._rows = rows
            if self._state is not None:
                self._renew()

    def _renew(self) -> None:
        """Settings and state for those that are there now, as wide as they need."""
        columns, vocabulary = self._columns, self._programs.grammar.vocabulary.size
        sizes = self._rows, self.size, self.capacity
        sizes = *sizes, vocabulary * columns.seen, self.capacity * columns.log_probabilities
        if self._state is None:
            self._state = self._programs.empty(*sizes)
        elif sizes != self._sizes:
            self._state = self._programs.widened(self._state, *sizes)
        self._sizes, self._settings = sizes, self.settings()

    def _best(self, rows: Iterable[int], ids: Int[np.ndarray, " tokens"]) -> int:
        """The row that holds most of the beginning of a prompt and little besides; else the one used longest ago."""

        def worth(row: int) -> tuple[int, int, int]:
            count = shared(self._held[row], ids)
            return (count if 2 * count > len(self._held[row]) else 0), -self._left[row], -row

        return max(rows, key=worth)

    def _line_up(self, occupant: _Occupant, row: int, prompt: Prompt) -> None:
        occupant.unread += 1
        for reading in self._readings:
            if np.array_equal(reading.prompt.ids, prompt.ids):
                reading.occupants.append(occupant)
                reading.copies.append(row)
                return
        # One token at least, for the stream after it.
        start = min(shared(self._held[row], prompt.ids), len(prompt.ids) - 1)
        self._readings.append(_Reading(prompt, row, start, [occupant]))

    # Reading

    def _read(self) -> None:
        """The next piece of every prompt, or of some while others answer; requests whose prompts are read begin."""
        answering = any(each and each.running for each in self._occupants)
        by_size: dict[int, list[_Reading]] = {}
        for reading in self._readings:
            by_size.setdefault(piece(reading.left, CHUNKS), []).append(reading)
        pieces = [(some, size) for size, each in by_size.items() for some in _split(each, READ_TOKENS // size)]
        for some, size in pieces[: 1 if answering else None]:
            self._read_pieces(some, size)
        finished = [reading for reading in self._readings if not reading.left]
        self._readings = [reading for reading in self._readings if reading.left]
        for pairs in _split([(reading.row, target) for reading in finished for target in reading.copies]):
            sources, targets = (self._padded(list(rows)) for rows in zip(*pairs, strict=True))
            self._state = self._programs.copy_rows(self._state, sources, targets)
        for reading in finished:
            for row in (reading.row, *reading.copies):
                self._held[row] = reading.prompt.ids
            for occupant in reading.occupants:
                occupant.unread -= 1
        ready = [each for each in self._occupants if each and not each.running and not each.unread]
        for occupant in ready:
            if occupant.cancelled:
                self._leave(occupant.rows[0], occupant, np.zeros(0, np.int32))
        if ready := [each for each in ready if not each.cancelled]:
            self._enter(ready)

    def _read_pieces(self, readings: Sequence[_Reading], size: int) -> None:
        rows = self._padded([reading.row for reading in readings])
        ids = np.full((len(rows), size), self._programs.rules.pad, np.int32)
        positions = np.zeros((len(rows), size, 3), np.int32)
        start, last, features = np.zeros(len(rows), np.int32), np.zeros(len(rows), np.int32), None
        for i, reading in enumerate(readings):
            read, prompt = slice(reading.at, reading.at + size), reading.prompt
            count = len(prompt.ids[read])
            ids[i, :count], positions[i, :count] = prompt.ids[read], prompt.positions[read]
            start[i], last[i] = reading.at, count - 1
            if (ids[i] < 0).any():
                if features is None:
                    features = np.zeros((*ids.shape, prompt.features.shape[1]), np.float32)
                features[i, :count] = prompt.features[read]
            reading.at += count
            self._programs.counts["read"] += count
        self._state = self._programs.read_prompts(self._state, rows, ids, positions, start, last, features)

    def _padded(self, rows: list[int]) -> Int[np.ndarray, " rows"]:
        """The rows, then one that does not exist, in one of the sizes in which rows are read and copied."""
        size = self._programs.padded(next(size for size in ROWS if len(rows) <= size))
        return np.array(rows + [self._rows] * (size - len(rows)), np.int32)

    def _enter(self, occupants: Sequence[_Occupant]) -> None:
        begins, grammar = np.zeros(self.size, bool), np.zeros(self.size, np.int32)
        length = np.full(self._rows, -1, np.int32)
        seen = np.zeros(self._state.seen.shape, bool)
        for occupant in occupants:
            slot, own = occupant.rows[0], occupant.prompts[0]
            begins[slot], grammar[slot] = True, own.states[-1]
            for row, prompt in zip(occupant.rows, occupant.prompts, strict=True):
                length[row] = len(prompt.ids)
            if seen.size:
                seen[slot, own.ids[own.ids >= 0]] = True
            occupant.running = True
        self._state = self._programs.enter(self._state, begins, grammar, length, seen)

    # Leaving

    def _collect(self) -> list[Progress]:
        """What is new of each request; those that have ended leave."""
        state, grammar = self._state, self._programs.grammar
        tokens, counts, done = np.array(state.tokens), np.array(state.count), np.array(state.done)
        whole = ~np.array(state.broken) & (grammar.tables.cost[np.array(state.grammar)] == 0)
        drawn = np.array(state.log_probabilities)
        found, stopped = [], np.zeros(self.size, bool)
        for slot, occupant in enumerate(self._occupants):
            if occupant is None or not occupant.running:
                continue
            emitted, count, request = tokens[slot, : counts[slot]], int(counts[slot]), occupant.request
            end = request.stop(emitted) if request.stop and count > occupant.given else None
            new, reply = tokens[slot, occupant.given : count if end is None else end], None
            occupant.given += len(new)
            if done[slot] or end is not None:
                stopped[slot], kept = not done[slot], slice(occupant.given)
                log_probabilities = drawn[slot, kept] if request.log_probabilities else None
                well_formed = bool(whole[slot]) or (end is not None and end < count)  # what a stop keeps, parses
                reply = Generated(emitted[kept], well_formed, log_probabilities)
                self._leave(slot, occupant, emitted)
            if len(new) or reply:
                found.append(Progress(occupant.number, new, reply))
        if stopped.any():
            self._state = self._programs.end(self._state, stopped)
        return sorted(found, key=lambda progress: progress.number)

    def _leave(self, slot: int, occupant: _Occupant, emitted: Int[np.ndarray, " tokens"]) -> None:
        for row, prompt in zip(occupant.rows, occupant.prompts, strict=True):
            self._held[row] = np.concatenate([prompt.ids, emitted[:-1]])  # nothing has read the last one
            self._left[row] = occupant.number
        self._occupants[slot] = None
        self._free_rows.update(occupant.rows[1:])

    # Arrays

    def settings(self) -> Settings:
        """The settings of all slots as arrays; nothing looks at those of a free one."""
        occupied = [(slot, each.request) for slot, each in enumerate(self._occupants) if each]
        columns, rules = self._columns, self._programs.rules
        want = np.full((self.size, columns.wants + 1), rules.end, np.int32)
        reserve = np.zeros((self.size, columns.wants + 2), np.int32)
        stops = np.full((self.size, columns.stops), -1, np.int32)
        for slot, request in occupied:
            stops[slot, : len(request.stop_tokens)] = request.stop_tokens
            if request.want is not None:
                want[slot, : len(request.want)] = request.want
                needs = [*self._programs.grammar.tables.minimum[list(request.want)], 1]
                reserve[slot, : len(needs)] = np.cumsum(needs[::-1])[::-1]

        def column(values: Sequence, dtype, *shape: int) -> np.ndarray:
            array = np.ones((self.size, *shape), dtype)
            for (slot, _), value in zip(occupied, values, strict=True):
                array[slot] = value
            return array

        def by_modality(name: str, dtype) -> np.ndarray:
            return column([getattr(request, name) for _, request in occupied], dtype, rules.modalities)

        return Settings(
            **self._guidance(),
            want=want,
            reserve=reserve,
            free=column([request.want is None for _, request in occupied], bool),
            constrained=column([request.constrained for _, request in occupied], bool),
            limit=column([request.max_tokens for _, request in occupied], np.int32),
            seed=column([int(request.seed) % 2**32 for _, request in occupied], np.uint32),
            temperature=by_modality("temperature", np.float32),
            top_k=by_modality("top_k", np.int32),
            top_p=by_modality("top_p", np.float32),
            min_p=by_modality("min_p", np.float32),
            repetition_penalty=by_modality("repetition_penalty", np.float32),
            stop_tokens=stops,
        )

    def _guidance(self) -> dict[str, np.ndarray]:
        """Who follows whom, and with what weight; a row that shadows nobody follows none."""
        leader = np.concatenate([np.arange(self.size), np.full(self._rows - self.size, -1)]).astype(np.int32)
        shadow = np.tile(np.arange(self.size, dtype=np.int32)[:, None], self._columns.shadows)
        weight = np.zeros((self.size, self._columns.shadows, self._programs.rules.modalities), np.float32)
        for slot, occupant in enumerate(self._occupants):
            shadows = zip(occupant.rows[1:], useful_shadows(occupant.request), strict=True) if occupant else ()
            for place, (row, each) in enumerate(shadows):
                leader[row], shadow[slot, place], weight[slot, place] = slot, row, each.weight
        return {"leader": leader, "shadow": shadow, "weight": weight}


def piece(n: int, sizes: Sequence[int]) -> int:
    """In which size so many are taken next: the largest that is more than half full, or the smallest."""
    return max((size for size in sizes if n > size // 2), default=sizes[0])


def _split(items: list, most: int = ROWS[-1]) -> Iterator[list]:
    """In the numbers of rows that are read or copied at once, `most` of them at most."""
    sizes = [size for size in ROWS if size <= max(most, 1)]
    while items:
        count = piece(len(items), sizes)
        yield items[:count]
        items = items[count:]
