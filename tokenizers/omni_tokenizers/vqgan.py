"""The image tokenizer of VQGAN and its descendants: convolutions at falling resolutions around one codebook.

Sources: VQGAN (Esser et al. 2021, arXiv:2012.09841) as taming-transformers has it; codes on the unit sphere as in
ViT-VQGAN (Yu et al. 2022, arXiv:2110.04627) and LlamaGen (Sun et al. 2024, arXiv:2406.06525). Chameleon, LlamaGen and
Janus are settings of this one net; Emu3's (`omni_tokenizers.emu3`) is built from its parts.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from omni_tokenizers.codes import Codes
from omni_tokenizers.errors import OmniError, UsageError
from omni_tokenizers.grid import GridTokenizer
from omni_tokenizers.image import as_pixels, normalized
from omni_tokenizers.layers import Conv2d
from omni_tokenizers.losses.image import ImageLosses
from omni_tokenizers.quantizers import (
    CodebookState,
    Quantized,
    SingleQuantizerConfig,
    check_replaced,
    make_quantizer,
    nearest,
)

_GROUPS = 32
_EPSILON = 1e-6
# Bounds for descriptions that come with files from elsewhere.
_LARGEST = 1 << 20
_DEEPEST = 64


@dataclasses.dataclass(frozen=True)
class PyramidConfig:
    """Convolutions at falling resolutions, and the codebook below them."""

    channels: int = 128
    """Channels of the first stage; each stage must have a multiple of 32 of them."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels of each stage as multiples of `channels`; each stage after the first halves the resolution."""
    residual_blocks: int = 2
    """Residual blocks in each stage of the encoder; the decoder has one more."""
    attention_stages: tuple[int, ...] = ()
    """Stages (0 = full resolution) with attention after every block; between encoder and decoder it always stands."""
    latent_channels: int = 256
    """Channels that the encoder ends in and the decoder begins with."""
    codebook_size: int = 8192
    """Number of codes."""
    image_size: int = 512
    """Height and width in pixels that the net is meant for; it takes any."""

    def __post_init__(self):
        sizes = (self.channels, *self.multipliers, self.latent_channels, self.codebook_size, self.image_size)
        if max(sizes) > _LARGEST or max(len(self.multipliers), self.residual_blocks) > _DEEPEST:
            raise UsageError(f"sizes go up to {_LARGEST}, stages and residual_blocks up to {_DEEPEST}")
        if min(*sizes, self.residual_blocks, len(self.multipliers)) < 1 or self.codebook_size < 2:
            raise UsageError("all sizes must be positive, with one stage at least and two codes")
        if any(width % _GROUPS for width in self.widths):
            raise UsageError(f"channels must be multiples of {_GROUPS} in every stage, got {list(self.widths)}")
        if any(stage not in range(len(self.multipliers)) for stage in self.attention_stages):
            raise UsageError(
                f"attention_stages must lie in 0 to {len(self.multipliers) - 1}, got {list(self.attention_stages)}"
            )
        if list(self.attention_stages) != sorted(set(self.attention_stages)):
            raise UsageError(f"attention_stages must rise, got {list(self.attention_stages)}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.channels * multiplier for multiplier in self.multipliers)

    @property
    def downsampling(self) -> int:
        """Pixels along each side of what one code stands for."""
        return 2 ** (len(self.multipliers) - 1)


@dataclasses.dataclass(frozen=True)
class VQGANConfig(PyramidConfig):
    """The defaults are Chameleon's: 512 x 512 pixels as 32 x 32 codes."""

    code_dim: int = 256
    """Width of a code vector."""
    normalized_codes: bool = False
    """Whether latents and codes are scaled to unit length, before they are compared and before they are decoded."""
    has_decoder: bool = True
    """Whether there is a decoder; transformers' Chameleon has none."""
    quantizer: SingleQuantizerConfig | None = None
    """What learns the codes, in place of codebook_size, code_dim and normalized_codes; None = a codebook that does not
    learn, as public weights bring it."""

    def __post_init__(self):
        super().__post_init__()
        check_replaced(self, ("codebook_size", "code_dim", "normalized_codes"))
        if not 1 <= self.code_dim <= _LARGEST:
            raise UsageError(f"code_dim must lie in 1 to {_LARGEST}, got {self.code_dim}")

    @property
    def code_width(self) -> int:
        """Width of what is quantised."""
        return self.code_dim if self.quantizer is None else self.quantizer.dim

    @property
    def losses(self) -> ImageLosses:
        """What a training has where it names no others."""
        return ImageLosses()

    @property
    def strides(self) -> tuple[int, int]:
        """Pixels that one code stands for, downwards and across."""
        return (self.downsampling, self.downsampling)


class GroupNorm(nnx.Module):
    """Each of 32 groups of channels to mean 0 and variance 1 over a whole picture, then scale and bias.

    The variance is that of the centred values: the difference of mean squares, faster, costs half of float32's digits
    wherever the mean is large.
    """

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(
        self, x: Float[Array, "batch height width channels"], guide: Array | None = None
    ) -> Float[Array, "batch height width channels"]:
        """`guide` is for norms that stand in for this one and read more than `x`."""
        groups = x.reshape(*x.shape[:3], _GROUPS, -1).astype(jnp.float32)
        centred = groups - groups.mean((1, 2, 4), keepdims=True)
        variance = jnp.square(centred).mean((1, 2, 4), keepdims=True)
        unit = (centred * jax.lax.rsqrt(variance + _EPSILON)).reshape(x.shape)
        return (unit * self.scale[...] + self.bias[...]).astype(x.dtype)


Norm = Callable[..., nnx.Module]
"""Makes a norm of so many channels, like `GroupNorm`."""


class ResidualBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), x through a 1 x 1 convolution where the channels change."""

    def __init__(self, inputs: int, outputs: int, norm: Norm, *, rngs: nnx.Rngs):
        self.first_norm = norm(inputs, rngs=rngs)
        self.first = Conv2d(inputs, outputs, 3, rngs=rngs)
        self.second_norm = norm(outputs, rngs=rngs)
        self.second = Conv2d(outputs, outputs, 3, rngs=rngs)
        self.shortcut = Conv2d(inputs, outputs, 1, rngs=rngs) if inputs != outputs else nnx.data(None)

    def __call__(
        self, x: Float[Array, "batch height width inputs"], guide: Array | None = None
    ) -> Float[Array, "batch height width outputs"]:
        y = self.first(padded(nnx.silu(self.first_norm(x, guide))))
        y = self.second(padded(nnx.silu(self.second_norm(y, guide))))
        return y + (x if self.shortcut is None else self.shortcut(x))


class AttentionBlock(nnx.Module):
    """x + attention of every position to all of the picture, one head as wide as the channels."""

    def __init__(self, channels: int, norm: Norm, *, rngs: nnx.Rngs):
        self.norm = norm(channels, rngs=rngs)
        self.query = Conv2d(channels, channels, 1, rngs=rngs)
        self.key = Conv2d(channels, channels, 1, rngs=rngs)
        self.value = Conv2d(channels, channels, 1, rngs=rngs)
        self.output = Conv2d(channels, channels, 1, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch height width channels"], guide: Array | None = None
    ) -> Float[Array, "batch height width channels"]:
        batch, height, width, channels = x.shape
        y = self.norm(x, guide)
        query, key, value = (
            layer(y).reshape(batch, height * width, channels) for layer in (self.query, self.key, self.value)
        )
        highest = jax.lax.Precision.HIGHEST
        scores = jnp.einsum("bqc,bkc->bqk", query, key, precision=highest) / np.sqrt(channels)
        shares = jax.nn.softmax(scores.astype(jnp.float32), -1).astype(x.dtype)
        y = jnp.einsum("bqk,bkc->bqc", shares, value, precision=highest)
        return x + self.output(y.reshape(x.shape))


class Stage(nnx.Module):
    """Residual blocks of one resolution, each followed by attention if the stage has it, then a change of resolution.

    `resample` is the convolution of that change, with `stride`, or None; encoder and decoder call it, each in its way.
    """

    def __init__(self, widths: list[int], norm: Norm, *, has_attention: bool, stride: int | None, rngs: nnx.Rngs):
        outputs = widths[-1]
        self.blocks = nnx.List(
            [ResidualBlock(before, after, norm, rngs=rngs) for before, after in itertools.pairwise(widths)]
        )
        attention = len(self.blocks) if has_attention else 0
        self.attention = nnx.List([AttentionBlock(outputs, norm, rngs=rngs) for _ in range(attention)])
        self.resample = nnx.data(None) if stride is None else Conv2d(outputs, outputs, 3, stride=stride, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch height width inputs"], guide: Array | None = None
    ) -> Float[Array, "batch height width outputs"]:
        for index, block in enumerate(self.blocks):
            x = block(x, guide)
            if self.attention:
                x = self.attention[index](x, guide)
        return x


class Middle(nnx.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, norm: Norm, *, rngs: nnx.Rngs):
        self.first = ResidualBlock(channels, channels, norm, rngs=rngs)
        self.attention = AttentionBlock(channels, norm, rngs=rngs)
        self.second = ResidualBlock(channels, channels, norm, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch height width channels"], guide: Array | None = None
    ) -> Float[Array, "batch height width channels"]:
        return self.second(self.attention(self.first(x, guide), guide), guide)


class Encoder(nnx.Module):
    """Images within [-1, 1] to latents."""

    def __init__(self, config: PyramidConfig, *, rngs: nnx.Rngs):
        widths, last = config.widths, len(config.widths) - 1

        def stage(index):
            return Stage(
                [widths[index - 1] if index else config.channels] + [widths[index]] * config.residual_blocks,
                GroupNorm,
                has_attention=index in config.attention_stages,
                stride=2 if index < last else None,
                rngs=rngs,
            )

        self.enter = Conv2d(3, config.channels, 3, rngs=rngs)
        self.stages = nnx.List([stage(index) for index in range(len(widths))])
        self.middle = Middle(widths[-1], GroupNorm, rngs=rngs)
        self.norm = GroupNorm(widths[-1], rngs=rngs)
        self.leave = Conv2d(widths[-1], config.latent_channels, 3, rngs=rngs)

    def __call__(
        self, image: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch rows columns latent_channels"]:
        x = self.enter(padded(image))
        for stage in self.stages:
            x = stage(x)
            if stage.resample is not None:
                # All of the padding lies below and to the right.
                x = stage.resample(jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0))))
        return self.leave(padded(nnx.silu(self.norm(self.middle(x)))))


class Decoder(nnx.Module):
    """Latents to images, about within [-1, 1]; the stages are in the encoder's order, and run from the last."""

    def __init__(self, config: PyramidConfig, norm: Norm = GroupNorm, *, rngs: nnx.Rngs):
        widths, last = config.widths, len(config.widths) - 1

        def stage(index):
            return Stage(
                [widths[min(index + 1, last)]] + [widths[index]] * (config.residual_blocks + 1),
                norm,
                has_attention=index in config.attention_stages,
                stride=1 if index > 0 else None,
                rngs=rngs,
            )

        self.enter = Conv2d(config.latent_channels, widths[-1], 3, rngs=rngs)
        self.middle = Middle(widths[-1], norm, rngs=rngs)
        self.stages = nnx.List([stage(index) for index in range(len(widths))])
        self.norm = norm(widths[0], rngs=rngs)
        self.leave = Conv2d(widths[0], 3, 3, rngs=rngs)

    def __call__(
        self, latents: Float[Array, "batch rows columns latent_channels"], guide: Array | None = None
    ) -> Float[Array, "batch height width 3"]:
        """`guide` is handed to every norm."""
        x = self.middle(self.enter(padded(latents)), guide)
        for stage in reversed(self.stages):
            x = stage(x, guide)
            if stage.resample is not None:
                x = stage.resample(padded(repeated(x, 2)))
        return self.leave(padded(nnx.silu(self.norm(x, guide))))


