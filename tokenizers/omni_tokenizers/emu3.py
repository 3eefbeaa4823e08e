"""Emu3's tokenizer of pictures and videos: a VQGAN for each frame, with convolutions over time around its codebook.

Sources: Emu3 (Wang et al. 2024, arXiv:2409.18869) and its release, whose decoder is MoVQ's (Zheng et al. 2022,
arXiv:2209.09002): each of its norms takes scale and bias, at each place, from the code that stands there.

Time is causal: codes depend on their own frames and those before them alone, and so do decoded frames.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from omni_tokenizers.codebooks import Codebook
from omni_tokenizers.errors import UsageError
from omni_tokenizers.image import as_pixels, normalized
from omni_tokenizers.layers import Conv2d, Conv3d
from omni_tokenizers.vqgan import PIXELS, Decoder, Encoder, GridTokenizer, GroupNorm, PyramidConfig, repeated

_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class Emu3Config(PyramidConfig):
    """The defaults are Emu3's: 4 frames of 8 x 8 pixels as one code."""

    channels: int = 256
    multipliers: tuple[int, ...] = (1, 2, 2, 4)
    attention_stages: tuple[int, ...] = (3,)
    latent_channels: int = 4
    """Channels that the encoder ends in and the decoder begins with; code vectors are as wide."""
    codebook_size: int = 32768
    temporal_downsampling: int = 4
    """Frames that one code stands for, a power of two."""

    def __post_init__(self):
        super().__post_init__()
        frames = self.temporal_downsampling
        if not 1 <= frames <= 1024 or frames & (frames - 1):
            raise UsageError(f"temporal_downsampling must be a power of two in 1 to 1024, got {frames}")

    @property
    def strides(self) -> tuple[int, int, int]:
        """Frames and pixels that one code stands for: in time, downwards and across."""
        return (self.temporal_downsampling, self.downsampling, self.downsampling)

    @property
    def temporal_stages(self) -> int:
        """How many times the number of frames is halved."""
        return self.temporal_downsampling.bit_length() - 1


class SpatialNorm(nnx.Module):
    """`GroupNorm`, then scale and bias of each place by linear maps of the guide there (MoVQ's modulation)."""

    def __init__(self, channels: int, guide_channels: int, *, rngs: nnx.Rngs):
        self.group_norm = GroupNorm(channels, rngs=rngs)
        self.to_scale = Conv2d(guide_channels, channels, 1, rngs=rngs)
        self.to_bias = Conv2d(guide_channels, channels, 1, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch height width channels"], guide: Float[Array, "batch rows columns guide_channels"]
    ) -> Float[Array, "batch height width channels"]:
        """A place of the guide stands for a square of `x`."""
        side = x.shape[1] // guide.shape[1]
        return self.group_norm(x) * repeated(self.to_scale(guide), side) + repeated(self.to_bias(guide), side)


class TemporalBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))) over time and space, the norms by the statistics of training."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        norm = functools.partial(nnx.BatchNorm, channels, use_running_average=True, epsilon=_EPSILON, rngs=rngs)
        self.first_norm = norm()
        self.first = Conv3d(channels, channels, (3, 3, 3), rngs=rngs)
        self.second_norm = norm()
        self.second = Conv3d(channels, channels, (3, 3, 3), rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch time height width channels"]
    ) -> Float[Array, "batch time height width channels"]:
        y = self.first(with_past(nnx.silu(self.first_norm(x)), border=1))
        return x + self.second(with_past(nnx.silu(self.second_norm(y)), border=1))


class TemporalEncoder(nnx.Module):
    """Latents of frames to latents of codes: convolutions that halve time, then residual blocks."""

    def __init__(self, config: Emu3Config, *, rngs: nnx.Rngs):
        channels = config.latent_channels
        self.resamples = nnx.List(
            [Conv3d(channels, channels, (4, 3, 3), time_stride=2, rngs=rngs) for _ in range(config.temporal_stages)]
        )
        self.blocks = nnx.List([TemporalBlock(channels, rngs=rngs) for _ in range(config.residual_blocks)])

    def __call__(
        self, x: Float[Array, "batch time rows columns channels"]
    ) -> Float[Array, "batch frames rows columns channels"]:
        for resample in self.resamples:
            x = nnx.silu(resample(with_past(x, border=1)))
        for block in self.blocks:
            x = block(x)
        return x


class TemporalDecoder(nnx.Module):
    """The encoder mirrored: residual blocks, then each frame doubled and convolved."""

    def __init__(self, config: Emu3Config, *, rngs: nnx.Rngs):
        channels = config.latent_channels
        self.blocks = nnx.List([TemporalBlock(channels, rngs=rngs) for _ in range(config.residual_blocks)])
        self.resamples = nnx.List(
            [Conv3d(channels, channels, (3, 3, 3), rngs=rngs) for _ in range(config.temporal_stages)]
        )

    def __call__(
        self, x: Float[Array, "batch frames rows columns channels"]
    ) -> Float[Array, "batch time rows columns channels"]:
        for block in self.blocks:
            x = block(x)
        for resample in self.resamples:
            x = nnx.silu(resample(with_past(x.repeat(2, 1), border=1)))
        return x


