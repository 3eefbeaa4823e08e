"""Convolutional vector-quantised image tokenizer (VQ-VAE, van den Oord et al. 2017) made mostly of matrix products.

A space-to-depth stem takes whole patches at once, so that every convolution runs at low resolution: cheap on a CPU and
full-width on a TPU.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from omni_tokenizers.errors import UsageError
from omni_tokenizers.grid import GridTokenizer
from omni_tokenizers.layers import Linear
from omni_tokenizers.losses.image import ImageLosses
from omni_tokenizers.quantizers import (
    Quantized,
    SingleQuantizerConfig,
    VectorQuantizerConfig,
    check_replaced,
    make_quantizer,
)

# Bounds for descriptions that come with files from elsewhere.
_LARGEST = 1 << 20
_DEEPEST = 64


@dataclasses.dataclass(frozen=True)
class ImageTokenizerConfig:
    """The default turns 32 x 32 pixels into 4 x 4 codes."""

    image_size: int = 32
    """Height and width in pixels that the net is meant for; it takes any."""
    patch_size: int = 4
    """Pixels along each side of the patches that the stem reads."""
    channels: int = 64
    """Channels of the first stage."""
    multipliers: tuple[int, ...] = (1, 2)
    """Channels of each stage as multiples of `channels`; each stage after the first halves the resolution."""
    residual_blocks: int = 1
    """Residual blocks in each stage, in the encoder and in the decoder."""
    codebook_size: int = 512
    """Number of codes."""
    code_dim: int = 16
    """Width of a code vector."""
    commitment: float = 0.25
    """Weight of the commitment loss."""
    absolute_weight: float = 0.1
    """Weight of the absolute error (L1) beside the squared error (L2)."""
    decay: float = 0.9
    """Decay of the codebook's moving averages; short runs need it to follow the encoder quickly."""
    quantizer: SingleQuantizerConfig | None = None
    """Another quantiser, in place of codebook_size, code_dim, commitment and decay; None = moving averages of these."""

    def __post_init__(self):
        check_replaced(self, ("codebook_size", "code_dim", "commitment", "decay"))
        codes = self.chosen_quantizer  # checks its own settings
        sizes = (self.image_size, self.patch_size, self.channels, *self.multipliers, codes.codebook_size, codes.dim)
        if max(sizes) > _LARGEST or max(len(self.multipliers), self.residual_blocks) > _DEEPEST:
            raise UsageError(f"sizes go up to {_LARGEST}, stages and residual_blocks up to {_DEEPEST}")
        if min(self.image_size, self.patch_size, self.channels, *self.multipliers, len(self.multipliers)) < 1:
            raise UsageError(
                "image_size, patch_size, channels and multipliers must be positive, with one stage at least"
            )
        if self.image_size % self.downsampling:
            raise UsageError(
                f"image_size {self.image_size} is no multiple of {self.downsampling}, "
                f"the pixels a code stands for with patch_size {self.patch_size} and {len(self.multipliers)} stages"
            )

    @property
    def downsampling(self) -> int:
        """Pixels along each side of what one code stands for."""
        return self.patch_size * 2 ** (len(self.multipliers) - 1)

    @property
    def strides(self) -> tuple[int, int]:
        """Pixels that one code stands for, downwards and across."""
        return (self.downsampling, self.downsampling)

    @property
    def losses(self) -> ImageLosses:
        """What a training has where it names no others."""
        return ImageLosses(absolute=self.absolute_weight)

    @property
    def chosen_quantizer(self) -> SingleQuantizerConfig:
        """The quantiser's configuration."""
        if self.quantizer is not None:
            return self.quantizer
        return VectorQuantizerConfig(self.codebook_size, self.code_dim, self.decay, self.commitment)


class ResidualBlock(nnx.Module):
    """x + conv(silu(conv(silu(norm(x))))): 3 x 3, then 1 x 1."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(channels, rngs=rngs)
        self.mix = Convolution(channels, channels, rngs=rngs)
        self.out = Linear(channels, channels, rngs=rngs, kernel_init=nnx.initializers.zeros)

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width channels"]:
        return x + self.out(nnx.silu(self.mix(nnx.silu(self.norm(x)))))


class Convolution(nnx.Module):
    """3 x 3 convolution with zero padding, as one matrix product over nine shifted copies (on a CPU twice as fast)."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.linear = Linear(9 * inputs, outputs, rngs=rngs)

    def __call__(self, x: Float[Array, "batch height width inputs"]) -> Float[Array, "batch height width outputs"]:
        height, width = x.shape[1:3]
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifted = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        return self.linear(jnp.concatenate(shifted, -1))


