"""EnCodec (Défossez et al. 2022, arXiv:2210.13438): SEANet around residual codebooks, at 24, 32 and 48 kHz.

The 24 kHz codec is causal; MusicGen's at 32 kHz is not. The 48 kHz codec takes stereo by chunks of a second that
overlap a little, each divided by its own loudness, which goes along as `Codes.scales`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from omni_tokenizers.codebooks import Codebook, LearnedCodebooks, ResidualCodebooks
from omni_tokenizers.codes import Codes
from omni_tokenizers.edges import silenced
from omni_tokenizers.errors import OmniError, UsageError
from omni_tokenizers.losses.audio import AudioLosses
from omni_tokenizers.quantizers import LevelledQuantizerConfig, Quantized, check_replaced
from omni_tokenizers.seanet import SEANetConfig, SEANetDecoder, SEANetEncoder
from omni_tokenizers.waveform import WaveformTokenizer, checked_lengths, whole_frames


@dataclasses.dataclass(frozen=True)
class EncodecConfig(SEANetConfig):
    """An EnCodec; the default is the public one at 24 kHz."""

    sample_rate: int = 24000
    """Samples per second."""
    codebook_size: int = 1024
    """Codes of each codebook, a power of two."""
    bandwidths: tuple[float, ...] = (1.5, 3.0, 6.0, 12.0, 24.0)
    """Rates, in kbit/s, that encode can be asked for; the last one takes all codebooks."""
    normalize: bool = False
    """Whether the sound of a chunk is divided by its loudness."""
    chunk_seconds: float = 0.0
    """Length of the chunks that are encoded apart; 0 encodes clips whole."""
    overlap: float = 0.0
    """Share of a chunk that the next one repeats."""
    quantizer: LevelledQuantizerConfig | None = None
    """What learns the codes, in place of codebook_size and bandwidths; None = codebooks that do not learn, as public
    weights bring them."""

    def __post_init__(self):
        super().__post_init__()
        check_replaced(self, ("codebook_size", "bandwidths"))
        if self.quantizer is not None and self.quantizer.dim != self.dim:
            raise UsageError(f"the quantizer takes latents of width {self.quantizer.dim}, the codec's have {self.dim}")
        bits = self.codebook_size.bit_length() - 1
        if self.codebook_size < 2 or self.codebook_size != 1 << bits or bits > 20:
            raise UsageError(f"codebook_size must be a power of two from 2 to 2^20, got {self.codebook_size}")
        if self.sample_rate < 1 or not self.bandwidths or not 1 <= self.codebooks <= 1024:
            raise UsageError(
                "sample_rate and bandwidths must be positive, and the last bandwidth give 1 to 1024 codebooks"
            )
        if not 0 <= self.chunk_seconds < 1e6 or not 0 <= self.overlap < 1 or (self.chunk_seconds and not self.chunk):
            raise UsageError("a chunk must be 0 or a sample at least, and overlap at least 0 and below 1")

    @property
    def samples_per_frame(self) -> int:
        """Samples that one frame of codes stands for."""
        return self.hop

    @property
    def frame_rate(self) -> int:
        """Frames of codes per second."""
        return math.ceil(self.sample_rate / self.hop)

    @property
    def codebooks(self) -> int:
        """Levels of the residual codebooks: the quantiser's, or what the highest bandwidth pays for."""
        if self.quantizer is not None:
            return len(self.quantizer.codebook_sizes)
        return int(1000 * self.bandwidths[-1] // (self.frame_rate * (self.codebook_size.bit_length() - 1)))

    @property
    def losses(self) -> AudioLosses:
        """What a training has where it names no others."""
        return AudioLosses()

    @property
    def chunk(self) -> int:
        """Samples of a chunk; 0 where clips are encoded whole."""
        return int(self.chunk_seconds * self.sample_rate)

    @property
    def chunk_stride(self) -> int:
        """Samples from one chunk's start to the next."""
        return max(1, int((1 - self.overlap) * self.chunk))

    @property
    def chunk_frames(self) -> int:
        """Frames that stand for a whole chunk."""
        return -(-self.chunk // self.hop)

    def spans(self, length: int) -> list[tuple[int, int]]:
        """Start and samples of each chunk of a clip of `length` samples; the last ones may be short."""
        if not self.chunk:
            return [(0, length)]
        return [(start, min(self.chunk, length - start)) for start in range(0, length, self.chunk_stride)]


class EncodecNet(nnx.Module):
    """Encoder, residual codebooks and decoder of one chunk."""

    last_layer = ("decoder", "leave")
    """Path of the layer that makes samples."""

    def __init__(self, config: EncodecConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = SEANetEncoder(config, rngs=rngs)
        if config.quantizer is None:
            books = (Codebook(config.codebook_size, config.dim, rngs=rngs) for _ in range(config.codebooks))
            self.quantizer = ResidualCodebooks(books)
        else:
            self.quantizer = LearnedCodebooks(config.quantizer, rngs=rngs)
        self.decoder = SEANetDecoder(config, rngs=rngs)

    def encode(
        self, audio: Float[Array, "batch samples channels"], lengths: Int[Array, " batch"], codebooks: int
    ) -> tuple[Int[Array, "batch codebooks frames"], Float[Array, " batch"]]:
        """Codes of the first `codebooks` levels, and what each clip was divided by."""
        latents, scales = self.latents(audio, lengths)
        return self.quantizer.encode(latents, codebooks), scales

    def latents(
        self, audio: Float[Array, "batch samples channels"], lengths: Int[Array, " batch"]
    ) -> tuple[Float[Array, "batch frames dim"], Float[Array, " batch"]]:
        """Vectors to quantise, and what each clip was divided by."""
        scales = jnp.ones(len(audio))
        if self.config.normalize:
            mono = silenced(audio, lengths).mean(2)
            scales = jnp.sqrt(jnp.square(mono).sum(1) / jnp.maximum(lengths, 1)) + 1e-8
            audio = audio / scales[:, None, None]
        return self.encoder(audio.astype(self.encoder.enter.kernel.dtype), lengths), scales

    def decode(
        self, ids: Int[Array, "batch codebooks frames"], frames: Int[Array, " batch"], scales: Float[Array, " batch"]
    ) -> Float[Array, "batch samples channels"]:
        """Sound of the first `frames` frames of codes; what follows them is undefined."""
        return self.decoder(self.quantizer.lookup(ids), frames) * scales[:, None, None]

    def autoencode(
        self,
        audio: Float[Array, "batch samples"],
        length: Int[Array, " batch"],
        key: PRNGKeyArray | None,
        *,
        training: bool,
    ) -> tuple[Float[Array, "batch padded"], Quantized]:
        """Reconstructions, in whole frames, of mono clips that are `length` samples long, and what the quantiser says;
        `training` moves its codebooks. Frames past a clip's end count in none of its statistics, and are silent.

        Raises:
            UsageError: codebooks that do not learn, or stereo.
        """
        if self.config.quantizer is None or self.config.channels != 1:
            raise UsageError("an EnCodec is trained on mono sound and with a quantizer; set those of its configuration")
        audio, mask = whole_frames(audio, length, self.config.hop)
        latents, scales = self.latents(audio[..., None], length)
        quantized = self.quantizer(latents, key, training=training, weights=mask)
        frames = mask.sum(1).astype(jnp.int32)
        estimate = silenced(self.decoder(quantized.quantized, frames), frames * self.config.hop)
        return estimate[..., 0] * scales[:, None], quantized


class EncodecTokenizer(WaveformTokenizer):
    """Sound [batch, channels, samples] to codes [batch, codebooks, frames] and back.

    Where clips are encoded by chunks, the frames of chunk i start at frame i * chunk_frames.
    """

    type = "encodec"
    config_class = EncodecConfig
    net_class = EncodecNet

    def __init__(self, config: EncodecConfig, net: EncodecNet):
        super().__init__(config, net)
        if config.quantizer is not None:
            self.codebook_sizes = config.quantizer.codebook_sizes

    @property
    def code_vectors(self) -> tuple[Float[np.ndarray, "codes code_dim"], ...]:
        """The vectors of each level's codes, float32."""
        return tuple(np.asarray(book) for book in self.net.quantizer.codebooks())

    def encode(
        self,
        x: Float[np.ndarray, "batch channels samples"],
        lengths: Int[np.ndarray, " batch"] | None = None,
        *,
        codebooks: int | None = None,
        bandwidth: float | None = None,
    ) -> Codes:
        """As `WaveformTokenizer.encode`, with scales where the codec normalises.

        Args:
            bandwidth: kbit/s, one of the configuration's, in place of a number of codebooks.
        Raises:
            OmniError: also for another bandwidth, or both it and codebooks.
        """
        audio, lengths = self._checked_audio(x, lengths)
        codebooks = self._checked_codebooks(codebooks if bandwidth is None else self._paid_for(bandwidth, codebooks))
        spans = [self.config.spans(int(length)) for length in lengths]
        clips, chunks = _pairs(spans)
        starts, sizes = np.array([span for clip in spans for span in clip]).T
        pieces = np.zeros((len(sizes), sizes.max(), self.channels), np.float32)
        for piece, clip, start, size in zip(pieces, clips, starts, sizes, strict=True):
            piece[:size] = audio[clip, start : start + size]
        found, loudness = self._encode_rows(pieces, sizes.astype(np.int32), codebooks)
        frames = -(-sizes // self.samples_per_frame)
        places = chunks * self.config.chunk_frames
        ids = np.zeros((len(audio), codebooks, (places + frames).max()), np.int32)
        for row, clip, place, count in zip(found, clips, places, frames, strict=True):
            ids[clip, :, place : place + count] = row[:, :count]
        if not self.config.normalize:
            return Codes(ids, lengths)
        scales = np.zeros((len(audio), chunks.max() + 1), np.float32)
        scales[clips, chunks] = loudness
        return Codes(ids, lengths, scales)

    def decode(
        self, codes: Codes | Int[np.ndarray, "batch codebooks frames"]
    ) -> Float[np.ndarray, "batch channels samples"]:
        """As `WaveformTokenizer.decode`; chunks are faded into one another where they overlap.

        Raises:
            OmniError: also where scales are missing or belong to other codes.
        """
        codes = self._checked_codes(codes)
        counts, lengths = self._frames(codes)
        clips, chunks = _pairs(counts)
        frames = np.array([count for clip in counts for count in clip], np.int32)
        ids = np.zeros((len(frames), codes.ids.shape[1], frames.max()), np.int32)
        for row, clip, place, count in zip(ids, clips, chunks * self.config.chunk_frames, frames, strict=True):
            row[:, :count] = codes.ids[clip, :, place : place + count]
        decoded = self._decode_rows(ids, frames, self._scales(codes, chunks.max() + 1)[clips, chunks])
        audio = np.zeros((len(counts), lengths.max(), self.channels), np.float32)
        for clip, length in enumerate(lengths):
            rows = np.flatnonzero(clips == clip)
            pieces = [decoded[row, : frames[row] * self.samples_per_frame] for row in rows]
            audio[clip, :length] = faded(pieces, self.config.chunk_stride)[:length]
        return np.ascontiguousarray(audio.swapaxes(1, 2))

    def _paid_for(self, bandwidth: float, codebooks: int | None) -> int:
        """How many codebooks a bandwidth pays for."""
        if self.config.quantizer is not None:
            raise OmniError(f"this codec knows no bandwidths; ask for 1 to {self.codebooks} codebooks")
        if codebooks is not None or bandwidth not in self.config.bandwidths:
            known = ", ".join(f"{value:g}" for value in self.config.bandwidths)
            raise OmniError(f"give either codebooks or a bandwidth of {known} kbit/s; got {codebooks} and {bandwidth}")
        bits = self.config.codebook_size.bit_length() - 1
        return max(1, math.floor(bandwidth * 1000 / (bits * self.config.frame_rate)))

    def _frames(self, codes: Codes) -> tuple[list[list[int]], Int[np.ndarray, " batch"]]:
        """Frames of each chunk of each clip, and samples of each clip."""
        batch, _, total = codes.ids.shape
        each = self.config.chunk_frames or total
        present = [each] * ((total - 1) // each) + [(total - 1) % each + 1]
        ends = [
            index * self.config.chunk_stride + count * self.samples_per_frame for index, count in enumerate(present)
        ]
        whole = np.full(batch, max(ends), np.int32)
        if codes.lengths is None:
            return [present] * batch, whole
        lengths = checked_lengths(codes.lengths, whole)
        counts = [
            [-(-size // self.samples_per_frame) for _, size in self.config.spans(int(length))] for length in lengths
        ]
        if any(
            len(count) > len(present) or (len(count) == len(present) and count[-1] > present[-1]) for count in counts
        ):
            raise OmniError(f"{total} frames are too few for clips of {lengths.max()} samples")
        return counts, lengths

    def _scales(self, codes: Codes, chunks: int) -> Float[np.ndarray, "batch chunks"]:
        """What each chunk is multiplied by."""
        if not self.config.normalize:
            return np.ones((len(codes), chunks), np.float32)
        if codes.scales is None:
            raise OmniError("these codes need scales: pass the Codes that encode returned, or Codes(ids, scales=...)")
        scales = np.asarray(codes.scales)
        if scales.shape != (len(codes), chunks) or scales.dtype.kind != "f" or not np.isfinite(scales).all():
            raise OmniError(
                f"scales must be finite floating point [{len(codes)}, {chunks}] for these codes, "
                f"got {scales.dtype} {list(scales.shape)}"
            )
        return scales.astype(np.float32)


def faded(chunks: Sequence[Float[np.ndarray, "_ channels"]], stride: int) -> Float[np.ndarray, "samples channels"]:
    """Chunks, each `stride` after the one before, averaged where they overlap.

    The weights rise and fall in a triangle over the first chunk's length, so that one chunk fades into the next.
    """
    if len(chunks) == 1:
        return chunks[0]
    size = len(chunks[0])
    triangle = np.minimum(np.arange(1, size + 1), np.arange(size, 0, -1)).astype(np.float32)[:, None]
    ends = [index * stride + len(chunk) for index, chunk in enumerate(chunks)]
    total, weight = np.zeros((max(ends), chunks[0].shape[1]), np.float32), np.zeros((max(ends), 1), np.float32)
    for index, (chunk, end) in enumerate(zip(chunks, ends, strict=True)):
        total[index * stride : end] += triangle[: len(chunk)] * chunk
        weight[index * stride : end] += triangle[: len(chunk)]
    return total / weight


def _pairs(items: Sequence[Sequence]) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Clip and chunk of each item of nested sequences."""
    clips, chunks = np.array([(clip, chunk) for clip, row in enumerate(items) for chunk in range(len(row))]).T
    return clips, chunks
