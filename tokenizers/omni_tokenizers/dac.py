"""DAC, the Descript audio codec (Kumar et al. 2023, arXiv:2306.06546), at 16, 24 and 44.1 kHz.

Convolutions see zeros beyond both edges. Latents are compared with codes by direction, in a few dimensions.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from omni_tokenizers.codebooks import Codebook, ResidualCodebooks
from omni_tokenizers.edges import PaddedConv1d, TrimmedConvTranspose1d, silenced
from omni_tokenizers.errors import UsageError
from omni_tokenizers.layers import Conv1d
from omni_tokenizers.quantizers import nearest
from omni_tokenizers.waveform import WaveformTokenizer

# Bounds for descriptions that come with files from elsewhere.
_LARGEST = 1 << 20
_DEEPEST = 64


@dataclasses.dataclass(frozen=True)
class DacConfig:
    """A DAC; the default has the sizes of the public one at 44.1 kHz."""

    sample_rate: int = 44100
    """Samples per second."""
    filters: int = 64
    """Channels after the encoder's first convolution; each stride doubles them."""
    decoder_filters: int = 1536
    """Channels after the decoder's first convolution; each stride halves them."""
    strides: tuple[int, ...] = (2, 4, 8, 8)
    """Downsampling of each stage of the encoder, from the samples on; the decoder mirrors it."""
    codebooks: int = 9
    """Levels of the residual codebooks."""
    codebook_size: int = 1024
    """Codes of each codebook."""
    code_dim: int = 8
    """Width of a code vector."""

    def __post_init__(self):
        sizes = (self.sample_rate, self.filters, self.codebooks, self.codebook_size, self.code_dim)
        if not self.strides or min(sizes) < 1 or min(self.strides) < 2:
            raise UsageError("sample_rate, filters and codebooks must be positive, and strides at least 2")
        if len(self.strides) > _DEEPEST or max(*sizes, self.dim, self.decoder_filters, *self.strides) > _LARGEST:
            raise UsageError(f"sizes go up to {_LARGEST}, strides up to {_DEEPEST} of them")
        if self.decoder_filters < 1 or self.decoder_filters % (1 << len(self.strides)):
            raise UsageError(f"decoder_filters must halve {len(self.strides)} times, got {self.decoder_filters}")

    @property
    def channels(self) -> int:
        """Channels of the sound."""
        return 1

    @property
    def dim(self) -> int:
        """Width of a latent."""
        return self.filters << len(self.strides)

    @property
    def samples_per_frame(self) -> int:
        """Samples that one frame of codes stands for."""
        return math.prod(self.strides)


class Snake(nnx.Module):
    """x + sin^2(a x) / a with an a for each channel (Ziyin et al. 2020, arXiv:2006.08195, equation 1)."""

    def __init__(self, channels: int):
        self.frequency = nnx.Param(jnp.ones((1, 1, channels)))

    def __call__(self, x: Float[Array, "batch time channels"]) -> Float[Array, "batch time channels"]:
        frequency = self.frequency[...]
        return x + jnp.square(jnp.sin(frequency * x)) / (frequency + 1e-9)


class ResidualUnit(nnx.Module):
    """x + conv(snake(conv(snake(x)))): the first convolution is dilated, the second has width 1."""

    def __init__(self, channels: int, dilation: int, *, rngs: nnx.Rngs):
        self.enter = Snake(channels)
        self.mix = _convolution(channels, channels, 7, dilation=dilation, rngs=rngs)
        self.within = Snake(channels)
        self.out = _convolution(channels, channels, 1, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch time channels"], lengths: Int[Array, " batch"]
    ) -> Float[Array, "batch time channels"]:
        return x + self.out(self.within(self.mix(self.enter(x), lengths)), lengths)


class EncoderStage(nnx.Module):
    """Residual units, then a strided convolution to twice the channels."""

    def __init__(self, channels: int, stride: int, *, rngs: nnx.Rngs):
        self.units = nnx.List([ResidualUnit(channels, dilation, rngs=rngs) for dilation in (1, 3, 9)])
        self.snake = Snake(channels)
        self.down = _convolution(channels, 2 * channels, 2 * stride, stride=stride, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch time channels"], lengths: Int[Array, " batch"]
    ) -> tuple[Float[Array, "batch frames outputs"], Int[Array, " batch"]]:
        for unit in self.units:
            x = unit(x, lengths)
        return self.down(self.snake(x), lengths), self.down.frames(lengths)


class DecoderStage(nnx.Module):
    """A transposed convolution to half the channels, then residual units.

    An odd stride loses a sample of each clip: the codec cuts as much on the right as on the left.
    """

    def __init__(self, channels: int, stride: int, *, rngs: nnx.Rngs):
        self.snake = Snake(2 * channels)
        self.up = TrimmedConvTranspose1d(2 * channels, channels, 2 * stride, stride=stride, causal=False, rngs=rngs)
        self.units = nnx.List([ResidualUnit(channels, dilation, rngs=rngs) for dilation in (1, 3, 9)])

    def __call__(
        self, x: Float[Array, "batch frames inputs"], lengths: Int[Array, " batch"]
    ) -> tuple[Float[Array, "batch time channels"], Int[Array, " batch"]]:
        stride = self.up.stride
        x, lengths = self.up(self.snake(x), lengths), lengths * stride - stride % 2
        for unit in self.units:
            x = unit(x, lengths)
        return x, lengths


