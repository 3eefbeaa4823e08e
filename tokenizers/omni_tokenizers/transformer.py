"""A causal transformer over latents that attends to a window of what came before.

Sources: rotary positions (Su et al. 2021, arXiv:2104.09864), LayerScale (Touvron et al. 2021, arXiv:2103.17239), both
as Mimi has them (Défossez et al. 2024, arXiv:2410.00037).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from omni_tokenizers.carried import Carried, Carrier, Past

_PRECISION = jax.lax.Precision.HIGHEST


class CausalTransformer(Carrier, nnx.Module):
    """Layers of attention and MLP, each normalised before and scaled after; no normalisation at the end."""

    def __init__(
        self,
        dim: int,
        layers: int,
        *,
        heads: int,
        head_dim: int,
        mlp_dim: int,
        window: int,
        rope_theta: float,
        norm_epsilon: float,
        rngs: nnx.Rngs,
    ):
        self.head_dim, self.rope_theta = head_dim, rope_theta
        self.position = nnx.data(None)
        self.layers = nnx.List(
            [
                TransformerLayer(dim, heads, head_dim, mlp_dim, window=window, norm_epsilon=norm_epsilon, rngs=rngs)
                for _ in range(layers)
            ]
        )

    def start_stream(self, rows: int) -> None:
        self.position = Carried(jnp.zeros(rows, jnp.int32))

    def __call__(
        self, x: Float[Array, "batch time dim"], lengths: Int[Array, " batch"]
    ) -> Float[Array, "batch time dim"]:
        """Each position's output; a stream goes on from the position after `lengths` of them."""
        positions = jnp.arange(x.shape[1])
        if self.position is not None:
            positions = self.position[...][:, None] + positions
            self.position[...] = self.position[...] + lengths
        rotation = rotary(positions, self.head_dim, self.rope_theta)
        for layer in self.layers:
            x = layer(x, rotation, positions, lengths)
        return x


class TransformerLayer(nnx.Module):
    """x + a attention(norm(x)), then x + b mlp(norm(x)), with a and b for each channel."""

    def __init__(
        self, dim: int, heads: int, head_dim: int, mlp_dim: int, *, window: int, norm_epsilon: float, rngs: nnx.Rngs
    ):
        linear = functools.partial(nnx.Linear, use_bias=False, precision=_PRECISION, rngs=rngs)
        norm = functools.partial(nnx.LayerNorm, dim, epsilon=norm_epsilon, use_fast_variance=False, rngs=rngs)
        self.heads, self.window = heads, window
        self.past_keys, self.past_values = (Past(window - 1, heads, head_dim) for _ in range(2))
        self.attention_norm, self.mlp_norm = norm(), norm()
        self.query, self.key, self.value = (linear(dim, heads * head_dim) for _ in range(3))
        self.output = linear(heads * head_dim, dim)
        self.mlp_in, self.mlp_out = linear(dim, mlp_dim), linear(mlp_dim, dim)
        self.attention_scale, self.mlp_scale = (nnx.Param(jnp.full(dim, 0.01)) for _ in range(2))

    def __call__(
        self,
        x: Float[Array, "batch time dim"],
        rotation: tuple[Array, Array],
        positions: Int[Array, "*batch time"],
        lengths: Int[Array, " batch"],
    ) -> Float[Array, "batch time dim"]:
        inner = self.attention_norm(x)
        query, key, value = (
            linear(inner).reshape(*x.shape[:2], self.heads, -1) for linear in (self.query, self.key, self.value)
        )
        query, key = rotated(query, rotation), rotated(key, rotation)
        if self.past_keys.carried is None:
            mixed = windowed_attention(query, key, value, self.window)
        else:
            key, value = self.past_keys(key, lengths), self.past_values(value, lengths)
            mixed = attended(query, key, value, _seen(positions, self.window))
        x = x + self.attention_scale[...] * self.output(mixed.reshape(*x.shape[:2], -1))
        inner = nnx.gelu(self.mlp_in(self.mlp_norm(x)), approximate=False)
        return x + self.mlp_scale[...] * self.mlp_out(inner)


def rotary(positions: Int[Array, "*batch time"], head_dim: int, theta: float) -> tuple[Array, Array]:
    """Cosines and sines [*batch, time, 1, head_dim / 2] by which positions turn pairs of values."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2) / head_dim)
    angles = positions[..., None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotated(x: Float[Array, "batch time heads dim"], rotation: tuple[Array, Array]) -> Array:
    """`x` turned by its positions; the pairs are the values of its first and of its second half."""
    cosine, sine = rotation
    first, second = jnp.split(x, 2, -1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1)


def windowed_attention(
    query: Float[Array, "batch time heads dim"],
    key: Float[Array, "batch time heads dim"],
    value: Float[Array, "batch time heads dim"],
    window: int,
) -> Float[Array, "batch time heads dim"]:
    """Attention of each position to itself and the window - 1 before it.

    Blocks of at most `window` positions see themselves and the block before: memory grows with time, not its square.
    """
    batch, time, heads, dim = query.shape
    size = min(window, time)
    blocks = -(-time // size)

    def cut(x):
        return jnp.pad(x, ((0, 0), (0, blocks * size - time), (0, 0), (0, 0))).reshape(batch, blocks, size, heads, dim)

    def with_previous(x):
        return jnp.concatenate([jnp.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)))[:, :-1], x], 2)

    query, key, value = cut(query), with_previous(cut(key)), with_previous(cut(value))
    distance = size + jnp.arange(size)[:, None] - jnp.arange(2 * size)
    near = (distance >= 0) & (distance < window)
    present = (jnp.arange(blocks)[:, None] > 0) | (jnp.arange(2 * size) >= size)
    mixed = attended(query, key, value, near & present[:, None])
    return mixed.reshape(batch, blocks * size, heads, dim)[:, :time]


def attended(
    query: Float[Array, "*batch queries heads dim"],
    key: Float[Array, "*batch keys heads dim"],
    value: Float[Array, "*batch keys heads dim"],
    seen: Bool[Array, "*#batch queries keys"],
) -> Float[Array, "*batch queries heads dim"]:
    """Attention of each query to the keys that it sees, at least one."""
    scores = jnp.einsum("...qhd,...khd->...hqk", query, key, precision=_PRECISION) / query.shape[-1] ** 0.5
    scores = jnp.where(seen[..., None, :, :], scores, -jnp.inf)
    return jnp.einsum("...hqk,...khd->...qhd", jax.nn.softmax(scores, -1), value, precision=_PRECISION)


def _seen(positions: Int[Array, "batch time"], window: int) -> Bool[Array, "batch time keys"]:
    """Which keys, of the window - 1 positions before and the new ones, each new position attends to."""
    keys = positions[:, :1] - (window - 1) + jnp.arange(window - 1 + positions.shape[1])
    distance = positions[..., None] - keys[:, None]
    return (distance >= 0) & (distance < window) & (keys[:, None] >= 0)
