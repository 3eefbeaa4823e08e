"""Convolutions over channels-last arrays, which pad nothing: how an edge is padded is each codec's own affair.

Kernels are [width, inputs, outputs] (1-D), [height, width, inputs, outputs] (2-D) and [time, height, width, inputs,
outputs] (3-D). Training on several devices may split them by outputs (axis "embed").
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

_PRECISION = jax.lax.Precision.HIGHEST
_initial = nnx.initializers.lecun_normal()


class Conv1d(nnx.Module):
    """y[t] = sum over k of x[t * stride + k * dilation] kernel[k] (+ bias)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        width: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        self.stride, self.dilation, self.groups = stride, dilation, groups
        self.kernel = nnx.Param(_initial(rngs.params(), (width, inputs // groups, outputs)), axes=(None, None, "embed"))
        self.bias = nnx.Param(jnp.zeros(outputs)) if use_bias else nnx.data(None)

    @property
    def reach(self) -> int:
        """Samples under the kernel."""
        return (self.kernel.shape[0] - 1) * self.dilation + 1

    def __call__(self, x: Float[Array, "batch time inputs"]) -> Float[Array, "batch frames outputs"]:
        kernel = self.kernel[...]
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(self.stride,),
            padding="VALID",
            rhs_dilation=(self.dilation,),
            dimension_numbers=("NHC", "HIO", "NHC"),
            feature_group_count=self.groups,
            precision=_PRECISION,
        )
        return y if self.bias is None else y + self.bias[...]


class ConvTranspose1d(nnx.Module):
    """y[t * stride + k] += x[t] kernel[k] (+ bias): (frames - 1) * stride + width samples.

    One product gives what each frame adds; pieces of `stride` samples are then summed where they overlap.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        width: int,
        *,
        stride: int,
        groups: int = 1,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        self.stride, self.groups = stride, groups
        self.kernel = nnx.Param(_initial(rngs.params(), (width, inputs // groups, outputs)), axes=(None, None, "embed"))
        self.bias = nnx.Param(jnp.zeros(outputs)) if use_bias else nnx.data(None)

    def __call__(self, x: Float[Array, "batch frames inputs"]) -> Float[Array, "batch time outputs"]:
        y = self.without_bias(x)
        return y if self.bias is None else y + self.bias[...]

    def without_bias(self, x: Float[Array, "batch frames inputs"]) -> Float[Array, "batch time outputs"]:
        """The sum alone: where a stream cuts it, what overlaps is added up before the bias is."""
        kernel, stride = self.kernel[...], self.stride
        width, _, outputs = kernel.shape
        batch, frames, _ = x.shape
        pieces = -(-width // stride)
        kernel = jnp.pad(kernel, ((0, pieces * stride - width), (0, 0), (0, 0)))
        grouped = x.reshape(batch, frames, self.groups, -1)
        kernel = kernel.reshape(pieces * stride, -1, self.groups, outputs // self.groups)
        product = jnp.einsum("btgi,kigo->btkgo", grouped, kernel, precision=_PRECISION)
        product = product.reshape(batch, frames, pieces, stride * outputs)
        y = sum(jnp.pad(product[:, :, i], ((0, 0), (i, pieces - 1 - i), (0, 0))) for i in range(pieces))
        return y.reshape(batch, -1, outputs)[:, : (frames - 1) * stride + width]


class Conv2d(nnx.Module):
    """y[r, c] = sum over i, j of x[r * stride + i, c * stride + j] kernel[i, j] (+ bias)."""

    def __init__(self, inputs: int, outputs: int, size: int, *, stride: int = 1, use_bias: bool = True, rngs: nnx.Rngs):
        self.stride = stride
        self.kernel = nnx.Param(
            _initial(rngs.params(), (size, size, inputs, outputs)), axes=(None, None, None, "embed")
        )
        self.bias = nnx.Param(jnp.zeros(outputs)) if use_bias else nnx.data(None)

    def __call__(self, x: Float[Array, "batch height width inputs"]) -> Float[Array, "batch rows columns outputs"]:
        y = jax.lax.conv_general_dilated(
            x,
            self.kernel[...],
            window_strides=(self.stride, self.stride),
            padding="VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=_PRECISION,
        )
        return y if self.bias is None else y + self.bias[...]


class Conv3d(nnx.Module):
    """y[t, r, c] = sum over i, j, k of x[t * time_stride + i, r + j, c + k] kernel[i, j, k] + bias."""

    def __init__(self, inputs: int, outputs: int, size: tuple[int, int, int], *, time_stride: int = 1, rngs: nnx.Rngs):
        self.time_stride = time_stride
        self.kernel = nnx.Param(
            _initial(rngs.params(), (*size, inputs, outputs)), axes=(None, None, None, None, "embed")
        )
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(
        self, x: Float[Array, "batch time height width inputs"]
    ) -> Float[Array, "batch frames rows columns outputs"]:
        y = jax.lax.conv_general_dilated(
            x,
            self.kernel[...],
            window_strides=(self.time_stride, 1, 1),
            padding="VALID",
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
            precision=_PRECISION,
        )
        return y + self.bias[...]