class VQGAN(nnx.Module):
    """Encoder, codebook and decoder."""

    last_layer = ("decoder", "leave")
    """Path of the layer that makes pixels."""

    def __init__(self, config: VQGANConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.to_code = Conv2d(config.latent_channels, config.code_width, 1, rngs=rngs)
        if config.quantizer is None:
            self.codebook = CodebookState(jax.random.normal(rngs.params(), (config.codebook_size, config.code_dim)))
            self.quantizer = nnx.data(None)
        else:
            self.quantizer = make_quantizer(config.quantizer, rngs=rngs)
        self.from_code = Conv2d(config.code_width, config.latent_channels, 1, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs) if config.has_decoder else nnx.data(None)

    def code_vectors(self) -> Float[Array, "codes code_dim"]:
        """What is compared and decoded for each code."""
        return self._scaled(self.codebook[...]) if self.quantizer is None else self.quantizer.codebook()

    def latents(self, image: Float[Array, "batch height width 3"]) -> Float[Array, "batch rows columns code_dim"]:
        """Continuous latents, as they are compared to code vectors, of images within [-1, 1]."""
        return self._scaled(self.to_code(self.encoder(image.astype(self.to_code.kernel.dtype))))

    def quantize(self, latents: Float[Array, "*batch code_dim"]) -> Int[Array, "*batch"]:
        """Codes of latents."""
        if self.quantizer is not None:
            return self.quantizer(latents, training=False).codes
        codes, _ = nearest(latents.reshape(-1, latents.shape[-1]), self.code_vectors())
        return codes.reshape(latents.shape[:-1])

    def decoder_input(self, codes: Int[Array, "batch rows columns"]) -> Float[Array, "batch rows columns latents"]:
        """What the decoder reads: code vectors widened to its channels."""
        return self.from_code(self.code_vectors()[codes] if self.quantizer is None else self.quantizer.lookup(codes))

    def reconstruct(self, codes: Int[Array, "batch rows columns"]) -> Float[Array, "batch height width 3"]:
        """Images, about within [-1, 1], of codes."""
        return self.decoder(self.decoder_input(codes))

    def autoencode(
        self, image: Float[Array, "batch height width 3"], key: PRNGKeyArray | None, *, training: bool
    ) -> tuple[Float[Array, "batch height width 3"], Quantized]:
        """Reconstructions of images within [-1, 1], and what the quantiser says; `training` moves its codebook.

        Raises:
            UsageError: a codebook that does not learn, or no decoder.
        """
        if self.quantizer is None or self.decoder is None:
            raise UsageError("a VQGAN is trained with a decoder and a quantizer; set those of its configuration")
        quantized = self.quantizer(self.latents(image), key, training=training)
        return self.decoder(self.from_code(quantized.quantized)), quantized

    def encode(self, image: UInt8[Array, "batch height width 3"]) -> Int[Array, "batch rows columns"]:
        """Codes of images."""
        return self.quantize(self.latents(normalized(image)))

    def decode(self, codes: Int[Array, "batch rows columns"]) -> UInt8[Array, "batch height width 3"]:
        """Images of codes."""
        return as_pixels(self.reconstruct(codes))

    def _scaled(self, vectors: Float[Array, "*batch code_dim"]) -> Float[Array, "*batch code_dim"]:
        if not self.config.normalized_codes:
            return vectors
        return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


class VQGANTokenizer(GridTokenizer):
    """A VQGAN, with or without its decoder."""

    type = "vqgan"
    config_class = VQGANConfig
    net_class = VQGAN

    def __init__(self, config: VQGANConfig, net: VQGAN):
        super().__init__(config, net)
        if config.quantizer is not None:
            self.codebook_sizes = (config.quantizer.codebook_size,)

    def decode(self, codes: Codes | Int[np.ndarray, "batch rows columns"]) -> UInt8[np.ndarray, "batch height width 3"]:
        """As `GridTokenizer.decode`.

        Raises:
            OmniError: not codes of this tokenizer, or it came without a decoder.
        """
        if not self.config.has_decoder:
            raise OmniError(
                "this tokenizer has no decoder, as transformers' Chameleon has none; the decoder is in the original "
                "release's vqgan.ckpt: omni import vqgan.ckpt DIRECTORY --image-size 512 --torch-reader"
            )
        return super().decode(codes)


def padded(x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height2 width2 channels"]:
    """`x` with a border of one pixel of zeros: a 3 x 3 convolution then keeps the size."""
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))


def repeated(
    x: Float[Array, "batch height width channels"], times: int
) -> Float[Array, "batch height2 width2 channels"]:
    """Each pixel as a square of `times` x `times`: upsampling to the nearest."""
    return x.repeat(times, 1).repeat(times, 2)
