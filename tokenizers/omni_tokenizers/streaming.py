"""Sound and video to codes and back a few frames at a time, in rows that begin and end when they like.

A step is one compiled function of fixed shape: it takes the next frames of every row that has enough of them, and the
carried arrays of all rows (`omni_tokenizers.carried`), which it replaces. The host keeps back what does not fill a
step, so that pieces may have any length. All pieces of a row together give what the whole would.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from omni_tokenizers.base import NetTokenizer
from omni_tokenizers.carried import Carried, start_stream
from omni_tokenizers.errors import OmniError, UsageError


class Stream(NamedTuple):
    """Both ways of a stream; neither holds memory on the device before it is used."""

    encoder: StreamEncoder
    decoder: StreamDecoder


class StreamingTokenizer(NetTokenizer):
    """A tokenizer of what has a time, which streams where its configuration is causal.

    Its net has the encoding and the decoding parts named here, through which `_encode_step` and `_decode_step` go.
    """

    encoding: ClassVar[tuple[str, ...]] = ("encoder",)
    decoding: ClassVar[tuple[str, ...]] = ("decoder",)
    first_frames = 1
    """Frames that a stream must have of a row before its first step."""
    delay = 0
    """Steps of time by which what is streamed lags behind its codes."""
    lead = 0
    """Steps of time that the first frame of codes stands for beyond those that there are."""
    closing_frames = 0
    """Frames of codes -1 after the last one, which bring what is late."""

    @property
    @abc.abstractmethod
    def frame_length(self) -> int:
        """Steps of time, samples or pictures, that a frame of codes stands for."""

    def step(self, name: str, rows: int, codebooks: int = 1) -> Step:
        """The compiled step called `name`, "encode" or "decode"; all streams of the same shape share it."""
        key = (name, rows, codebooks)
        if key not in self._steps:
            if name == "encode":
                function = functools.partial(self._encode_step, codebooks=codebooks)
                self._steps[key] = Step.of(self.net, self.encoding, function, rows)
            else:
                self._steps[key] = Step.of(self.net, self.decoding, self._decode_step, rows)
        return self._steps[key]

    @functools.cached_property
    def _steps(self) -> dict[tuple, Step]:
        return {}

    @staticmethod
    @abc.abstractmethod
    def _encode_step(net, x: Array, lengths: Int[Array, " rows"], *, codebooks: int) -> Array:
        """Codes of the next steps of time of each row, of which `lengths` count."""

    @staticmethod
    @abc.abstractmethod
    def _decode_step(net, ids: Array, frames: Int[Array, " rows"]) -> Array:
        """What the next frames of codes of each row stand for, of which `frames` count."""


class StreamingCodec(StreamingTokenizer):
    """A tokenizer of sound that streams where its configuration is causal, and has `samples_per_frame`."""

    @property
    @abc.abstractmethod
    def obstacle(self) -> str | None:
        """Why this tokenizer cannot stream; None where it can."""

    @property
    def frame_length(self) -> int:
        return self.samples_per_frame

    def stream(self, rows: int = 1, *, frames: int = 1, codebooks: int | None = None) -> Stream:
        """An encoder and a decoder that take sound and codes by pieces: `encoder, decoder = tokenizer.stream()`.

        What comes out of a row's pieces together is what `encode` and `decode` give for all of them at once.

        Args:
            rows: sounds at a time, each of which begins and ends on its own.
            frames: frames of codes that a step takes of a row; more are faster in all, and later.
            codebooks: how many, from the first on; all where None.
        Raises:
            OmniError: a tokenizer that is not causal, or numbers that do not fit.
        """
        if self.obstacle is not None:
            raise OmniError(
                f"this {self.type} tokenizer cannot stream: {self.obstacle}; mimi, encodec at 24 kHz and "
                "audio_spectral with causal=True can"
            )
        check_stream(rows, frames)
        codebooks = self._checked_codebooks(codebooks)
        return Stream(StreamEncoder(self, rows, frames, codebooks), StreamDecoder(self, rows, frames, codebooks))

    @staticmethod
    @abc.abstractmethod
    def _encode_step(net, audio: Float[Array, "rows channels samples"], lengths, *, codebooks: int) -> Array:
        """Codes [rows, codebooks, frames] of the next samples."""

    @staticmethod
    @abc.abstractmethod
    def _decode_step(net, ids: Int[Array, "rows codebooks frames"], frames: Int[Array, " rows"]) -> Array:
        """Sound [rows, channels, samples] of the next frames of codes."""

    @abc.abstractmethod
    def _checked_codebooks(self, number: int | None) -> int:
        """A number of codebooks that codes can have, or an OmniError."""

    @abc.abstractmethod
    def _checked_chunk(self, chunk: Any) -> Float[np.ndarray, "channels samples"]:
        """Some sound as the net takes it, or an OmniError."""

    @abc.abstractmethod
    def _checked_codes(self, codes: Any) -> Any:
        """Codes [batch, codebooks, frames] as `Codes`, or an OmniError."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One way through a net that streams."""

    run: Callable
    """(weights, carried, input, lengths, fresh) -> (output, carried); `carried` is donated, `fresh` marks rows that
    begin."""
    weights: nnx.State
    begin: Callable[[], nnx.State]
    """What rows carry at their beginning."""

    @classmethod
    def of(cls, net: nnx.Module, parts: Sequence[str], function: Callable, rows: int) -> Step:
        """The step that computes `function` of the net, whose `parts` carry."""
        start_stream([getattr(net, name) for name in parts], rows)
        graphdef, carried, weights = nnx.split(net, Carried, ...)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), carried)

        @functools.partial(jax.jit, donate_argnames="carried")
        def run(weights, carried, x, lengths, fresh):
            carried = jax.tree.map(lambda held: jnp.where(_along(fresh, held), jnp.zeros_like(held), held), carried)
            net = nnx.merge(graphdef, weights, carried)
            return function(net, x, lengths), nnx.state(net, Carried)

        def begin():
            return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)

        return cls(run, jax.tree.map(jnp.asarray, weights), begin)


