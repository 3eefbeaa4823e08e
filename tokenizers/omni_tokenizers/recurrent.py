"""Long short-term memory (Hochreiter and Schmidhuber 1997) as a scan over time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from omni_tokenizers.carried import Carried, Carrier, latest

_PRECISION = jax.lax.Precision.HIGHEST
_initial = nnx.initializers.lecun_normal()


class LSTM(nnx.Module):
    """Layers of equal width, each reading the states of the one before, from a state of zeros."""

    def __init__(self, dim: int, layers: int, *, rngs: nnx.Rngs):
        self.layers = nnx.List([LSTMLayer(dim, rngs=rngs) for _ in range(layers)])

    def __call__(
        self, x: Float[Array, "batch time dim"], lengths: Int[Array, " batch"]
    ) -> Float[Array, "batch time dim"]:
        """The last layer's states; a stream goes on from those after `lengths` frames."""
        x = x.swapaxes(0, 1)
        for layer in self.layers:
            x = layer(x, lengths)
        return x.swapaxes(0, 1)


class LSTMLayer(Carrier, nnx.Module):
    """c' = sigmoid(f) c + sigmoid(i) tanh(g) and h' = sigmoid(o) tanh(c'); i, f, g, o = x W + h U + b + d.

    Both biases are kept apart, though only their sum counts, so that a checkpoint can be written as it was read.
    """

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.input_kernel = nnx.Param(_initial(rngs.params(), (dim, 4 * dim)))
        self.hidden_kernel = nnx.Param(_initial(rngs.params(), (dim, 4 * dim)))
        self.input_bias = nnx.Param(jnp.zeros(4 * dim))
        self.hidden_bias = nnx.Param(jnp.zeros(4 * dim))
        self.carried = nnx.data(None)

    def start_stream(self, rows: int) -> None:
        self.carried = Carried(jnp.zeros((rows, 2, self.hidden_kernel.shape[0])))

    def __call__(
        self, x: Float[Array, "time batch dim"], lengths: Int[Array, " batch"]
    ) -> Float[Array, "time batch dim"]:
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
            return (hidden, cell), (hidden, cell)

        zeros = jnp.zeros_like(x[0])
        start = (zeros, zeros) if self.carried is None else tuple(self.carried[...].swapaxes(0, 1))
        hidden, cell = jax.lax.scan(step, start, driven)[1]
        if self.carried is not None:
            states = jnp.concatenate([self.carried[...][:, None], jnp.stack([hidden, cell], 2).swapaxes(0, 1)], 1)
            self.carried[...] = latest(states, lengths, 1)[:, 0]
        return hidden
