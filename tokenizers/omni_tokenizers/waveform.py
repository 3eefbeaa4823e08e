"""What tokenizers share whose nets read and write samples: checks, shapes that repeat, and batches that fit memory."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from omni_tokenizers.codes import Codes, as_codes
from omni_tokenizers.errors import OmniError
from omni_tokenizers.streaming import StreamingCodec

_SAMPLES = 1 << 20  # that go through a net together: some 100 MB in each of its widest layers


class WaveformTokenizer(StreamingCodec):
    """Sound [batch, channels, samples] to codes [batch, codebooks, frames] and back.

    The configuration has sample_rate, channels, codebooks, codebook_size and samples_per_frame; the net has
    ``encode(audio, lengths, codebooks)`` and ``decode(ids, frames)`` over [batch, samples, channels], in which no clip
    depends on its neighbours or on what follows its end.
    """

    modality = "audio"
    fewest_codebooks = 1
    """Codebooks that codes have at the least."""

    def __init__(self, config, net: nnx.Module):
        super().__init__(config, net)
        self.sample_rate = config.sample_rate
        self.channels = config.channels
        self.samples_per_frame = config.samples_per_frame
        self.codebooks = config.codebooks
        self.codebook_sizes = (config.codebook_size,) * config.codebooks
        self._encode = jax.jit(
            lambda state, *args, codebooks: nnx.merge(self.graphdef, state).encode(*args, codebooks),
            static_argnames="codebooks",
        )
        self._decode = jax.jit(lambda state, *args: nnx.merge(self.graphdef, state).decode(*args))

    def encode(
        self,
        x: Float[np.ndarray, "batch channels samples"],
        lengths: Int[np.ndarray, " batch"] | None = None,
        *,
        codebooks: int | None = None,
    ) -> Codes:
        """Codes of sound at `sample_rate`; a clip in a padded batch has the codes that it has alone.

        Args:
            lengths: samples of each clip, where several lengths are padded to one; frames past a clip's end get 0.
            codebooks: how many, from the first on; all where None.
        Raises:
            OmniError: wrong rank or channels, nothing in it, not floating point, NaN or infinity, or lengths or a
                number of codebooks that do not fit.
        """
        audio, lengths = self._checked_audio(x, lengths)
        ids = self._encode_rows(audio, lengths, self._checked_codebooks(codebooks))
        frames = self.frames(lengths)
        return Codes(_zero_after(ids[..., : frames.max()], frames), lengths)

    def decode(
        self, codes: Codes | Int[np.ndarray, "batch codebooks frames"]
    ) -> Float[np.ndarray, "batch channels samples"]:
        """Sound of codes: each clip's length where the codes know it (then silence), else whole frames.

        Fewer codebooks than encode gives are the coarser sound.

        Raises:
            OmniError: not codes of this tokenizer.
        """
        codes = self._checked_codes(codes)
        whole = np.full(len(codes), codes.ids.shape[2] * self.samples_per_frame, np.int32)
        lengths = whole if codes.lengths is None else checked_lengths(codes.lengths, whole)
        audio = self._decode_rows(codes.ids, -(-lengths // self.samples_per_frame))
        return np.ascontiguousarray(_zero_after(audio[:, : lengths.max()].swapaxes(1, 2), lengths))

    def frames(self, lengths: Int[np.ndarray, " batch"]) -> Int[np.ndarray, " batch"]:
        """Frames of codes that clips of these samples take."""
        return -(-lengths // self.samples_per_frame)

    @property
    def obstacle(self) -> str | None:
        return "its frames see what comes after them"

    @staticmethod
    def _encode_step(net, audio, lengths, *, codebooks):
        return net.encode(audio.swapaxes(1, 2), lengths, codebooks)

    @staticmethod
    def _decode_step(net, ids, frames):
        return net.decode(ids, frames).swapaxes(1, 2)

    def _encode_rows(self, audio: Float[np.ndarray, "rows samples channels"], lengths, codebooks: int) -> Any:
        """What the net's encode gives for rows of sound, over the frames of their bucket."""
        samples = bucket(-(-int(lengths.max()) // self.samples_per_frame)) * self.samples_per_frame
        audio = audio[:, :samples]
        audio = np.pad(audio, ((0, 0), (0, samples - audio.shape[1]), (0, 0)))
        encode = functools.partial(self._encode, codebooks=codebooks)
        return self._in_chunks(encode, audio, lengths, rows=_rows(samples))

    def _decode_rows(
        self, ids: Int[np.ndarray, "rows codebooks frames"], *besides: np.ndarray
    ) -> Float[np.ndarray, "rows samples channels"]:
        """What the net's decode gives for rows of codes, over the samples of their bucket."""
        size = bucket(ids.shape[2])
        ids = np.pad(ids, ((0, 0), (0, 0), (0, size - ids.shape[2])))
        return self._in_chunks(self._decode, ids, *besides, rows=_rows(size * self.samples_per_frame))

    def _checked_audio(
        self, x, lengths
    ) -> tuple[Float[np.ndarray, "batch samples channels"], Int[np.ndarray, " batch"]]:
        """Sound as float32 with channels last, silent past each clip's end, and the lengths; or an OmniError."""
        x = checked_audio(x)
        if x.shape[1] != self.channels:
            raise OmniError(f"sound must be [batch, {self.channels}, samples] for this tokenizer, got {list(x.shape)}")
        present = np.full(len(x), x.shape[2], np.int32)
        lengths = present if lengths is None else checked_lengths(lengths, present)
        return x.swapaxes(1, 2)[:, : lengths.max()], lengths

    def _checked_chunk(self, chunk) -> Float[np.ndarray, "channels samples"]:
        return self._checked_audio(chunk[None], None)[0][0].T

    def _checked_codebooks(self, number: int | None) -> int:
        number = self.codebooks if number is None else number
        if not isinstance(number, int | np.integer) or not self.fewest_codebooks <= number <= self.codebooks:
            raise OmniError(f"this tokenizer has {self.fewest_codebooks} to {self.codebooks} codebooks, not {number!r}")
        return int(number)

    def _checked_codes(self, codes) -> Codes:
        codes = as_codes(codes, axes=("batch", "codebooks", "frames"), size=self.codebook_sizes[0])
        if not codes.ids.size or not self.fewest_codebooks <= codes.ids.shape[1] <= self.codebooks:
            raise OmniError(
                f"codes must be [batch, {self.fewest_codebooks} to {self.codebooks}, frames] and not empty, "
                f"got {list(codes.ids.shape)}"
            )
        return codes


def whole_frames(
    audio: Float[Array, "batch samples"], length: Int[Array, " batch"], step: int
) -> tuple[Float[Array, "batch padded"], Float[Array, "batch frames"]]:
    """Audio in whole frames of `step` samples, silenced past each clip's end, and 1 for the frames that a clip has."""
    audio = jnp.where(jnp.arange(audio.shape[1]) < length[:, None], audio, 0)
    audio = jnp.pad(audio, ((0, 0), (0, -audio.shape[1] % step)))
    starts = jnp.arange(audio.shape[1] // step) * step
    return audio, (starts < length[:, None]).astype(jnp.float32)


def bucket(frames: int) -> int:
    """Frames padded to: 2, 4, 6 ... 32, 36, 40 ... 64, 72 ..., so that few shapes compile and little is wasted."""
    step = 1 << max((frames - 1).bit_length() - 4, 1)
    return -(-frames // step) * step


def checked_audio(x) -> Float[np.ndarray, "batch channels samples"]:
    """`x` as float32, or an OmniError."""
    x = np.asarray(x)
    if x.ndim != 3 or x.dtype.kind != "f":
        raise OmniError(f"sound must be floating point [batch, channels, samples], got {x.dtype} {list(x.shape)}")
    if not x.size:
        raise OmniError(f"sound must not be empty, got the shape {list(x.shape)}")
    with np.errstate(over="ignore"):
        x = x.astype(np.float32)
    if not np.isfinite(x).all():
        raise OmniError("sound holds NaN or infinity; repair the file or leave it out")
    return x


def checked_lengths(lengths, present: Int[np.ndarray, " batch"]) -> Int[np.ndarray, " batch"]:
    """`lengths` as int32, or an OmniError if they are not 1 to the samples that are present."""
    lengths = np.asarray(lengths)
    if lengths.shape != present.shape or lengths.dtype.kind not in "iu":
        raise OmniError(f"lengths must be {len(present)} integers, got {lengths.dtype} {list(lengths.shape)}")
    if lengths.min() < 1 or (lengths > present).any():
        raise OmniError(f"lengths must lie in 1 to {present.max()}, got {lengths.min()} to {lengths.max()}")
    return lengths.astype(np.int32)


def _rows(samples: int) -> int:
    """How many rows go through a net together: a power of two."""
    return 1 << max(_SAMPLES // samples, 1).bit_length() - 1


def _zero_after(x: np.ndarray, ends: Int[np.ndarray, " batch"]) -> np.ndarray:
    """`x` with 0 from each row's end on, along the last axis."""
    inside = np.arange(x.shape[-1]) < ends.reshape(-1, *[1] * (x.ndim - 1))
    return np.where(inside, x, x.dtype.type(0))
