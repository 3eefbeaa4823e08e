"""SEANet: the convolutional encoder and decoder of EnCodec and Mimi.

Sources: SEANet (Tagliasacchi et al. 2020, arXiv:2009.02095), SoundStream (Zeghidour et al. 2021), EnCodec (Défossez et
al. 2022, arXiv:2210.13438). Everything keeps time second and channels last.
"""

from __future__ import annotations

import dataclasses
import functools
import math

from flax import nnx
from jaxtyping import Array, Float, Int

from omni_tokenizers.edges import PADDINGS, PaddedConv1d, TrimmedConvTranspose1d
from omni_tokenizers.errors import UsageError
from omni_tokenizers.layers import elu
from omni_tokenizers.recurrent import LSTM

# Bounds for descriptions that come with files from elsewhere.
_LARGEST = 1 << 20
_DEEPEST = 64


@dataclasses.dataclass(frozen=True)
class SEANetConfig:
    """An encoder from samples to latents and its mirrored decoder; the defaults are those of EnCodec at 24 kHz."""

    channels: int = 1
    """Channels of the sound."""
    filters: int = 32
    """Channels after the first convolution; each stride doubles them."""
    dim: int = 128
    """Width of a latent."""
    strides: tuple[int, ...] = (2, 4, 5, 8)
    """Downsampling of each stage of the encoder, from the samples on; the decoder mirrors it."""
    residual_layers: int = 1
    """Residual units in each stage."""
    width: int = 7
    """Width of the first convolution."""
    last_width: int = 7
    """Width of the last convolution."""
    residual_width: int = 3
    """Width of the dilated convolution of a residual unit."""
    dilation_growth: int = 2
    """Dilation of each residual unit of a stage over that of the unit before."""
    compress: int = 2
    """Channels of a residual unit's input over those within."""
    conv_shortcut: bool = True
    """Whether a residual unit's input is added through a convolution, or as it is."""
    lstm_layers: int = 2
    """Recurrent layers at the rate of the latents, in the encoder and in the decoder."""
    causal: bool = True
    """Whether a frame sees only what comes before its end."""
    padding: str = "reflect"
    """What convolutions see beyond the edges: "constant" (zeros), "reflect" or "replicate"."""
    group_norm: bool = False
    """Whether each convolution is followed by a normalisation over time and channels."""

    def __post_init__(self):
        sizes = (self.channels, self.filters, self.dim, self.width, self.last_width, self.residual_width)
        sizes += (*self.strides, self.dilation_growth, self.compress, self.filters // max(self.compress, 1))
        if not self.strides or min(sizes) < 1 or min(self.residual_layers, self.lstm_layers) < 0:
            raise UsageError("widths, strides and channels must be positive, with one stride and filters >= compress")
        depth = max(len(self.strides), self.residual_layers, self.lstm_layers)
        reach = self.dilation_growth ** max(self.residual_layers - 1, 0) if depth <= _DEEPEST else 0
        if depth > _DEEPEST or max(*sizes, reach, self.filters << len(self.strides)) > _LARGEST:
            raise UsageError(f"sizes go up to {_LARGEST}, strides and layers up to {_DEEPEST}")
        if self.padding not in PADDINGS:
            raise UsageError(f"padding is one of {', '.join(PADDINGS)}, not {self.padding!r}")

    @property
    def hop(self) -> int:
        """Samples that a latent stands for."""
        return math.prod(self.strides)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the encoder before each stage and after the last."""
        return tuple(self.filters << stage for stage in range(len(self.strides) + 1))

    @property
    def first_latents(self) -> int:
        """Latents that a stream begins with: a clip's reflection at its start mirrors as many frames as it adds."""
        if self.padding != "reflect":
            return 1
        dilated = (self.residual_width - 1) * max(self.dilations, default=0) + 1
        return max(self.width, self.last_width, 2, -(-dilated // self.strides[-1]))

    @property
    def dilations(self) -> tuple[int, ...]:
        """Dilation of each residual unit of a stage."""
        return tuple(self.dilation_growth**unit for unit in range(self.residual_layers))


class ResidualUnit(nnx.Module):
    """shortcut(x) + conv(elu(conv(elu(x)))): the first convolution is dilated, the second has width 1."""

    def __init__(self, config: SEANetConfig, channels: int, dilation: int, *, rngs: nnx.Rngs):
        make, inner = _convolution(config), channels // config.compress
        self.mix = make(channels, inner, config.residual_width, dilation=dilation, rngs=rngs)
        self.out = make(inner, channels, 1, rngs=rngs)
        self.shortcut = make(channels, channels, 1, rngs=rngs) if config.conv_shortcut else None

    def __call__(
        self, x: Float[Array, "batch time channels"], lengths: Int[Array, " batch"]
    ) -> Float[Array, "batch time channels"]:
        y = self.out(elu(self.mix(elu(x), lengths)), lengths)
        return (x if self.shortcut is None else self.shortcut(x, lengths)) + y


class EncoderStage(nnx.Module):
    """Residual units, then a strided convolution to twice the channels."""

    def __init__(self, config: SEANetConfig, channels: int, stride: int, *, rngs: nnx.Rngs):
        self.units = nnx.List([ResidualUnit(config, channels, dilation, rngs=rngs) for dilation in config.dilations])
        self.down = _convolution(config)(channels, 2 * channels, 2 * stride, stride=stride, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch time channels"], lengths: Int[Array, " batch"]
    ) -> tuple[Float[Array, "batch frames outputs"], Int[Array, " batch"]]:
        for unit in self.units:
            x = unit(x, lengths)
        return self.down(elu(x), lengths), self.down.frames(lengths)


class DecoderStage(nnx.Module):
    """A transposed convolution to half the channels, then residual units."""

    def __init__(self, config: SEANetConfig, channels: int, stride: int, *, rngs: nnx.Rngs):
        self.up = TrimmedConvTranspose1d(
            2 * channels,
            channels,
            2 * stride,
            stride=stride,
            causal=config.causal,
            group_norm=config.group_norm,
            rngs=rngs,
        )
        self.units = nnx.List([ResidualUnit(config, channels, dilation, rngs=rngs) for dilation in config.dilations])

    def __call__(
        self, x: Float[Array, "batch frames inputs"], lengths: Int[Array, " batch"]
    ) -> tuple[Float[Array, "batch time channels"], Int[Array, " batch"]]:
        x, lengths = self.up(elu(x), lengths), lengths * self.up.stride
        for unit in self.units:
            x = unit(x, lengths)
        return x, lengths


class SEANetEncoder(nnx.Module):
    """Samples to latents, ceil(n / hop) for n samples."""

    def __init__(self, config: SEANetConfig, *, rngs: nnx.Rngs):
        make, last = _convolution(config), config.widths[-1]
        self.enter = make(config.channels, config.filters, config.width, rngs=rngs)
        stages = zip(config.widths, config.strides, strict=False)
        self.stages = nnx.List([EncoderStage(config, channels, stride, rngs=rngs) for channels, stride in stages])
        self.memory = LSTM(last, config.lstm_layers, rngs=rngs) if config.lstm_layers else None
        self.leave = make(last, config.dim, config.last_width, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch samples channels"], lengths: Int[Array, " batch"]
    ) -> Float[Array, "batch frames dim"]:
        x = self.enter(x, lengths)
        for stage in self.stages:
            x, lengths = stage(x, lengths)
        if self.memory is not None:
            x = x + self.memory(x, lengths)
        return self.leave(elu(x), lengths)


class SEANetDecoder(nnx.Module):
    """Latents to samples, hop for each latent."""

    def __init__(self, config: SEANetConfig, *, rngs: nnx.Rngs):
        make, last = _convolution(config), config.widths[-1]
        self.enter = make(config.dim, last, config.width, rngs=rngs)
        self.memory = LSTM(last, config.lstm_layers, rngs=rngs) if config.lstm_layers else None
        stages = list(zip(config.widths, config.strides, strict=False))[::-1]
        self.stages = nnx.List([DecoderStage(config, channels, stride, rngs=rngs) for channels, stride in stages])
        self.leave = make(config.filters, config.channels, config.last_width, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch frames dim"], lengths: Int[Array, " batch"]
    ) -> Float[Array, "batch samples channels"]:
        x = self.enter(x, lengths)
        if self.memory is not None:
            x = x + self.memory(x, lengths)
        for stage in self.stages:
            x, lengths = stage(x, lengths)
        return self.leave(elu(x), lengths)


def _convolution(config: SEANetConfig):
    """What makes the convolutions of a net: all pad and normalise alike."""
    return functools.partial(PaddedConv1d, causal=config.causal, padding=config.padding, group_norm=config.group_norm)