@dataclasses.dataclass
class Row:
    """What the host knows of one row."""

    held: Num[np.ndarray, "*axes"]
    """What no step has taken yet."""
    begun: bool = False
    finished: bool = False
    pushed: int = 0
    """Steps of time that came in."""
    made: int = 0
    """Steps of time that came out of the net."""


class RowStream(abc.ABC):
    """One way of a stream."""

    name: ClassVar[str]
    dtype: ClassVar[type]
    dtype_out: ClassVar[type]
    axis = 1
    """Where time is in what comes in and what comes out of a row."""

    def __init__(self, tokenizer: StreamingTokenizer, rows: int, frames: int, codebooks: int = 1):
        self.tokenizer, self.rows, self.frames, self.codebooks = tokenizer, rows, frames, codebooks
        self.first_frames = max(frames, tokenizer.first_frames)
        self._rows = [self._new_row() for _ in range(rows)]
        self._carried = None

    @property
    @abc.abstractmethod
    def frame(self) -> int:
        """Steps of time that come in for one frame of codes."""

    @abc.abstractmethod
    def shape_in(self, time: int) -> tuple[int, ...]:
        """The shape of so many steps of time that come in."""

    @abc.abstractmethod
    def shape_out(self, time: int) -> tuple[int, ...]:
        """The shape of so many that come out."""

    def push(self, pieces: Sequence[Num[np.ndarray, "*axes"] | None]) -> list[Num[np.ndarray, "*axes"]]:
        """Takes what each row has next, and gives what came out of each; either may be of any length, and empty.

        Args:
            pieces: one for each row; None or an empty one where it has nothing.
        Raises:
            OmniError: not one for each row, something that `tokenizer` refuses, or more for a row that is finished;
                then nothing was taken.
        """
        if len(pieces) != self.rows:
            raise OmniError(f"this stream has {self.rows} rows, got {len(pieces)} pieces; None stands for nothing new")
        pieces = [self._checked(row, piece) for row, piece in enumerate(pieces)]
        for row, piece in zip(self._rows, pieces, strict=True):
            opening = piece if row.pushed else self._opened(piece)
            row.held = np.concatenate([row.held, opening], self.axis)
            row.pushed += piece.shape[self.axis]
        return self._advance()

    def finish(self, row: int = 0) -> Num[np.ndarray, "*axes"]:
        """What is still to come of a row that has ended, which takes nothing more until it is reset."""
        self._checked_open(row)
        ended = self._rows[row]
        ended.finished = True
        if ended.pushed:
            ended.held = self._closed(ended.held)
        return self._advance()[row]

    def reset(self, row: int = 0) -> None:
        """Begins a row anew; what it holds back is dropped."""
        self._checked_row(row)
        self._rows[row] = self._new_row()

    def _advance(self) -> list[Num[np.ndarray, "*axes"]]:
        """Steps as long as a row has enough for one; what came out of each row."""
        outputs = [[] for _ in self._rows]
        while ready := [index for index, row in enumerate(self._rows) if self._is_ready(row)]:
            # A row's first step may need more frames than the others: two shapes in all.
            first = not all(self._rows[index].begun for index in ready)
            for index, output in self._step(ready, self.first_frames if first else self.frames).items():
                outputs[index].append(output)
        return [np.concatenate(parts, self.axis) if parts else self._empty() for parts in outputs]

    def _is_ready(self, row: Row) -> bool:
        needed = (self.frames if row.begun else self.first_frames) * self.frame
        return row.held.shape[self.axis] >= (1 if row.finished else needed)

    def _step(self, ready: list[int], frames: int) -> dict[int, Num[np.ndarray, "*axes"]]:
        """Lets the rows that are ready take up to `frames` frames; the others stay as they are."""
        x = np.zeros((self.rows, *self.shape_in(frames * self.frame)), self.dtype)
        lengths, fresh = np.zeros(self.rows, np.int32), np.zeros(self.rows, bool)
        for index in ready:
            row = self._rows[index]
            count = min(row.held.shape[self.axis], frames * self.frame)
            count -= 0 if row.finished else count % self.frame
            self._cut(x[index], 0, count)[...] = self._cut(row.held, 0, count)
            row.held = self._cut(row.held, count)
            lengths[index], fresh[index], row.begun = count, not row.begun, True
        step = self.tokenizer.step(self.name, self.rows, self.codebooks)
        carried = step.begin() if self._carried is None else self._carried
        y, self._carried = step.run(step.weights, carried, x, lengths, fresh)
        y = np.asarray(y)
        return {index: self._output(self._rows[index], y[index], int(lengths[index])) for index in ready}

    def _new_row(self) -> Row:
        return Row(np.zeros(self.shape_in(0), self.dtype))

    def _cut(self, x: np.ndarray, start: int, stop: int | None = None) -> np.ndarray:
        """The steps of time `start` to `stop`."""
        return x[(slice(None),) * self.axis + (slice(start, stop),)]

    def _checked(self, index: int, piece) -> Num[np.ndarray, "*axes"]:
        """What a row has next, or an OmniError that names the row."""
        if piece is None or not np.size(piece):
            return np.zeros(self.shape_in(0), self.dtype)
        self._checked_open(index)
        try:
            return self._checked_piece(np.asarray(piece))
        except OmniError as error:
            raise OmniError(f"row {index}: {error}") from None

    def _checked_open(self, index: int) -> None:
        self._checked_row(index)
        if self._rows[index].finished:
            raise OmniError(f"row {index} is finished; reset({index}) begins another one in it")

    def _checked_row(self, index: int) -> None:
        if index not in range(self.rows):
            raise OmniError(f"this stream has the rows 0 to {self.rows - 1}, not {index!r}")

    def _empty(self) -> np.ndarray:
        """An output of no length."""
        return np.zeros(self.shape_out(0), self.dtype_out)

    def _opened(self, piece: np.ndarray) -> np.ndarray:
        """A row's first piece with what goes before it."""
        return piece

    @abc.abstractmethod
    def _closed(self, held: np.ndarray) -> np.ndarray:
        """What a row that ends holds back, with what goes after it."""

    @abc.abstractmethod
    def _checked_piece(self, piece: np.ndarray) -> Num[np.ndarray, "*axes"]:
        """A piece that is not empty, or an OmniError."""

    @abc.abstractmethod
    def _output(self, row: Row, y: np.ndarray, count: int) -> np.ndarray:
        """What a row gets of what the net made of `count` steps of time."""


