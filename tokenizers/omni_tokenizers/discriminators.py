"""Nets that learn to tell reconstructions from originals, for adversarial training.

Neither shares anything between the examples of a batch. PatchGAN's batch norm is a trap here: its statistics differ
between originals and reconstructions, between microbatches, and between devices unless they are summed over all of
them; group norm keeps the scale of features bounded without any of that. Weight norm looks at no feature at all.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from omni_tokenizers.errors import UsageError
from omni_tokenizers.layers import Conv2d
from omni_tokenizers.spectral import frame, hann
from omni_tokenizers.vqgan import GroupNorm, padded

_SLOPE = 0.2  # of leaky rectifiers
_MOST_CHANNELS = 8  # times those of the first layer

Verdict = tuple[list[Float[Array, "batch ..."]], list[Float[Array, "batch ..."]]]
"""Logits of each part of a discriminator, high where it takes its input for an original; and features of each layer."""


@dataclasses.dataclass(frozen=True)
class PatchDiscriminatorConfig:
    """PatchGAN (Isola et al. 2017, arXiv:1611.07004, section 3.2.2) as VQGAN has it, with group norm for batch norm."""

    channels: int = 64
    """Channels of the first layer, a multiple of 32; each further layer doubles them, up to eight times."""
    layers: int = 3
    """Layers that halve the resolution; a logit of 3 sees 70 x 70 pixels."""

    def __post_init__(self) -> None:
        if self.channels < 1 or self.channels % 32 or not 1 <= self.layers <= 16:
            raise UsageError(
                f"a patch discriminator has channels in multiples of 32 and 1 to 16 layers, "
                f"got {self.channels} and {self.layers}"
            )

    def make(self, *, rngs: nnx.Rngs) -> PatchDiscriminator:
        """The discriminator."""
        return PatchDiscriminator(self, rngs=rngs)


class PatchDiscriminator(nnx.Module):
    """Convolutions 4 x 4: some that halve the resolution, one that does not, and one to a logit for each patch."""

    def __init__(self, config: PatchDiscriminatorConfig, *, rngs: nnx.Rngs):
        widths = [config.channels * min(2**layer, _MOST_CHANNELS) for layer in range(config.layers + 1)]
        inputs = [3, *widths[:-1]]
        self.layers = nnx.List(
            [
                Conv2d(before, after, 4, stride=2 if layer < config.layers else 1, rngs=rngs)
                for layer, (before, after) in enumerate(zip(inputs, widths, strict=True))
            ]
        )
        self.norms = nnx.List([GroupNorm(width, rngs=rngs) for width in widths[1:]])
        self.head = Conv2d(widths[-1], 1, 4, rngs=rngs)
        self.smallest = 3 * 2**config.layers  # pixels of a side that leave a logit: the last two layers take one each

    def __call__(self, image: Float[Array, "batch height width 3"]) -> Verdict:
        """Logits [batch, rows, columns] and features of images within [-1, 1]; `UsageError` if they leave no logit."""
        if min(image.shape[1:3]) < self.smallest:
            raise UsageError(
                f"a patch discriminator of {len(self.norms)} layers needs pictures of {self.smallest} x "
                f"{self.smallest}, got {image.shape[1:3]}; give it fewer layers"
            )
        x, features = image, []
        for index, layer in enumerate(self.layers):
            x = layer(padded(x))
            x = nnx.leaky_relu(self.norms[index - 1](x) if index else x, _SLOPE)
            features.append(x)
        return [self.head(padded(x))[..., 0]], features


@dataclasses.dataclass(frozen=True)
class STFTDiscriminatorConfig:
    """The multi-scale STFT discriminator of EnCodec (Défossez et al. 2022, arXiv:2210.13438, section 3.4)."""

    windows: tuple[int, ...] = (2048, 1024, 512, 256, 128)
    """Windows, in samples, multiples of 4, each with hops of a quarter."""
    channels: int = 32
    """Channels of every layer."""
    dilations: tuple[int, ...] = (1, 2, 4)
    """Dilation over time of each layer that halves the frequencies."""

    def __post_init__(self) -> None:
        if not self.windows or any(window < 4 or window % 4 for window in self.windows):
            raise UsageError(f"windows of an STFT discriminator are multiples of 4, got {self.windows}")
        if self.channels < 1 or any(dilation < 1 for dilation in self.dilations):
            raise UsageError("channels and dilations of an STFT discriminator must be at least 1")

    def make(self, *, rngs: nnx.Rngs) -> STFTDiscriminator:
        """The discriminator."""
        return STFTDiscriminator(self, rngs=rngs)


class STFTDiscriminator(nnx.Module):
    """A discriminator of complex spectra for each window."""

    def __init__(self, config: STFTDiscriminatorConfig, *, rngs: nnx.Rngs):
        self.scales = nnx.List([_SpectrumDiscriminator(window, config, rngs=rngs) for window in config.windows])

    def __call__(self, audio: Float[Array, "batch samples"]) -> Verdict:
        """Logits [batch, frames, bins] of each window, and features; `UsageError` if clips are shorter than one."""
        longest = max(scale.window for scale in self.scales)
        if audio.shape[-1] < longest:
            raise UsageError(
                f"an STFT discriminator with a window of {longest} needs clips as long, got {audio.shape[-1]} samples; "
                "give it shorter windows"
            )
        verdicts = [scale(audio) for scale in self.scales]
        return [logits for logits, _ in verdicts], [feature for _, features in verdicts for feature in features]


class _SpectrumDiscriminator(nnx.Module):
    def __init__(self, window: int, config: STFTDiscriminatorConfig, *, rngs: nnx.Rngs):
        self.window, width = window, config.channels
        halving = [
            WeightNormConv2d(width, width, (3, 9), stride=(1, 2), dilation=(dilation, 1), rngs=rngs)
            for dilation in config.dilations
        ]
        enter, leave = WeightNormConv2d(2, width, (3, 9), rngs=rngs), WeightNormConv2d(width, width, (3, 3), rngs=rngs)
        self.layers = nnx.List([enter, *halving, leave])
        self.head = WeightNormConv2d(width, 1, (3, 3), rngs=rngs)

    def __call__(self, audio: Float[Array, "batch samples"]) -> tuple[Array, list[Array]]:
        # Frames begin at the first sample; a window of unit energy keeps noise of unit variance at unit variance.
        window = hann(self.window)
        frames = frame(audio.astype(jnp.float32), self.window, self.window // 4)
        spectrum = jnp.fft.rfft(frames * (window / jnp.sqrt(jnp.square(window).sum())), axis=-1)
        x, features = jnp.stack([spectrum.real, spectrum.imag], -1), []
        for layer in self.layers:
            x = nnx.leaky_relu(layer(x), _SLOPE)
            features.append(x)
        return self.head(x)[..., 0], features


class WeightNormConv2d(nnx.Module):
    """A convolution over (time, frequency), zeros around, whose kernel is g v / |v| for each output channel.

    Source: weight normalisation (Salimans and Kingma 2016, arXiv:1602.07868, equation 2). At stride 1 the size is kept.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: tuple[int, int],
        *,
        stride: tuple[int, int] = (1, 1),
        dilation: tuple[int, int] = (1, 1),
        rngs: nnx.Rngs,
    ):
        self.stride, self.dilation = stride, dilation
        self.padding = tuple(((width - 1) * step // 2,) * 2 for width, step in zip(size, dilation, strict=True))
        direction = nnx.initializers.lecun_normal()(rngs.params(), (*size, inputs, outputs))
        self.direction = nnx.Param(direction, axes=(None, None, None, "embed"))
        self.length = nnx.Param(_lengths(direction))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: Float[Array, "batch time bins inputs"]) -> Float[Array, "batch frames bins2 outputs"]:
        direction = self.direction[...]
        y = jax.lax.conv_general_dilated(
            x,
            direction * (self.length[...] / _lengths(direction)),
            window_strides=self.stride,
            padding=self.padding,
            rhs_dilation=self.dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + self.bias[...]


def _lengths(kernel: Float[Array, "height width inputs outputs"]) -> Float[Array, " outputs"]:
    return jnp.sqrt(jnp.square(kernel).sum((0, 1, 2)))
