"""Videos to codes and back a few frames at a time: pushed in pieces of any length, or whole ones of any length.

Both take the same compiled steps, so that a whole video needs the memory of its frames, its codes and one step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Int, UInt8

from omni_tokenizers.codes import Codes, as_codes
from omni_tokenizers.errors import OmniError
from omni_tokenizers.grid import PIXELS, cropped
from omni_tokenizers.streaming import Stream, StreamDecoder, StreamEncoder, StreamingTokenizer, check_stream

_AXES = ("batch", "frames", "rows", "columns")


class VideoStreams(StreamingTokenizer):
    """A tokenizer with streams of video: frames uint8 [time, height, width, 3] to codes int32 [frames, rows, columns].

    Its net has ``encode(video, frames)`` and ``decode(codes, frames)``, of which the first `frames` frames of codes of
    each row count; the configuration has `strides` and `image_size`.
    """

    @property
    def frame_length(self) -> int:
        return self.config.strides[0]

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """Of a video's frames."""
        return (self.config.image_size, self.config.image_size, 3)

    def stream(self, rows: int = 1, *, frames: int = 1) -> Stream:
        """An encoder and a decoder that take videos and codes by pieces: `encoder, decoder = tokenizer.stream()`.

        What comes out of a row's pieces together is what `encode` and `decode` give for all of them at once.

        Args:
            rows: videos at a time, each of which begins and ends on its own.
            frames: frames of codes that a step takes of a row; more are faster in all, and later.
        Raises:
            UsageError: numbers that do not fit.
        """
        check_stream(rows, frames)
        return Stream(VideoStreamEncoder(self, rows, frames), VideoStreamDecoder(self, rows, frames))

    @staticmethod
    def _encode_step(net, video, lengths, *, codebooks):
        return net.encode(video, lengths // net.config.strides[0])

    @staticmethod
    def _decode_step(net, ids, frames):
        return net.decode(ids, frames)

    def _checked(self, x: np.ndarray) -> UInt8[np.ndarray, "batch *time height width 3"]:
        if x.dtype != np.uint8:
            raise OmniError(f"videos must be uint8 (0 to 255), got {x.dtype}; convert them first")
        if x.ndim not in (4, 5) or x.shape[-3:] != self.frame_shape or 0 in x.shape[1:]:
            size = ", ".join(map(str, self.frame_shape))
            wanted = f"[batch, time, {size}] or, pictures, [batch, {size}]"
            raise OmniError(f"videos must be {wanted} and not empty, got {list(x.shape)}; resize them")
        return x

    def _checked_codes(self, codes) -> Codes:
        axes = _AXES if np.ndim(codes) != 3 else (_AXES[0], *_AXES[2:])
        codes = as_codes(codes, axes=axes, size=self.codebook_sizes[0])
        if codes.ids.shape[-2:] != self.grid or 0 in codes.ids.shape[1:]:
            rows, columns = self.grid
            wanted = f"[batch, frames, {rows}, {columns}] or, of pictures, [batch, {rows}, {columns}]"
            raise OmniError(f"codes must be {wanted} and not empty, got {list(codes.ids.shape)}")
        return codes


class SteppedVideoTokenizer(VideoStreams):
    """Videos uint8 [batch, time, height, width, 3] to codes int32 [batch, frames, rows, columns] and back, and pictures
    uint8 [batch, height, width, 3], which are videos of one frame, to codes [batch, rows, columns] and back.

    The first frame of codes stands for the first frame alone: `lead` copies of it go before a video, so that every
    frame of codes is made of as many. A video whose length does not fit goes on with its last frame; decoding cuts that
    off where `Codes.sizes` knows the length.
    """

    modality = "video"
    modalities = ("video", "image")

    def frames(self, time: int) -> int:
        """Frames of codes that a video of so many frames takes."""
        return -(-(time + self.lead) // self.frame_length)

    def encode(self, x: UInt8[np.ndarray, "batch *time height width 3"]) -> Codes:
        """Codes of videos or pictures; `Codes.sizes` has what decoding must cut off, if there is anything.

        Raises:
            OmniError: not uint8, of another shape, or without frames.
        """
        x = self._checked(np.asarray(x))
        video = x if x.ndim == 5 else x[:, None]
        batch, time = video.shape[:2]
        frames = self.frames(time)
        ids = np.empty((batch, frames, *self.grid), np.int32)

        def take(rows: np.ndarray, start: int, stop: int) -> np.ndarray:
            times = np.arange(start * self.frame_length, stop * self.frame_length) - self.lead
            return video[rows[:, None], times.clip(0, time - 1)]

        for rows, start, codes in self._in_steps("encode", batch, frames, take):
            ids[rows, start : start + codes.shape[1]] = codes
        if x.ndim == 4:
            return Codes(ids[:, 0])
        fits = frames * self.frame_length - self.lead == time
        return Codes(ids, sizes=None if fits else np.tile(np.array(video.shape[1:4], np.int32), (batch, 1)))

    def decode(
        self, codes: Codes | Int[np.ndarray, "batch *frames rows columns"]
    ) -> UInt8[np.ndarray, "batch *time height width 3"]:
        """Videos or pictures of codes: each video's length where the codes know it (then black), else all of them.

        Raises:
            OmniError: not codes of this tokenizer.
        """
        codes = self._checked_codes(codes)
        ids = codes.ids if codes.ids.ndim == 4 else codes.ids[:, None]
        batch, frames = ids.shape[:2]
        video = np.empty((batch, frames * self.frame_length, *self.frame_shape), np.uint8)

        def take(rows: np.ndarray, start: int, stop: int) -> np.ndarray:
            return ids[rows[:, None], np.arange(start, stop).clip(0, frames - 1)]

        for rows, start, pixels in self._in_steps("decode", batch, frames, take):
            first = start * self.frame_length
            video[rows, first : first + pixels.shape[1]] = pixels
        video = video[:, self.lead :]
        if codes.ids.ndim == 3:
            return video[:, 0]
        return video if codes.sizes is None else cropped(video, codes.sizes)

    def _in_steps(
        self, name: str, batch: int, frames: int, take: Callable[[np.ndarray, int, int], np.ndarray]
    ) -> Iterator[tuple[slice, int, np.ndarray]]:
        """What the step called `name` makes of whole videos, a few rows and a few frames of codes at a time.

        Args:
            take: (rows, start, stop) -> what goes in for these frames of codes; after the last one, anything.
        Yields:
            (rows, start, output): of these rows, from this frame of codes on.
        """
        pixels = self.frame_length * self.frame_shape[0] * self.frame_shape[1]
        together = 1 << max(1, PIXELS // pixels).bit_length() - 1  # frames of codes, of all rows
        count = min(_power_of_two(frames), together)
        number = min(_power_of_two(batch), together // count)
        step = self.step(name, number)
        lengths = np.full(number, count * (self.frame_length if name == "encode" else 1), np.int32)
        for first in range(0, batch, number):
            carried, chosen = step.begin(), np.arange(first, first + number).clip(0, batch - 1)
            for start in range(0, frames, count):
                x, fresh = take(chosen, start, start + count), np.full(number, start == 0)
                y, carried = step.run(step.weights, carried, x, lengths, fresh)
                y = np.asarray(y)
                kept = y.shape[1] // count * min(count, frames - start)
                yield slice(first, first + number), start, y[: batch - first, :kept]


class VideoStreamEncoder(StreamEncoder):
    """Video to codes: `push` takes uint8 [time, height, width, 3] of each row and gives int32 [frames, rows, columns].

    A frame's codes come with the last frame that they stand for, or where a step takes several, with that of the last
    one. `finish` lets the last frame go on until its codes are full.
    """

    dtype, dtype_out = np.uint8, np.int32
    axis = 0

    def shape_in(self, time: int) -> tuple[int, ...]:
        return (time, *self.tokenizer.frame_shape)

    def shape_out(self, time: int) -> tuple[int, ...]:
        return (time, *self.tokenizer.grid)

    def _opened(self, piece: np.ndarray) -> UInt8[np.ndarray, "lead+time height width 3"]:
        return np.concatenate([piece[:1].repeat(self.tokenizer.lead, 0), piece])

    def _closed(self, held: np.ndarray) -> UInt8[np.ndarray, "time height width 3"]:
        return np.concatenate([held, held[-1:].repeat(-len(held) % self.frame, 0)])

    def _checked_piece(self, piece: np.ndarray) -> UInt8[np.ndarray, "time height width 3"]:
        if piece.ndim != 4:
            raise OmniError(f"a piece must be [time, height, width, 3], got the shape {list(piece.shape)}")
        return self.tokenizer._checked(piece[None])[0]


class VideoStreamDecoder(StreamDecoder):
    """Codes to video: `push` takes int32 [frames, rows, columns] of each row and gives uint8 [time, height, width, 3].

    All frames that codes stand for come with them: one with the first, then as many as the stride in time.
    """

    dtype, dtype_out = np.int32, np.uint8
    axis = 0

    def shape_in(self, time: int) -> tuple[int, ...]:
        return (time, *self.tokenizer.grid)

    def shape_out(self, time: int) -> tuple[int, ...]:
        return (time, *self.tokenizer.frame_shape)

    def _checked_piece(self, piece: np.ndarray) -> Int[np.ndarray, "frames rows columns"]:
        if piece.ndim != 3:
            raise OmniError(f"codes must be [frames, rows, columns], got the shape {list(piece.shape)}")
        return self.tokenizer._checked_codes(piece[None]).ids[0]


def _power_of_two(number: int) -> int:
    """The smallest that is not below: few shapes compile."""
    return 1 << max(number - 1, 0).bit_length()