class StreamEncoder(RowStream):
    """Sound to codes: `push` takes float32 [channels, samples] of each row and gives int32 [codebooks, frames].

    A frame's codes come with the last of its samples, or where a step takes several frames, with that of the last one.
    `finish` gives the frame that is not full.
    """

    name = "encode"
    dtype, dtype_out = np.float32, np.int32

    @property
    def frame(self) -> int:
        return self.tokenizer.frame_length

    def shape_in(self, time: int) -> tuple[int, ...]:
        return (self.tokenizer.channels, time)

    def shape_out(self, time: int) -> tuple[int, ...]:
        return (self.codebooks, time)

    def _checked_piece(self, piece: np.ndarray) -> Float[np.ndarray, "channels samples"]:
        if piece.ndim != 2:
            raise OmniError(f"sound must be [channels, samples], got the shape {list(piece.shape)}")
        return self.tokenizer._checked_chunk(piece)

    def _output(self, row: Row, y: np.ndarray, count: int) -> Int[np.ndarray, "*axes"]:
        return self._cut(y, 0, -(-count // self.frame))

    def _closed(self, held: np.ndarray) -> np.ndarray:
        return held


class StreamDecoder(RowStream):
    """Codes to sound: `push` takes int32 [codebooks, frames] of each row and gives float32 [channels, samples].

    Sound lags by `delay` samples; `finish` gives these, so that a row has samples_per_frame of them for each frame.
    """

    name = "decode"
    dtype, dtype_out = np.int32, np.float32
    frame = 1

    @property
    def delay(self) -> int:
        """Steps of time by which what comes out lags behind its codes."""
        return self.tokenizer.delay

    def shape_in(self, time: int) -> tuple[int, ...]:
        return (self.codebooks, time)

    def shape_out(self, time: int) -> tuple[int, ...]:
        return (self.tokenizer.channels, time)

    def _checked_piece(self, piece: np.ndarray) -> Int[np.ndarray, "codebooks frames"]:
        if piece.ndim != 2 or len(piece) != self.codebooks:
            raise OmniError(f"codes must be [{self.codebooks} codebooks, frames], got the shape {list(piece.shape)}")
        return self.tokenizer._checked_codes(piece[None]).ids[0]

    def _output(self, row: Row, y: np.ndarray, count: int) -> Num[np.ndarray, "*axes"]:
        """The steps of time made, without those before the beginning and after the end."""
        made, step = row.made, self.tokenizer.frame_length
        row.made += count * step
        start, stop = self.delay + self.tokenizer.lead - made, row.pushed * step + self.delay - made
        return self._cut(y, max(0, start), min(count * step, stop))

    def _closed(self, held: np.ndarray) -> np.ndarray:
        closing = np.full(self.shape_in(self.tokenizer.closing_frames), -1, np.int32)
        return np.concatenate([held, closing], self.axis)


def check_stream(rows: int, frames: int) -> None:
    """A UsageError unless a stream can have so many rows and take so many frames at a time."""
    if not all(isinstance(number, int) and number >= 1 for number in (rows, frames)):
        raise UsageError(f"a stream has at least 1 row and takes at least 1 frame, got {rows!r} and {frames!r}")


def _along(mask: Array, x: Array) -> Array:
    """`mask` of rows, for an array of rows."""
    return mask.reshape(-1, *[1] * (x.ndim - 1))
