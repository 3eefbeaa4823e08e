"""Convolutions that pad their own edges, over clips of several lengths in one array.

Everywhere `lengths` are the frames that each clip has at a layer's input; the rest of its row may hold anything and
changes nothing. An array's length is a multiple of every stride on its way, so that shapes follow from it alone.

A causal convolution with reach r and stride s reads r - s frames to the left of what is new, and a transposed one
leaves an overlap of width - s: what a stream has to carry. Only here are edges padded.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from omni_tokenizers.layers import Conv1d, ConvTranspose1d

Padding = Literal["constant", "reflect", "replicate"]
PADDINGS = ("constant", "reflect", "replicate")


class PaddedConv1d(Conv1d):
    """A convolution that gives ceil(n / stride) frames for n: padded on both sides, or on the left alone if `causal`.

    Of the reach - stride frames of padding the left has the larger half; the right has what completes a stride besides
    (EnCodec, Défossez et al. 2022, and its public code).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        width: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        causal: bool,
        padding: Padding,
        group_norm: bool = False,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        super().__init__(inputs, outputs, width, stride=stride, dilation=dilation, use_bias=use_bias, rngs=rngs)
        total = self.reach - stride
        self.right = 0 if causal else total // 2
        self.left = total - self.right
        self.padding = padding
        self.norm = TimeGroupNorm(outputs, rngs=rngs) if group_norm else None

    def frames(self, lengths: Int[Array, " batch"]) -> Int[Array, " batch"]:
        """Frames that come out where `lengths` go in."""
        return -(-lengths // self.stride)

    def __call__(
        self, x: Float[Array, "batch time inputs"], lengths: Int[Array, " batch"]
    ) -> Float[Array, "batch frames outputs"]:
        y = super().__call__(padded(x, lengths, self.left, self.right, self.stride, self.padding))
        return y if self.norm is None else self.norm(y, self.frames(lengths))


class TrimmedConvTranspose1d(ConvTranspose1d):
    """A transposed convolution that gives n * stride samples for n frames.

    It cuts what hangs over: on the right alone if `causal`, else on both sides, the left having the larger half.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        width: int,
        *,
        stride: int,
        groups: int = 1,
        causal: bool,
        group_norm: bool = False,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        super().__init__(inputs, outputs, width, stride=stride, groups=groups, use_bias=use_bias, rngs=rngs)
        self.overhang = width - stride
        self.left = 0 if causal else self.overhang - self.overhang // 2
        self.norm = TimeGroupNorm(outputs, rngs=rngs) if group_norm else None

    def __call__(
        self, x: Float[Array, "batch frames inputs"], lengths: Int[Array, " batch"]
    ) -> Float[Array, "batch time outputs"]:
        y = super().__call__(silenced(x, lengths))
        if self.norm is not None:
            y = self.norm(y, lengths * self.stride + self.overhang)
        return y[:, self.left : self.left + x.shape[1] * self.stride]


class TimeGroupNorm(nnx.Module):
    """Normalises each clip over its frames and channels together, then scales and shifts each channel."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(
        self, x: Float[Array, "batch time channels"], lengths: Int[Array, " batch"]
    ) -> Float[Array, "batch time channels"]:
        count = (jnp.maximum(lengths, 1) * x.shape[-1])[:, None, None]
        wide = x.astype(jnp.float32)
        mean = silenced(wide, lengths).sum((1, 2), keepdims=True) / count
        variance = jnp.square(silenced(wide - mean, lengths)).sum((1, 2), keepdims=True) / count
        return ((wide - mean) * jax.lax.rsqrt(variance + 1e-5) * self.scale[...] + self.bias[...]).astype(x.dtype)


def silenced(x: Float[Array, "batch time channels"], lengths: Int[Array, " batch"]) -> Array:
    """`x` with zeros after each clip's end."""
    inside = jnp.arange(x.shape[1]) < lengths[:, None]
    return jnp.where(inside[..., None], x, 0)


def padded(
    x: Float[Array, "batch time channels"],
    lengths: Int[Array, " batch"],
    left: int,
    right: int,
    stride: int,
    padding: Padding,
) -> Float[Array, "batch padded channels"]:
    """`x` with `left` frames before it, and `right` and what completes a stride after each clip's own end.

    "constant" pads zeros, "replicate" the first and last frame, "reflect" mirrors around them; a clip too short for
    its reflection first gets zeros at its end, as the public codecs do.
    """
    x = silenced(x, lengths)
    sides = ((0, 0), (left, right), (0, 0))
    if padding == "constant":
        return jnp.pad(x, sides)
    reach = right + stride - 1  # the most that any clip needs after its end
    if padding == "replicate":
        before = jnp.broadcast_to(x[:, :1], (len(x), left, x.shape[2]))
        source, target = lengths[:, None] - 1, lengths[:, None]
    else:
        before = jnp.pad(x, ((0, 0), (0, max(0, left + 1 - x.shape[1])), (0, 0)))[:, left:0:-1]
        needed = jnp.maximum(left, right + -lengths % stride)
        target = jnp.maximum(lengths, needed + 1)[:, None]
        source = target - 2 - jnp.arange(reach)
    whole = jnp.pad(x, sides) if left == 0 else jnp.concatenate([before, jnp.pad(x, ((0, 0), (0, right), (0, 0)))], 1)
    if reach == 0:
        return whole
    after = jnp.take_along_axis(x, jnp.maximum(source, 0)[..., None], 1, mode="fill", fill_value=0)
    target = left + target + jnp.arange(reach)
    return whole.at[jnp.arange(len(x))[:, None], target].set(after, mode="drop")
