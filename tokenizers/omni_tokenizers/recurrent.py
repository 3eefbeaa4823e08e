"""Long short-term memory (Hochreiter and Schmidhuber 1997) as a scan over time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

_PRECISION = jax.lax.Precision.HIGHEST
_initial = nnx.initializers.lecun_normal()


class LSTM(nnx.Module):
    """Layers of equal width, each reading the states of the one before, from a state of zeros."""

    def __init__(self, dim: int, layers: int, *, rngs: nnx.Rngs):
        self.layers = nnx.List([LSTMLayer(dim, rngs=rngs) for _ in range(layers)])

    def __call__(self, x: Float[Array, "batch time dim"]) -> Float[Array, "batch time dim"]:
        x = x.swapaxes(0, 1)
        for layer in self.layers:
            x = layer(x)
        return x.swapaxes(0, 1)


class LSTMLayer(nnx.Module):
    """c' = sigmoid(f) c + sigmoid(i) tanh(g) and h' = sigmoid(o) tanh(c'); i, f, g, o = x W + h U + b + d.

    Both biases are kept apart, though only their sum counts, so that a checkpoint can be written as it was read.
    """

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.input_kernel = nnx.Param(_initial(rngs.params(), (dim, 4 * dim)))
        self.hidden_kernel = nnx.Param(_initial(rngs.params(), (dim, 4 * dim)))
        self.input_bias = nnx.Param(jnp.zeros(4 * dim))
        self.hidden_bias = nnx.Param(jnp.zeros(4 * dim))

    def __call__(self, x: Float[Array, "time batch dim"]) -> Float[Array, "time batch dim"]:
        # One product for all times; only h U has to wait for the step before.
        driven = jnp.einsum("tbd,dg->tbg", x, self.input_kernel[...], precision=_PRECISION)
        driven = driven + (self.input_bias[...] + self.hidden_bias[...])
        kernel = self.hidden_kernel[...]

        def step(state, drive):
            hidden, cell = state
            gates = drive + jnp.matmul(hidden, kernel, precision=_PRECISION)
            enter, keep, new, leave = jnp.split(gates, 4, -1)
            cell = nnx.sigmoid(keep) * cell + nnx.sigmoid(enter) * jnp.tanh(new)
            hidden = nnx.sigmoid(leave) * jnp.tanh(cell)
            return (hidden, cell), hidden

        zeros = jnp.zeros_like(x[0])
        return jax.lax.scan(step, (zeros, zeros), driven)[1]