class Emu3VQ(nnx.Module):
    """Encoder, codebook and decoder of pictures [batch, height, width, 3] and videos [batch, time, height, width, 3].

    A picture is a video of as many equal frames as one code stands for, of which decoding keeps the first. What works
    on single frames therefore sees it once.
    """

    def __init__(self, config: Emu3Config, *, rngs: nnx.Rngs):
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config, rngs=rngs)
        self.temporal_encoder = TemporalEncoder(config, rngs=rngs)
        self.to_code = Conv3d(channels, channels, (3, 1, 1), rngs=rngs)
        self.codebook = Codebook(config.codebook_size, channels, rngs=rngs)
        self.from_code = Conv3d(channels, channels, (3, 1, 1), rngs=rngs)
        self.temporal_decoder = TemporalDecoder(config, rngs=rngs)
        norm = functools.partial(SpatialNorm, guide_channels=channels)
        self.decoder = Decoder(config, norm, rngs=rngs)

    def code_vectors(self) -> Float[Array, "codes channels"]:
        """What is compared and decoded for each code."""
        return self.codebook.codebook()

    def latents(
        self, pixels: Float[Array, "batch *time height width 3"]
    ) -> Float[Array, "batch frames rows columns channels"]:
        """Continuous latents, as they are compared to code vectors, of pictures (one frame) or videos in [-1, 1]."""
        *leading, height, width, _ = pixels.shape
        x = _a_few_at_a_time(self.encoder, height * width, pixels.reshape(-1, height, width, 3))
        x = x.reshape(*leading, *x.shape[1:])
        if len(leading) == 1:
            x = x[:, None].repeat(self.config.temporal_downsampling, 1)
        return self.to_code(with_past(self.temporal_encoder(x), border=0))

    def quantize(
        self, latents: Float[Array, "batch frames rows columns channels"]
    ) -> Int[Array, "batch frames rows columns"]:
        """Codes of latents."""
        pixels = latents.shape[2] * latents.shape[3] * self.config.downsampling**2
        codes = _a_few_at_a_time(self.codebook.encode, pixels, latents.reshape(-1, *latents.shape[2:]))
        return codes.reshape(latents.shape[:-1])

    def reconstruct(
        self, codes: Int[Array, "batch *frames rows columns"]
    ) -> Float[Array, "batch *time height width 3"]:
        """Pictures or videos, about within [-1, 1], of codes."""
        is_picture = codes.ndim == 3
        vectors = self.codebook.lookup(codes[:, None] if is_picture else codes)
        latents = self.from_code(with_past(vectors, border=0))
        # What is decoded and what guides the norms pass through time alike.
        both = self.temporal_decoder(jnp.concatenate([latents, vectors]))
        both = both[:, :1] if is_picture else both
        latents, guide = (half.reshape(-1, *half.shape[2:]) for half in jnp.split(both, 2))
        pixels = latents.shape[1] * latents.shape[2] * self.config.downsampling**2
        image = _a_few_at_a_time(self.decoder, pixels, latents, guide)
        return image if is_picture else image.reshape(len(codes), -1, *image.shape[1:])

    def encode(self, pixels: UInt8[Array, "batch *time height width 3"]) -> Int[Array, "batch *frames rows columns"]:
        """Codes of pictures or videos."""
        codes = self.quantize(self.latents(normalized(pixels)))
        return codes[:, 0] if pixels.ndim == 4 else codes

    def decode(self, codes: Int[Array, "batch *frames rows columns"]) -> UInt8[Array, "batch *time height width 3"]:
        """Pictures or videos of codes."""
        return as_pixels(self.reconstruct(codes))


class Emu3Tokenizer(GridTokenizer):
    """Pictures uint8 [batch, height, width, 3] to codes [batch, rows, columns], videos uint8 [batch, time, height,
    width, 3] to codes [batch, frames, rows, columns], and back.

    A video whose length is no multiple of the stride goes on with its last frame; decoding cuts that off.
    """

    type = "emu3"
    config_class = Emu3Config
    net_class = Emu3VQ
    axes: ClassVar = (*GridTokenizer.axes, (("time", "height", "width"), ("frames", "rows", "columns")))


def with_past(
    x: Float[Array, "batch time height width channels"], *, border: int
) -> Float[Array, "batch time2 height2 width2 channels"]:
    """`x` with two frames of zeros before it and `border` zeros around each frame: what causal convolutions read."""
    return jnp.pad(x, ((0, 0), (2, 0), (border, border), (border, border), (0, 0)))


def _a_few_at_a_time(function: Callable[..., Array], pixels: int, *frames: Array) -> Array:
    """`function` of [number, ...] arrays, of which it sees as many, of so many pixels each, as `PIXELS` allow."""
    number, each = len(frames[0]), max(1, PIXELS // pixels)
    if number <= each:
        return function(*frames)
    groups = -(-number // each)

    def grouped(part):
        part = jnp.pad(part, ((0, groups * each - number), *((0, 0),) * (part.ndim - 1)))
        return part.reshape(groups, each, *part.shape[1:])

    results = jax.lax.map(lambda parts: function(*parts), [grouped(part) for part in frames])
    return results.reshape(-1, *results.shape[2:])[:number]
