"""Spectral audio codec: log-mel frames, frame convolutions, residual quantisation, and an inverse-Fourier head.

The shape is that of Vocos (Siuzdak 2023, arXiv:2306.00814) and WavTokenizer (Ji et al. 2024, arXiv:2408.16532): only
Fourier transforms run at the sample rate, so the codec is matrix products over frames, and trains on a CPU in minutes.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Complex, Float, Int

from omni_tokenizers.carried import Overlap, Past
from omni_tokenizers.codes import Codes, as_codes
from omni_tokenizers.errors import OmniError, UsageError
from omni_tokenizers.layers import Linear
from omni_tokenizers.losses.audio import AudioLosses
from omni_tokenizers.quantizers import (
    LevelledQuantizerConfig,
    Quantized,
    ResidualQuantizerConfig,
    VectorQuantizerConfig,
    check_replaced,
    make_quantizer,
)
from omni_tokenizers.spectral import analysis, istft, log_mel, stft, synthesis
from omni_tokenizers.streaming import StreamingCodec
from omni_tokenizers.waveform import checked_audio, checked_lengths, whole_frames


@dataclass(frozen=True)
class AudioTokenizerConfig:
    """Shape and losses of a spectral codec; the defaults make 50 tokens a second of 16 kHz sound."""

    sample_rate: int = 16000
    """Samples per second."""
    hop: int = 320
    """Samples from one spectral frame to the next."""
    window: int = 640
    """Samples under a spectral frame's window; an even multiple of hop."""
    mels: int = 80
    """Mel bands that the encoder sees."""
    dim: int = 128
    """Width of the convolution blocks."""
    encoder_blocks: int = 2
    """Convolution blocks before the quantiser."""
    decoder_blocks: int = 4
    """Convolution blocks after it."""
    downsample: int = 2
    """Spectral frames in one frame of codes."""
    codebooks: int = 2
    """Levels of the residual quantiser: tokens of one frame of codes."""
    codebook_size: int = 256
    """Codes of each level."""
    code_dim: int = 16
    """Width of a code vector."""
    loss_windows: tuple[int, ...] = (256, 512, 1024, 2048)
    """Windows, in samples, at which reconstruction and original are compared; each has hops of a quarter."""
    loss_mels: tuple[int, ...] = (20, 40, 80, 120)
    """Mel bands of each of these windows."""
    magnitude_weight: float = 1.0
    """Weight of the difference of magnitudes beside that of log-mels."""
    complex_weight: float = 0.1
    """Weight of the difference of complex spectra, which alone sees the phase."""
    quantizer: LevelledQuantizerConfig | None = None
    """Another quantiser, in place of codebooks, codebook_size and code_dim; None = residual levels of these."""
    causal: bool | None = None
    """Whether a frame depends only on sound up to its end, so that the codec can stream; None = no."""

    def __post_init__(self):
        if self.hop < 1 or self.window % (2 * self.hop) or self.window < 2 * self.hop:
            raise UsageError(f"window must be an even multiple of hop, got {self.window} and {self.hop}")
        check_replaced(self, ("codebooks", "codebook_size", "code_dim"))
        if min(self.downsample, self.codebooks, self.dim, self.mels, self.sample_rate) < 1:
            raise UsageError("sample_rate, mels, dim, downsample and codebooks must be at least 1")
        _ = self.chosen_quantizer  # checks its own settings
        _ = self.losses  # so do they

    @property
    def samples_per_frame(self) -> int:
        """Samples that one frame of codes stands for."""
        return self.hop * self.downsample

    @property
    def delay(self) -> int:
        """Samples by which the sound of a causal codec lags behind its codes: frames that end later add to them."""
        return self.window - self.hop

    @property
    def closing_frames(self) -> int:
        """Frames after the last one of codes that a causal codec takes to complete its sound."""
        return -(-self.delay // self.samples_per_frame)

    @property
    def losses(self) -> AudioLosses:
        """What a training has where it names no others."""
        return AudioLosses(
            self.loss_windows, self.loss_mels, magnitude=self.magnitude_weight, complex=self.complex_weight
        )

    @property
    def chosen_quantizer(self) -> LevelledQuantizerConfig:
        """The quantiser's configuration."""
        if self.quantizer is not None:
            return self.quantizer
        return ResidualQuantizerConfig(self.codebooks, VectorQuantizerConfig(self.codebook_size, self.code_dim))


class FrameBlock(nnx.Module):
    """Residual block over frames: RMS norm, convolution of width 3 as one matrix product, GELU, projection.

    The convolution multiplies three neighbours laid side by side: twice the speed of XLA's convolution on a CPU. They
    are a frame with those before and after it, or with the two before it if `causal`.
    """

    def __init__(self, dim: int, *, causal: bool, rngs: nnx.Rngs):
        self.past = Past(2, dim) if causal else nnx.data(None)
        self.norm = nnx.RMSNorm(dim, rngs=rngs)
        self.convolution = Linear(3 * dim, dim, rngs=rngs)
        self.projection = Linear(dim, dim, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch frames dim"], mask: Float[Array, "batch frames 1"]
    ) -> Float[Array, "batch frames dim"]:
        padded = self.norm(x) * mask
        if self.past is None:
            padded = jnp.pad(padded, ((0, 0), (1, 1), (0, 0)))
        else:
            padded = self.past(padded, _count(mask[..., 0]))
        neighbours = jnp.concatenate([padded[:, i : i + x.shape[1]] for i in range(3)], axis=-1)
        return x + self.projection(nnx.gelu(self.convolution(neighbours)))


class SpectralCodec(nnx.Module):
    """The codec's network. Frames past a clip's end are masked in every block, so padding changes nothing."""

    last_layer = ("head",)
    """Path of the layer that makes spectra."""

    def __init__(self, config: AudioTokenizerConfig, *, rngs: nnx.Rngs):
        self.config = config
        dim, grouped, causal = config.dim, config.dim * config.downsample, bool(config.causal)
        self.past, self.overlap = Past(config.delay), Overlap(config.delay)
        self.enter = Linear(config.mels, dim, rngs=rngs)
        self.encoder = nnx.List([FrameBlock(dim, causal=causal, rngs=rngs) for _ in range(config.encoder_blocks)])
        self.down = Linear(grouped, config.chosen_quantizer.dim, rngs=rngs)
        self.quantizer = make_quantizer(config.chosen_quantizer, rngs=rngs)
        self.up = Linear(config.chosen_quantizer.dim, grouped, rngs=rngs)
        self.decoder = nnx.List([FrameBlock(dim, causal=causal, rngs=rngs) for _ in range(config.decoder_blocks)])
        self.norm = nnx.RMSNorm(dim, rngs=rngs)
        self.head = Linear(dim, 3 * (config.window // 2 + 1), rngs=rngs)

    def latents(
        self, audio: Float[Array, "batch samples"], mask: Float[Array, "batch frames"]
    ) -> Float[Array, "batch frames code_dim"]:
        """Vectors to quantise, one a frame of codes; `samples` = frames * samples_per_frame."""
        config = self.config
        if config.causal:
            audio = self.past(audio, _count(mask) * config.samples_per_frame)
            spectrum = analysis(audio, config.window, config.hop)
        else:
            spectrum = stft(audio, config.window, config.hop)
        inner = jnp.repeat(mask, config.downsample, axis=1)[..., None]
        mel = log_mel(spectrum, config.sample_rate, config.mels)
        x = self.enter(mel.astype(self.enter.kernel.dtype))
        inner = inner.astype(x.dtype)
        for block in self.encoder:
            x = block(x, inner)
        return self.down(x.reshape(*mask.shape, -1))

    def synthesize(
        self, vectors: Float[Array, "batch frames code_dim"], mask: Float[Array, "batch frames"]
    ) -> Float[Array, "batch samples"]:
        """Sound of quantised vectors; `samples` = frames * samples_per_frame, 0 where the mask is.

        If causal, frames of zeros follow each clip, so that its last samples lie under as many windows as all others.
        A stream brings these frames itself, and its samples are those from `delay` before the frames on.
        """
        config = self.config
        if not config.causal:
            inner = jnp.repeat(mask, config.downsample, axis=1)
            return istft(self.spectrum(vectors, mask), config.window, config.hop, inner)
        frames = _count(mask)
        if self.overlap.carried is not None:
            spectrum = self.spectrum(vectors, mask) * jnp.repeat(mask, config.downsample, axis=1)[..., None]
            sums = synthesis(spectrum, config.window, config.hop)
            return self.overlap(sums, frames * config.samples_per_frame)
        closed = jnp.where(frames > 0, frames + config.closing_frames, 0)
        vectors = jnp.pad(vectors * mask[..., None].astype(vectors.dtype), ((0, 0), (0, config.closing_frames), (0, 0)))
        inside = (jnp.arange(vectors.shape[1]) < closed[:, None]).astype(jnp.float32)
        sound = synthesis(self.spectrum(vectors, inside), config.window, config.hop)[:, config.delay :]
        covered = jnp.repeat(mask, config.samples_per_frame, axis=1)
        return sound[:, : covered.shape[1]] * covered

    def spectrum(
        self, vectors: Float[Array, "batch frames code_dim"], mask: Float[Array, "batch frames"]
    ) -> Complex[Array, "batch frames*downsample bins"]:
        """What the Fourier head makes of quantised vectors."""
        config = self.config
        inner = jnp.repeat(mask, config.downsample, axis=1)
        x = self.up(vectors).reshape(*inner.shape, config.dim)
        for block in self.decoder:
            x = block(x, inner[..., None].astype(x.dtype))
        level, cosine, sine = jnp.split(self.head(self.norm(x)).astype(jnp.float32), 3, axis=-1)
        # A full-scale constant reaches window / 2 under a Hann window: no bin of a sound within [-1, 1] is larger.
        size = jnp.exp(jnp.minimum(level, np.log(config.window / 2)))
        norm = jax.lax.rsqrt(jnp.square(cosine) + jnp.square(sine) + 1e-6)
        return size * jax.lax.complex(cosine * norm, sine * norm)

    def encode(
        self, audio: Float[Array, "batch samples"], length: Int[Array, " batch"]
    ) -> Int[Array, "batch codebooks frames"]:
        """Codes of clips that are `length` samples long; 0 in frames past their ends."""
        audio, mask = self.prepare(audio, length)
        codes = self.quantizer(self.latents(audio, mask), None, training=False, weights=mask).codes
        return jnp.swapaxes(jnp.where(mask[..., None] > 0, codes, 0), 1, 2)

    def decode(
        self, codes: Int[Array, "batch codebooks frames"], frames: Int[Array, " batch"]
    ) -> Float[Array, "batch samples"]:
        """Sound of the first `frames` frames of codes, 0 after them; codes -1 are the zeros that end a stream."""
        mask = (jnp.arange(codes.shape[-1]) < frames[:, None]).astype(jnp.float32)
        vectors = self.quantizer.lookup(jnp.swapaxes(codes, 1, 2))
        if self.config.causal:
            vectors = jnp.where(codes[:, 0, :, None] < 0, 0, vectors)
        return self.synthesize(vectors, mask)

    def prepare(
        self, audio: Float[Array, "batch samples"], length: Int[Array, " batch"]
    ) -> tuple[Float[Array, "batch padded"], Float[Array, "batch frames"]]:
        """As `whole_frames`."""
        return whole_frames(audio, length, self.config.samples_per_frame)

    def autoencode(
        self, audio: Float[Array, "batch samples"], length: Int[Array, " batch"], key: Array | None, *, training: bool
    ) -> tuple[Float[Array, "batch padded"], Quantized]:
        """Reconstructions, in whole frames, of clips within [-1, 1] that are `length` samples long, and what the
        quantiser says; `training` moves its codebooks. Frames past a clip's end count in none of its statistics."""
        audio, mask = self.prepare(audio, length)
        quantized = self.quantizer(self.latents(audio, mask), key, training=training, weights=mask)
        return self.synthesize(quantized.quantized, mask), quantized


class AudioTokenizer(StreamingCodec):
    """Sound to codes and back."""

    type = "audio_spectral"
    modality = "audio"
    config_class = AudioTokenizerConfig
    net_class = SpectralCodec
    encoding = ("past", "encoder")
    decoding = ("decoder", "overlap")
    channels = 1
    """Channels that decode gives."""

    def __init__(self, config: AudioTokenizerConfig, net: SpectralCodec):
        super().__init__(config, net)
        self.sample_rate = config.sample_rate
        self.samples_per_frame = config.samples_per_frame
        self.codebook_sizes = config.chosen_quantizer.codebook_sizes
        self.codebooks = len(self.codebook_sizes)
        self.delay, self.closing_frames = config.delay, config.closing_frames
        self._encode = jax.jit(lambda state, *args: nnx.merge(self.graphdef, state).encode(*args))
        self._decode = jax.jit(lambda state, *args: nnx.merge(self.graphdef, state).decode(*args))

    @property
    def code_vectors(self) -> tuple[Float[np.ndarray, "codes code_dim"], ...]:
        """The vectors of each level's codes, float32."""
        return tuple(np.asarray(book) for book in self.net.quantizer.codebooks())

    def frames(self, lengths: Int[np.ndarray, " batch"]) -> Int[np.ndarray, " batch"]:
        """Frames of codes that clips of these samples take."""
        return -(-lengths // self.samples_per_frame)

    def encode(
        self, x: Float[np.ndarray, "batch channels samples"], lengths: Int[np.ndarray, " batch"] | None = None
    ) -> Codes:
        """Codes [batch, codebooks, frames] of sound within [-1, 1] at `sample_rate`; channels are averaged.

        Args:
            lengths: samples of each clip, where several lengths are padded to one; frames past a clip's end get 0.
        Raises:
            OmniError: wrong rank, nothing in it, not floating point, NaN or infinity, or lengths that do not fit.
        """
        audio = checked_audio(x).mean(axis=1)
        present = np.full(len(audio), audio.shape[1], np.int32)
        lengths = present if lengths is None else checked_lengths(lengths, present)
        frames = -(-int(lengths.max()) // self.samples_per_frame)
        samples = _bucket(frames) * self.samples_per_frame
        audio = audio[:, :samples]
        audio = np.pad(audio, ((0, 0), (0, samples - audio.shape[1])))
        ids = self._in_chunks(self._encode, audio, lengths)
        return Codes(ids[..., :frames], lengths)

    def decode(self, codes: Codes | Int[np.ndarray, "batch codebooks frames"]) -> Float[np.ndarray, "batch 1 samples"]:
        """Sound within [-1, 1]: each clip's length where the codes know it (then silence), else whole frames.

        Raises:
            OmniError: not codes of this tokenizer.
        """
        codes = self._checked_codes(codes)
        batch, _, frames = codes.ids.shape
        step = self.samples_per_frame
        whole = np.full(batch, frames * step, np.int32)
        lengths = whole if codes.lengths is None else checked_lengths(codes.lengths, whole)
        ids = np.pad(codes.ids, ((0, 0), (0, 0), (0, _bucket(frames) - frames)))
        audio = self._in_chunks(self._decode, ids, -(-lengths // step))[:, : lengths.max()]
        audio[np.arange(audio.shape[1]) >= lengths[:, None]] = 0
        return np.clip(audio, -1, 1)[:, None]

    @property
    def obstacle(self) -> str | None:
        return None if self.config.causal else "its frames see what comes after them"

    @staticmethod
    def _encode_step(net, audio, lengths, *, codebooks):
        return net.encode(audio[:, 0], lengths)

    @staticmethod
    def _decode_step(net, ids, frames):
        return jnp.clip(net.decode(ids, frames), -1, 1)[:, None]

    def _checked_codebooks(self, number: int | None) -> int:
        if number not in (None, self.codebooks):
            raise OmniError(f"this tokenizer has {self.codebooks} codebooks, of which none can be left out")
        return self.codebooks

    def _checked_chunk(self, chunk) -> Float[np.ndarray, "1 samples"]:
        return checked_audio(chunk[None]).mean(axis=1)

    def _checked_codes(self, codes) -> Codes:
        codes = as_codes(codes, axes=("batch", "codebooks", "frames"), size=self.codebook_sizes[0])
        if codes.ids.shape[1] != self.codebooks or not codes.ids.size:
            raise OmniError(
                f"codes must be [batch, {self.codebooks}, frames] and not empty, got {list(codes.ids.shape)}"
            )
        return codes


def _count(mask: Float[Array, "batch frames"]) -> Int[Array, " batch"]:
    """Frames that a clip has."""
    return mask.sum(1).astype(jnp.int32)


def _bucket(frames: int) -> int:
    """Frames padded to: powers of two from 16 on, so that few shapes compile."""
    return max(16, 1 << (frames - 1).bit_length())
