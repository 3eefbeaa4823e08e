"""Maps and convolutions over channels-last arrays, which pad nothing: how an edge is padded is each codec's own affair.

Kernels are [inputs, outputs], [width, inputs, outputs] (1-D), [height, width, inputs, outputs] (2-D) and [time, height,
width, inputs, outputs] (3-D). Training on several devices may split them by outputs (axis "embed").
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

_PRECISION = jax.lax.Precision.HIGHEST
_initial = nnx.initializers.lecun_normal()

Linear = functools.partial(nnx.Linear, kernel_metadata={"axes": (None, "embed")})
"""y = x kernel + bias: a layer of `nnx` with an axis by which its kernel may be split."""


def elu(x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """x above 0, exp(x) - 1 below (Clevert et al. 2015, arXiv:1511.07289, equation 15), within 1e-7.

    `jnp.expm1`, which keeps the digits of values near 0 that the next sum loses, takes CPUs three times as long.
    """
    return jnp.where(x > 0, x, jnp.exp(jnp.minimum(x, 0)) - 1)


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

    def __call__(
        self, x: Float[Array, "batch time inputs"], zeros: tuple[int, int] = (0, 0)
    ) -> Float[Array, "batch frames outputs"]:
        """`zeros` are how many `x` is taken to have before and after it."""
        y = jax.lax.conv_general_dilated(
            x,
            self.kernel[...],
            window_strides=(self.stride,),
            padding=[zeros],
            rhs_dilation=(self.dilation,),
            dimension_numbers=("NHC", "HIO", "NHC"),
            feature_group_count=self.groups,
            precision=_PRECISION,
        )
        return y if self.bias is None else y + self.bias[...]


class ConvTranspose1d(nnx.Module):
    """y[t * stride + k] += x[t] kernel[k] (+ bias): (frames - 1) * stride + width samples."""

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
        width, inputs, outputs = kernel.shape
        batch, frames, _ = x.shape
        kernel = jnp.pad(kernel, ((0, -width % stride), (0, 0), (0, 0)))
        if self.groups == 1 and batch * frames < inputs:
            y = _transposed_by_position(x, kernel, stride)
        else:
            y = _transposed_by_frame(x, kernel, stride, self.groups)
        return y.reshape(batch, -1, outputs)[:, : (frames - 1) * stride + width]


def _transposed_by_position(
    x: Float[Array, "batch frames inputs"], kernel: Float[Array, "width inputs outputs"], stride: int
) -> Float[Array, "batch pieces stride outputs"]:
    """A product for each position in the kernel, then the sum of what overlaps.

    It reads the kernel as it lies, which counts where there is more of it than of `x`.
    """
    batch, frames, inputs = x.shape
    width, _, outputs = kernel.shape
    rows = jnp.broadcast_to(x.reshape(-1, inputs), (width, batch * frames, inputs))
    product = jnp.einsum("kni,kio->kno", rows, kernel, precision=_PRECISION)
    product = product.reshape(-1, stride, batch, frames, outputs).transpose(0, 2, 3, 1, 4)
    last = len(product) - 1
    return sum(jnp.pad(piece, ((0, 0), (i, last - i), (0, 0), (0, 0))) for i, piece in enumerate(product))


def _transposed_by_frame(
    x: Float[Array, "batch frames inputs"], kernel: Float[Array, "width inputs outputs"], stride: int, groups: int
) -> Float[Array, "batch pieces stride outputs"]:
    """A convolution that gives the `stride` samples of a piece at once: nothing is written twice."""
    width, inputs, outputs = kernel.shape
    pieces = width // stride
    kernel = kernel.reshape(pieces, stride, inputs, groups, outputs // groups)[::-1].transpose(0, 2, 3, 1, 4)
    y = jax.lax.conv_general_dilated(
        # A padding of the convolution itself, longer than its kernel keeps lengths, makes XLA's gradient of the kernel
        # a hundred times slower on CPUs.
        jnp.pad(x, ((0, 0), (pieces - 1, pieces - 1), (0, 0))),
        kernel.reshape(pieces, inputs, stride * outputs),
        window_strides=(1,),
        padding=[(0, 0)],
        dimension_numbers=("NHC", "HIO", "NHC"),
        feature_group_count=groups,
        precision=_PRECISION,
    )
    return y.reshape(len(x), -1, groups, stride, outputs // groups).swapaxes(2, 3)


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
