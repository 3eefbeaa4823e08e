"""Norms over the last axis, computed in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*batch dim"], scale: Float[Array, "*own dim"], epsilon: float
) -> Float[Array, "*batch dim"]:
    """Root-mean-square norm (Zhang and Sennrich 2019, arXiv:1910.07467)."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + epsilon) * scale).astype(x.dtype)


def layer_norm(
    x: Float[Array, "*batch dim"], scale: Float[Array, "*own dim"], bias: Float[Array, "*own dim"], epsilon: float
) -> Float[Array, "*batch dim"]:
    """LayerNorm (Ba et al. 2016, arXiv:1607.06450)."""
    centred = x.astype(jnp.float32)
    centred -= jnp.mean(centred, axis=-1, keepdims=True)
    return (rms_norm(centred, scale, epsilon) + bias).astype(x.dtype)