class DirectionCodebook(Codebook):
    """Compares latents with vectors by direction, in a space of its own (Yu et al. 2021, arXiv:2110.04627).

    A code stands for its vector as it is, not for its direction.
    """

    def __init__(self, codes: int, code_dim: int, dim: int, *, rngs: nnx.Rngs):
        super().__init__(codes, code_dim, rngs=rngs)
        self.enter = Conv1d(dim, code_dim, 1, rngs=rngs)
        self.leave = Conv1d(code_dim, dim, 1, rngs=rngs)

    def encode(self, latents: Float[Array, "batch frames dim"]) -> Int[Array, "batch frames"]:
        """The code of the nearest direction for each latent."""
        inner = self.enter(latents)
        codes, _ = nearest(_direction(inner.reshape(-1, inner.shape[-1])), _direction(self.codebook()))
        return codes.reshape(latents.shape[:-1])

    def lookup(self, codes: Int[Array, "batch frames"]) -> Float[Array, "batch frames dim"]:
        """What each code stands for among the latents."""
        return self.leave(super().lookup(codes))


class DacNet(nnx.Module):
    """Encoder, residual codebooks and decoder."""

    def __init__(self, config: DacConfig, *, rngs: nnx.Rngs):
        self.config = config
        stages = list(enumerate(config.strides))
        self.enter = _convolution(1, config.filters, 7, rngs=rngs)
        self.encoder = nnx.List([EncoderStage(config.filters << i, stride, rngs=rngs) for i, stride in stages])
        self.encoder_snake = Snake(config.dim)
        self.to_latent = _convolution(config.dim, config.dim, 3, rngs=rngs)
        self.quantizer = ResidualCodebooks(
            DirectionCodebook(config.codebook_size, config.code_dim, config.dim, rngs=rngs)
            for _ in range(config.codebooks)
        )
        self.from_latent = _convolution(config.dim, config.decoder_filters, 7, rngs=rngs)
        self.decoder = nnx.List(
            [
                DecoderStage(config.decoder_filters >> i + 1, stride, rngs=rngs)
                for i, stride in enumerate(config.strides[::-1])
            ]
        )
        last = config.decoder_filters >> len(stages)
        self.decoder_snake = Snake(last)
        self.leave = _convolution(last, 1, 7, rngs=rngs)

    def encode(
        self, audio: Float[Array, "batch samples 1"], lengths: Int[Array, " batch"], codebooks: int
    ) -> Int[Array, "batch codebooks frames"]:
        """Codes of the first `codebooks` levels; a clip's last frame is filled with silence, as in the original."""
        step = self.config.samples_per_frame
        x, lengths = silenced(audio, lengths), -(-lengths // step) * step
        x = self.enter(x, lengths)
        for stage in self.encoder:
            x, lengths = stage(x, lengths)
        return self.quantizer.encode(self.to_latent(self.encoder_snake(x), lengths), codebooks)

    def decode(
        self, ids: Int[Array, "batch codebooks frames"], frames: Int[Array, " batch"]
    ) -> Float[Array, "batch samples 1"]:
        """Sound of the first `frames` frames of codes, then silence, which begins early by what odd strides lose."""
        x, lengths = self.from_latent(self.quantizer.lookup(ids), frames), frames
        for stage in self.decoder:
            x, lengths = stage(x, lengths)
        return silenced(jnp.tanh(self.leave(self.decoder_snake(x), lengths)), lengths)


class DacTokenizer(WaveformTokenizer):
    """Sound [batch, 1, samples] to codes [batch, codebooks, frames] and back.

    An odd stride makes the decoder stop some samples early (8 of 16000 at 16 kHz); they come back silent.
    """

    type = "dac"
    config_class = DacConfig
    net_class = DacNet

    @property
    def code_vectors(self) -> tuple[Float[np.ndarray, "codes code_dim"], ...]:
        """The vectors of each level's codes, float32."""
        return tuple(np.asarray(book) for book in self.net.quantizer.codebooks())


def _convolution(
    inputs: int, outputs: int, width: int, *, stride: int = 1, dilation: int = 1, rngs: nnx.Rngs
) -> PaddedConv1d:
    return PaddedConv1d(
        inputs, outputs, width, stride=stride, dilation=dilation, causal=False, padding="constant", rngs=rngs
    )


def _direction(x: Float[Array, "n dim"]) -> Float[Array, "n dim"]:
    """Vectors of length 1."""
    return x / jnp.maximum(jnp.sqrt(jnp.square(x).sum(-1, keepdims=True)), 1e-12)
