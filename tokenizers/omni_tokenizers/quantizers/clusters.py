"""Clusters of weighted latents: k-means, the statistics it and moving averages need, and draws without repetition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from omni_tokenizers.quantizers.base import EPSILON, PRECISION, nearest


def draw(mass: Float[Array, " n"], number: int, key: PRNGKeyArray) -> Int[Array, " number"]:
    """Indices in proportion to `mass`, one from each of `number` equal strata (so distinct where none weighs more)."""
    cumulative = jnp.cumsum(mass)
    points = (jnp.arange(number) + jax.random.uniform(key, (number,))) / number * cumulative[-1]
    points = jnp.minimum(points, jnp.nextafter(cumulative[-1], 0.0))
    return jnp.clip(jnp.searchsorted(cumulative, points, side="right"), 0, len(mass) - 1)


def k_means(
    latents: Float[Array, "n dim"], weights: Float[Array, " n"], codes: int, iterations: int, key: PRNGKeyArray
) -> tuple[Float[Array, " codes"], Float[Array, "codes dim"]]:
    """Lloyd's iterations from a weighted random start; returns each cluster's count and sum.

    Empty clusters move to latents drawn in proportion to squared distance (k-means++, Arthur and Vassilvitskii 2007).
    """

    def improve(index, centers):
        assigned, distances = nearest(latents, centers)
        counts, sums = statistics(latents, weights, assigned, codes)
        fresh = latents[draw(weights * distances, codes, jax.random.fold_in(key, index + 1))]
        return jnp.where(counts[:, None] > 0, sums / jnp.maximum(counts, EPSILON)[:, None], fresh)

    start = latents[draw(weights, codes, jax.random.fold_in(key, 0))]
    centers = jax.lax.fori_loop(0, iterations, improve, start)
    return statistics(latents, weights, nearest(latents, centers)[0], codes)


def statistics(
    latents: Float[Array, "n dim"], weights: Float[Array, " n"], codes: Int[Array, " n"], number: int
) -> tuple[Float[Array, " codes"], Float[Array, "codes dim"]]:
    """Weighted count and sum of the latents of each code."""
    chosen: Bool[Array, "n codes"] = jax.nn.one_hot(codes, number) * weights[:, None]
    sums = jnp.einsum("nk,nd->kd", chosen, latents, precision=PRECISION)
    return chosen.sum(0), sums
