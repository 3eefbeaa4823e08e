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

from omni_tokenizers.carried import Past
from omni_tokenizers.codebooks import Codebook
from omni_tokenizers.errors import UsageError
from omni_tokenizers.grid import PIXELS, GridTokenizer
from omni_tokenizers.image import as_pixels, normalized
from omni_tokenizers.layers import Conv2d, Conv3d
from omni_tokenizers.streaming import Stream
from omni_tokenizers.video_streaming import VideoStreams
from omni_tokenizers.vqgan import Decoder, Encoder, GroupNorm, PyramidConfig, repeated

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
    def side(self) -> int:
        """Rows and columns of codes that a frame of `image_size` has."""
        return -(-self.image_size // self.downsampling)

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


class CausalConv3d(Conv3d):
    """A convolution that reaches back over two frames, zeros before a video, and keeps the size of frames by zeros
    around them. Of each row several videos, `lanes`, go through it side by side; a stream's frames have `image_size`.
    """

    def __init__(
        self,
        config: Emu3Config,
        size: tuple[int, int, int],
        *,
        time_stride: int = 1,
        lanes: int = 1,
        rngs: nnx.Rngs,
    ):
        channels = config.latent_channels
        super().__init__(channels, channels, size, time_stride=time_stride, rngs=rngs)
        self.past = Past(2, lanes, config.side, config.side, channels)

    def __call__(
        self, x: Float[Array, "batch time lanes rows columns channels"], lengths: Int[Array, " batch"]
    ) -> Float[Array, "batch frames lanes rows columns channels"]:
        border = self.kernel.shape[1] // 2
        x = jnp.moveaxis(self.past(x, lengths), 2, 1)
        batch, lanes = x.shape[:2]
        x = jnp.pad(x.reshape(-1, *x.shape[2:]), ((0, 0), (0, 0), (border, border), (border, border), (0, 0)))
        y = super().__call__(x)
        return jnp.moveaxis(y.reshape(batch, lanes, *y.shape[1:]), 1, 2)


class TemporalBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))) over time and space, the norms by the statistics of training."""

    def __init__(self, config: Emu3Config, *, lanes: int = 1, rngs: nnx.Rngs):
        channels = config.latent_channels
        norm = functools.partial(nnx.BatchNorm, channels, use_running_average=True, epsilon=_EPSILON, rngs=rngs)
        self.first_norm = norm()
        self.first = CausalConv3d(config, (3, 3, 3), lanes=lanes, rngs=rngs)
        self.second_norm = norm()
        self.second = CausalConv3d(config, (3, 3, 3), lanes=lanes, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch time lanes rows columns channels"], lengths: Int[Array, " batch"]
    ) -> Float[Array, "batch time lanes rows columns channels"]:
        y = self.first(nnx.silu(self.first_norm(x)), lengths)
        return x + self.second(nnx.silu(self.second_norm(y)), lengths)


class TemporalEncoder(nnx.Module):
    """Latents of frames to latents of codes: convolutions that halve time, then residual blocks."""

    def __init__(self, config: Emu3Config, *, rngs: nnx.Rngs):
        self.resamples = nnx.List(
            [CausalConv3d(config, (4, 3, 3), time_stride=2, rngs=rngs) for _ in range(config.temporal_stages)]
        )
        self.blocks = nnx.List([TemporalBlock(config, rngs=rngs) for _ in range(config.residual_blocks)])

    def __call__(
        self, x: Float[Array, "batch time 1 rows columns channels"], frames: Int[Array, " batch"]
    ) -> Float[Array, "batch frames 1 rows columns channels"]:
        """Of each video so many frames of codes count."""
        for stage, resample in enumerate(self.resamples):
            x = nnx.silu(resample(x, frames << len(self.resamples) - stage))
        for block in self.blocks:
            x = block(x, frames)
        return x


class TemporalDecoder(nnx.Module):
    """The encoder mirrored: residual blocks, then each frame doubled and convolved."""

    def __init__(self, config: Emu3Config, *, lanes: int, rngs: nnx.Rngs):
        self.blocks = nnx.List([TemporalBlock(config, lanes=lanes, rngs=rngs) for _ in range(config.residual_blocks)])
        self.resamples = nnx.List(
            [CausalConv3d(config, (3, 3, 3), lanes=lanes, rngs=rngs) for _ in range(config.temporal_stages)]
        )

    def __call__(
        self, x: Float[Array, "batch frames lanes rows columns channels"], frames: Int[Array, " batch"]
    ) -> Float[Array, "batch time lanes rows columns channels"]:
        """Of each video so many frames of codes count."""
        for block in self.blocks:
            x = block(x, frames)
        for stage, resample in enumerate(self.resamples, 1):
            x = nnx.silu(resample(x.repeat(2, 1), frames << stage))
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
        self.to_code = CausalConv3d(config, (3, 1, 1), rngs=rngs)
        self.codebook = Codebook(config.codebook_size, channels, rngs=rngs)
        self.from_code = CausalConv3d(config, (3, 1, 1), rngs=rngs)
        self.temporal_decoder = TemporalDecoder(config, lanes=2, rngs=rngs)
        norm = functools.partial(SpatialNorm, guide_channels=channels)
        self.decoder = Decoder(config, norm, rngs=rngs)

    def code_vectors(self) -> Float[Array, "codes channels"]:
        """What is compared and decoded for each code."""
        return self.codebook.codebook()

    def latents(
        self, pixels: Float[Array, "batch *time height width 3"], frames: Int[Array, " batch"] | None = None
    ) -> Float[Array, "batch frames rows columns channels"]:
        """Continuous latents, as they are compared to code vectors, of pictures (one frame) or videos in [-1, 1].

        Args:
            frames: how many frames of codes count of each video of a stream.
        """
        *leading, height, width, _ = pixels.shape
        x = _a_few_at_a_time(self.encoder, height * width, pixels.reshape(-1, height, width, 3))
        x = x.reshape(*leading, *x.shape[1:])
        if len(leading) == 1:
            x = x[:, None].repeat(self.config.temporal_downsampling, 1)
        frames = jnp.full(len(x), x.shape[1] // self.config.temporal_downsampling) if frames is None else frames
        return self.to_code(self.temporal_encoder(x[:, :, None], frames), frames)[:, :, 0]

    def quantize(
        self, latents: Float[Array, "batch frames rows columns channels"]
    ) -> Int[Array, "batch frames rows columns"]:
        """Codes of latents."""
        pixels = latents.shape[2] * latents.shape[3] * self.config.downsampling**2
        codes = _a_few_at_a_time(self.codebook.encode, pixels, latents.reshape(-1, *latents.shape[2:]))
        return codes.reshape(latents.shape[:-1])

    def reconstruct(
        self, codes: Int[Array, "batch *frames rows columns"], frames: Int[Array, " batch"] | None = None
    ) -> Float[Array, "batch *time height width 3"]:
        """Pictures or videos, about within [-1, 1], of codes.

        Args:
            frames: how many frames of codes count of each video of a stream.
        """
        is_picture = codes.ndim == 3
        vectors = self.codebook.lookup(codes[:, None] if is_picture else codes)
        frames = jnp.full(len(vectors), vectors.shape[1]) if frames is None else frames
        vectors = vectors[:, :, None]
        latents = self.from_code(vectors, frames)
        # What is decoded and what guides the norms pass through time alike.
        both = self.temporal_decoder(jnp.concatenate([latents, vectors], 2), frames)
        both = both[:, :1] if is_picture else both
        latents, guide = (both[:, :, lane].reshape(-1, *both.shape[3:]) for lane in range(2))
        pixels = latents.shape[1] * latents.shape[2] * self.config.downsampling**2
        image = _a_few_at_a_time(self.decoder, pixels, latents, guide)
        return image if is_picture else image.reshape(len(codes), -1, *image.shape[1:])

    def encode(
        self, pixels: UInt8[Array, "batch *time height width 3"], frames: Int[Array, " batch"] | None = None
    ) -> Int[Array, "batch *frames rows columns"]:
        """Codes of pictures or videos; `frames` as in `latents`."""
        codes = self.quantize(self.latents(normalized(pixels), frames))
        return codes[:, 0] if pixels.ndim == 4 else codes

    def decode(
        self, codes: Int[Array, "batch *frames rows columns"], frames: Int[Array, " batch"] | None = None
    ) -> UInt8[Array, "batch *time height width 3"]:
        """Pictures or videos of codes; `frames` as in `reconstruct`."""
        return as_pixels(self.reconstruct(codes, frames))


class Emu3Tokenizer(GridTokenizer, VideoStreams):
    """Pictures uint8 [batch, height, width, 3] to codes [batch, rows, columns], videos uint8 [batch, time, height,
    width, 3] to codes [batch, frames, rows, columns], and back.

    A video whose length is no multiple of the stride goes on with its last frame; decoding cuts that off. Streams have
    frames of `image_size`.
    """

    type = "emu3"
    config_class = Emu3Config
    net_class = Emu3VQ
    modalities = ("image", "video")
    axes: ClassVar = (*GridTokenizer.axes, (("time", "height", "width"), ("frames", "rows", "columns")))
    encoding = ("temporal_encoder", "to_code")
    decoding = ("from_code", "temporal_decoder")

    def stream(self, rows: int = 1, *, frames: int = 1) -> Stream:
        """As `VideoStreams.stream`.

        Raises:
            UsageError: numbers that do not fit, or an `image_size` that has no whole number of codes.
        """
        if self.config.image_size % self.config.downsampling:
            raise UsageError(
                f"streams have frames of image_size, which is {self.config.image_size} and no multiple of "
                f"{self.config.downsampling}"
            )
        return super().stream(rows, frames=frames)


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
