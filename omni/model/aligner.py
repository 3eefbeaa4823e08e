"""Perceptrons that bring what is not text into the stream of a transformer, as Janus has them (arXiv:2410.13848)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class Aligner(nnx.Module):
    """Linear maps with GELUs between them, to the width of the stream.

    Matrices are [outputs, inputs]; those behind the first stand in one stack.
    """

    def __init__(self, inputs: int, outputs: int, depth: int, *, rngs: nnx.Rngs):
        self.enter = random_matrix(rngs, ("embed", None), outputs, inputs)
        self.enter_bias = zeros(("embed",), outputs)
        if depth > 1:
            self.layers = random_matrix(rngs, ("layers", None, "embed"), depth - 1, outputs, outputs)
            self.layers_bias = zeros(("layers", None), depth - 1, outputs)
        self.depth = depth

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        """In the type of `x`."""
        x = affine(x, self.enter[...], self.enter_bias[...])
        for layer in range(self.depth - 1):
            x = affine(gelu(x), self.layers[layer], self.layers_bias[layer])
        return x


def affine(
    x: Float[Array, "*batch inputs"], matrix: Float[Array, "outputs inputs"], bias: Float[Array, " outputs"]
) -> Float[Array, "*batch outputs"]:
    """A linear map with a bias, in the type of `x`."""
    return jnp.einsum("...i,oi->...o", x, matrix.astype(x.dtype)) + bias.astype(x.dtype)


def gelu(x: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Hendrycks and Gimpel 2016 (arXiv:1606.08415), by the error function."""
    return jax.nn.gelu(x, approximate=False)


def random_matrix(rngs: nnx.Rngs, axes: tuple[str | None, ...], *shape: int) -> nnx.Param:
    """A matrix or a stack of such, whose last axis is summed over."""
    return nnx.Param(jax.nn.initializers.truncated_normal(shape[-1] ** -0.5)(rngs.params(), shape), axes=axes)


def zeros(axes: tuple[str | None, ...], *shape: int) -> nnx.Param:
    """A bias or a stack of such."""
    return nnx.Param(jnp.zeros(shape), axes=axes)
