"""Convolutional vector-quantised video tokenizer, causal in time and made mostly of matrix products.

Causal convolutions over time and a first frame that has codes of its own, so that one net reads pictures and videos,
are those of MAGVIT-v2 (Yu et al. 2023, arXiv:2310.05737), OmniTokenizer (Wang et al. 2024, arXiv:2406.09399) and Cosmos
(NVIDIA 2025, arXiv:2501.03575), who factorise space and time too. As in `image`, a space-to-depth stem takes whole
patches, here of space and time, so that every convolution runs at low resolution and at the rate of codes.

Norms see one place at a time and convolutions over time reach back alone, so the net of whole videos is the net of
streams.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from omni_tokenizers.carried import Past
from omni_tokenizers.errors import UsageError
from omni_tokenizers.image import Convolution, ResidualBlock, as_pixels, depth_to_space, normalized, space_to_depth
from omni_tokenizers.layers import Linear
from omni_tokenizers.losses.image import ImageLosses
from omni_tokenizers.quantizers import Quantized, SingleQuantizerConfig, VectorQuantizerConfig, make_quantizer
from omni_tokenizers.video_streaming import SteppedVideoTokenizer

# Bounds for descriptions that come with files from elsewhere.
_LARGEST = 1 << 20
_DEEPEST = 64


@dataclasses.dataclass(frozen=True)
class VideoTokenizerConfig:
    """A tokenizer of square videos; the default turns 4 frames of 8 x 8 pixels into a code."""

    image_size: int = 128
    """Height and width in pixels."""
    patch_size: int = 8
    """Pixels along each side of the patches that the stem reads."""
    temporal_downsampling: int = 4
    """Frames that one code stands for, but for the first frame of a video, which has codes of its own."""
    channels: int = 128
    """Channels of the first stage."""
    multipliers: tuple[int, ...] = (1,)
    """Channels of each stage as multiples of `channels`; each stage after the first halves the resolution."""
    residual_blocks: int = 2
    """Pairs of residual blocks, over space and over time, in each stage, in the encoder and in the decoder."""
    quantizer: SingleQuantizerConfig = dataclasses.field(
        default_factory=lambda: VectorQuantizerConfig(codebook_size=1024, dim=16)
    )
    """The quantiser of its latents."""

    def __post_init__(self):
        codes = self.quantizer  # has checked its own settings
        sizes = (self.image_size, self.patch_size, self.temporal_downsampling, self.channels, *self.multipliers)
        if max(*sizes, codes.codebook_size, codes.dim) > _LARGEST:
            raise UsageError(f"sizes go up to {_LARGEST}")
        if max(len(self.multipliers), self.residual_blocks) > _DEEPEST:
            raise UsageError(f"stages and residual_blocks go up to {_DEEPEST}")
        if min(*sizes, len(self.multipliers)) < 1:
            raise UsageError(
                "image_size, patch_size, temporal_downsampling, channels and multipliers must be positive, with one "
                "stage at least"
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
    def strides(self) -> tuple[int, int, int]:
        """Frames and pixels that one code stands for: in time, downwards and across."""
        return (self.temporal_downsampling, self.downsampling, self.downsampling)

    @property
    def losses(self) -> ImageLosses:
        """What a training has where it names no others."""
        return ImageLosses()


class TemporalBlock(nnx.Module):
    """x + linear(silu(conv(silu(norm(x))))): each place of a frame with the same place of the two frames before it."""

    def __init__(self, channels: int, side: int, *, rngs: nnx.Rngs):
        self.past = Past(2, side, side, channels)
        self.norm = nnx.RMSNorm(channels, rngs=rngs)
        self.mix = Linear(3 * channels, channels, rngs=rngs)
        self.out = Linear(channels, channels, rngs=rngs, kernel_init=nnx.initializers.zeros)

    def __call__(
        self, x: Float[Array, "batch frames rows columns channels"], lengths: Int[Array, " batch"]
    ) -> Float[Array, "batch frames rows columns channels"]:
        frames = self.past(nnx.silu(self.norm(x)), lengths)
        together = jnp.concatenate([frames[:, i : i + x.shape[1]] for i in range(3)], -1)
        return x + self.out(nnx.silu(self.mix(together)))


class VideoBlock(nnx.Module):
    """A residual block over space, then one over time: (2+1)-dimensional."""

    def __init__(self, channels: int, side: int, *, rngs: nnx.Rngs):
        self.space = ResidualBlock(channels, rngs=rngs)
        self.time = TemporalBlock(channels, side, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch frames rows columns channels"], lengths: Int[Array, " batch"]
    ) -> Float[Array, "batch frames rows columns channels"]:
        """The first `lengths` frames of each video count."""
        return self.time(each_frame(self.space, x), lengths)


class VideoAutoencoder(nnx.Module):
    """Encoder, quantiser and mirrored decoder of videos whose time is a multiple of the stride."""

    last_layer = ("head",)
    """Path of the layer that makes pixels."""

    def __init__(self, config: VideoTokenizerConfig, *, rngs: nnx.Rngs):
        self.config = config
        widths = [config.channels * multiplier for multiplier in config.multipliers]
        sides = [config.image_size // config.patch_size >> stage for stage in range(len(widths))]
        pixels = 3 * config.temporal_downsampling * config.patch_size**2

        def stages():
            each = [[VideoBlock(*sizes, rngs=rngs) for _ in range(config.residual_blocks)] for sizes in shapes]
            return nnx.List([nnx.List(blocks) for blocks in each])

        shapes, pairs = list(zip(widths, sides, strict=True)), list(itertools.pairwise(widths))
        self.stem = Linear(pixels, widths[0], rngs=rngs)
        self.encoder = stages()
        self.down = nnx.List([Linear(4 * inner, outer, rngs=rngs) for inner, outer in pairs])
        self.to_code = Linear(widths[-1], config.quantizer.dim, rngs=rngs)
        self.quantizer = make_quantizer(config.quantizer, rngs=rngs)
        self.from_code = Convolution(config.quantizer.dim, widths[-1], rngs=rngs)
        self.decoder = stages()
        self.up = nnx.List([Linear(outer, 4 * inner, rngs=rngs) for inner, outer in pairs])
        self.norm = nnx.RMSNorm(widths[0], rngs=rngs)
        self.head = Linear(widths[0], pixels, rngs=rngs)

    def latents(
        self, video: Float[Array, "batch time height width 3"], frames: Int[Array, " batch"]
    ) -> Float[Array, "batch frames rows columns dim"]:
        """Continuous latents of videos within [-1, 1], of which so many frames of codes count."""
        x = patches(video.astype(self.stem.kernel.dtype), self.config.temporal_downsampling, self.config.patch_size)
        x = self.stem(x)
        for stage, blocks in enumerate(self.encoder):
            x = self.down[stage - 1](each_frame(lambda y: space_to_depth(y, 2), x)) if stage else x
            for block in blocks:
                x = block(x, frames)
        return self.to_code(x)

    def reconstruct(
        self, latents: Float[Array, "batch frames rows columns dim"], frames: Int[Array, " batch"]
    ) -> Float[Array, "batch time height width 3"]:
        """Videos, about within [-1, 1], of quantised latents, of which so many frames count."""
        x = each_frame(self.from_code, latents)
        for stage in reversed(range(len(self.decoder))):
            for block in self.decoder[stage]:
                x = block(x, frames)
            x = each_frame(lambda y: depth_to_space(y, 2), self.up[stage - 1](x)) if stage else x
        x = self.head(nnx.silu(self.norm(x)))
        return from_patches(x, self.config.temporal_downsampling, self.config.patch_size)

    def encode(
        self, video: UInt8[Array, "batch time height width 3"], frames: Int[Array, " batch"]
    ) -> Int[Array, "batch frames rows columns"]:
        """Codes of videos, of which so many frames of codes count."""
        return self.quantizer(self.latents(normalized(video), frames), training=False).codes

    def decode(
        self, codes: Int[Array, "batch frames rows columns"], frames: Int[Array, " batch"]
    ) -> UInt8[Array, "batch time height width 3"]:
        """Videos of codes, of which so many frames count."""
        return as_pixels(self.reconstruct(self.quantizer.lookup(codes), frames))

    def autoencode(
        self, video: Float[Array, "batch time height width 3"], key: PRNGKeyArray | None, *, training: bool
    ) -> tuple[Float[Array, "batch time height width 3"], Quantized]:
        """Reconstructions of videos within [-1, 1], of one frame and any multiple of the stride, and what the quantiser
        says; `training` moves its codebook."""
        lead = self.config.temporal_downsampling - 1
        video = jnp.concatenate([video[:, :1].repeat(lead, 1), video], 1)
        frames = jnp.full(len(video), video.shape[1] // self.config.temporal_downsampling)
        quantized = self.quantizer(self.latents(video, frames), key, training=training)
        return self.reconstruct(quantized.quantized, frames)[:, lead:], quantized


class VideoTokenizer(SteppedVideoTokenizer):
    """Square videos, and pictures, to codes and back."""

    type = "video"
    config_class = VideoTokenizerConfig
    net_class = VideoAutoencoder
    takes_any_size = False
    """Whether frames may have another size than `image_size`."""

    def __init__(self, config: VideoTokenizerConfig, net: VideoAutoencoder):
        super().__init__(config, net)
        side = config.image_size // config.downsampling
        self.image_size = config.image_size
        self.grid = (side, side)
        self.lead = config.temporal_downsampling - 1
        self.codebook_sizes = (config.quantizer.codebook_size,)

    @property
    def code_vectors(self) -> tuple[Float[np.ndarray, "codes code_dim"]]:
        """The vectors of the codes, float32."""
        return (np.asarray(self.net.quantizer.codebook()),)


def each_frame(
    function: Callable[[Array], Array], video: Float[Array, "batch frames height width inputs"]
) -> Float[Array, "batch frames rows columns outputs"]:
    """`function` of pictures, of every frame."""
    y = function(video.reshape(-1, *video.shape[2:]))
    return y.reshape(*video.shape[:2], *y.shape[1:])


def patches(
    video: Float[Array, "batch time height width 3"], time: int, size: int
) -> Float[Array, "batch frames rows columns values"]:
    """Cuts boxes of `time` frames of size x size pixels and stacks each box's values as channels."""
    x = each_frame(lambda frames: space_to_depth(frames, size), video)
    batch, _, rows, columns, values = x.shape
    x = jnp.moveaxis(x.reshape(batch, -1, time, rows, columns, values), 2, 4)
    return x.reshape(batch, -1, rows, columns, time * values)


def from_patches(
    x: Float[Array, "batch frames rows columns values"], time: int, size: int
) -> Float[Array, "batch time height width 3"]:
    """Inverse of `patches`."""
    batch, _, rows, columns, values = x.shape
    x = jnp.moveaxis(x.reshape(batch, -1, rows, columns, time, values // time), 4, 2)
    return each_frame(lambda frames: depth_to_space(frames, size), x.reshape(batch, -1, rows, columns, values // time))