class ImageVQ(nnx.Module):
    """Encoder, quantiser and mirrored decoder."""

    last_layer = ("head",)
    """Path of the layer that makes pixels."""

    def __init__(self, config: ImageTokenizerConfig, *, rngs: nnx.Rngs):
        self.config = config
        widths = [config.channels * multiplier for multiplier in config.multipliers]
        pixels = 3 * config.patch_size**2

        def blocks(width):
            return nnx.List([ResidualBlock(width, rngs=rngs) for _ in range(config.residual_blocks)])

        pairs = list(itertools.pairwise(widths))
        self.stem = Linear(pixels, widths[0], rngs=rngs)
        self.encoder = nnx.List([blocks(width) for width in widths])
        self.down = nnx.List([Linear(4 * inner, outer, rngs=rngs) for inner, outer in pairs])
        self.to_code = Linear(widths[-1], config.chosen_quantizer.dim, rngs=rngs)
        self.quantizer = make_quantizer(config.chosen_quantizer, rngs=rngs)
        self.from_code = Convolution(config.chosen_quantizer.dim, widths[-1], rngs=rngs)
        self.decoder = nnx.List([blocks(width) for width in widths])
        self.up = nnx.List([Linear(outer, 4 * inner, rngs=rngs) for inner, outer in pairs])
        self.norm = nnx.RMSNorm(widths[0], rngs=rngs)
        self.head = Linear(widths[0], pixels, rngs=rngs)

    def code_vectors(self) -> Float[Array, "codes code_dim"]:
        """The vectors of the codes."""
        return self.quantizer.codebook()

    def latents(self, image: Float[Array, "batch height width 3"]) -> Float[Array, "batch rows columns dim"]:
        """Continuous latents of images within [-1, 1]."""
        x = self.stem(space_to_depth(image.astype(self.stem.kernel.dtype), self.config.patch_size))
        for stage, blocks in enumerate(self.encoder):
            x = self.down[stage - 1](space_to_depth(x, 2)) if stage else x
            for block in blocks:
                x = block(x)
        return self.to_code(x)

    def reconstruct(self, latents: Float[Array, "batch rows columns dim"]) -> Float[Array, "batch height width 3"]:
        """Images, about within [-1, 1], of quantised latents."""
        x = self.from_code(latents)
        for stage in reversed(range(len(self.decoder))):
            for block in self.decoder[stage]:
                x = block(x)
            x = depth_to_space(self.up[stage - 1](x), 2) if stage else x
        return depth_to_space(self.head(nnx.silu(self.norm(x))), self.config.patch_size)

    def encode(self, image: UInt8[Array, "batch height width 3"]) -> Int[Array, "batch rows columns"]:
        """Codes of images."""
        return self.quantizer(self.latents(normalized(image)), training=False).codes

    def decode(self, codes: Int[Array, "batch rows columns"]) -> UInt8[Array, "batch height width 3"]:
        """Images of codes."""
        pixels = self.reconstruct(self.quantizer.lookup(codes))
        return as_pixels(pixels)

    def autoencode(
        self, image: Float[Array, "batch height width 3"], key: PRNGKeyArray | None, *, training: bool
    ) -> tuple[Float[Array, "batch height width 3"], Quantized]:
        """Reconstructions of images within [-1, 1], and what the quantiser says; `training` moves its codebook."""
        quantized = self.quantizer(self.latents(image), key, training=training)
        return self.reconstruct(quantized.quantized), quantized


class ImageTokenizer(GridTokenizer):
    """Images uint8 [batch, height, width, 3] to codes int32 [batch, rows, columns] and back."""

    type = "image_vq"
    config_class = ImageTokenizerConfig
    net_class = ImageVQ

    def __init__(self, config: ImageTokenizerConfig, net: ImageVQ):
        super().__init__(config, net)
        self.codebook_sizes = (config.chosen_quantizer.codebook_size,)


def normalized(image: Array) -> Float[Array, "batch height width 3"]:
    """uint8 pixels as float32 within [-1, 1]; floating point passes through."""
    return image.astype(jnp.float32) / 127.5 - 1 if image.dtype == jnp.uint8 else image.astype(jnp.float32)


def as_pixels(image: Float[Array, "*axes"]) -> UInt8[Array, "*axes"]:
    """Values within [-1, 1] as 0 to 255; beyond them the nearest."""
    return jnp.round(jnp.clip((image + 1) * 127.5, 0, 255)).astype(jnp.uint8)


def space_to_depth(x: Float[Array, "batch height width channels"], size: int) -> Float[Array, "batch rows columns all"]:
    """Cuts size x size squares and stacks each square's values as channels."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // size, size, width // size, size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // size, width // size, size * size * channels)


def depth_to_space(x: Float[Array, "batch rows columns all"], size: int) -> Float[Array, "batch height width channels"]:
    """Inverse of `space_to_depth`."""
    batch, rows, columns, _ = x.shape
    x = x.reshape(batch, rows, columns, size, size, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, rows * size, columns * size, -1)
