"""Choosing a token from logits: penalty, mask, temperature, top-k, top-p, min-p, draw, in the order of transformers.

Every row has its own settings and key.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

Weights = Float[Array, "rows vocabulary"]
BLOCK = 128  # ids that are summed together to find the drawn one in two short searches


def sample(
    logits: Float[Array, "rows vocabulary"],
    admitted: Bool[Array, "rows vocabulary"],
    keys: PRNGKeyArray,
    temperature: Float[Array, " rows"],
    top_k: Int[Array, " rows"],
    top_p: Float[Array, " rows"],
    min_p: Float[Array, " rows"],
) -> tuple[Int[Array, " rows"], Float[Array, " rows"]]:
    """One admitted id per row, and its log-probability; anything where a row admits none.

    A draw inverts the distribution function with one uniform number per row: the Gumbel trick would need random bits
    for the whole vocabulary, several times the cost of all the rest. At temperature 0 all weight lies on the likeliest
    ids and the number is 0, so that greedy rows walk the same path.

    Args:
      keys: one per row.
      temperature: 0 takes the likeliest id, of equals (within 6e-8 of a logit) the first.
      top_k: only the k likeliest ids (and their equals), 0 for all.
      top_p: nucleus (Holtzman et al. 2019, arXiv:1904.09751), after top-k: the fewest ids that have this share.
      min_p: after top-p (Nguyen et al. 2024, arXiv:2407.01082): only ids at least this share as likely as the
        likeliest, 0 for all.

    Returns:
      The ids, and the logarithm of the probability that each had in this very draw: after mask, temperature, top-k,
      top-p and min-p. At temperature 0 the id was certain, and it is 0.
    """
    weights = weigh(logits, admitted, temperature, top_k, top_p, min_p)
    uniform = jnp.where(temperature > 0, jax.vmap(jax.random.uniform)(keys), 0)
    ids = draw(weights, uniform)
    drawn = jnp.take_along_axis(weights, ids[:, None], axis=-1)[:, 0]
    log_probability = jnp.log(drawn) - jnp.log(jnp.sum(weights, axis=-1))
    return ids, jnp.where(temperature > 0, log_probability, 0)


def weigh(
    logits: Float[Array, "rows vocabulary"],
    admitted: Bool[Array, "rows vocabulary"],
    temperature: Float[Array, " rows"],
    top_k: Int[Array, " rows"],
    top_p: Float[Array, " rows"],
    min_p: Float[Array, " rows"],
) -> Weights:
    """The distribution that `sample` draws from, times what makes the likeliest id's weight 1."""
    logits = jnp.where(admitted, logits, -jnp.inf)
    peak = jnp.max(logits, axis=-1, keepdims=True)
    # The compiler may compute logits anew here, and round them otherwise than those of the peak: nothing is divided by
    # so little that this difference would count.
    scale = jnp.where(temperature > 0, jnp.maximum(temperature, 1e-4), 1)[:, None]
    weights = jnp.exp((logits - jnp.where(jnp.isfinite(peak), peak, 0)) / scale)
    weights = jnp.where(admitted, weights, 0)  # an infinite scale would make -inf / inf, which is NaN
    weights = jax.lax.cond(jnp.any(top_k > 0), keep_top_k, lambda weights, _: weights, weights, top_k)
    weights = jax.lax.cond(jnp.any(top_p < 1), keep_top_p, lambda weights, _: weights, weights, top_p)
    floor = jnp.where(temperature > 0, min_p, 1) * jnp.max(weights, axis=-1)
    return jnp.where(weights >= floor[:, None], weights, 0)


def penalise(
    logits: Float[Array, "rows vocabulary"], seen: Bool[Array, "rows vocabulary"], penalty: Float[Array, " rows"]
) -> Float[Array, "rows vocabulary"]:
    """Repetition penalty (Keskar et al. 2019, CTRL, arXiv:1909.05858): positive logits of ids that were seen are
    divided by it and, since that would lift them, negative ones multiplied; 1 changes nothing."""
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(weights: Weights, top_k: Int[Array, " rows"]) -> Weights:
    """Zeroes all but the k largest weights of each row (and their equals); k = 0 keeps all."""
    floor = largest_floor(weights, jnp.ones_like(weights), top_k.astype(weights.dtype))
    return jnp.where((weights >= floor[:, None]) | (top_k == 0)[:, None], weights, 0)


def keep_top_p(weights: Weights, top_p: Float[Array, " rows"]) -> Weights:
    """Zeroes all but the largest weights that together reach the share `top_p` of a row's sum; 1 keeps all."""
    floor = largest_floor(weights, weights, top_p * jnp.sum(weights, axis=-1))
    return jnp.where((weights >= floor[:, None]) | (top_p >= 1)[:, None], weights, 0)


def largest_floor(weights: Weights, amounts: Weights, target: Float[Array, " rows"]) -> Float[Array, " rows"]:
    """The largest number such that the `amounts` of the weights (0 to 1) at or above it sum to `target`, else 0.

    Bisects the bit patterns, which order as the numbers do: 30 passes cost a tenth of a sort on a CPU.
    """
    bits = jax.lax.bitcast_convert_type(weights, jnp.int32)

    def halve(step: Int[Array, ""], floor: Int[Array, " rows"]) -> Int[Array, " rows"]:
        higher = floor | (jnp.int32(1 << 29) >> step)
        total = jnp.sum(jnp.where(bits >= higher[:, None], amounts, 0), axis=-1)
        return jnp.where(total >= target, higher, floor)

    floor = jax.lax.fori_loop(0, 30, halve, jnp.zeros(len(weights), jnp.int32))
    return jax.lax.bitcast_convert_type(floor, jnp.float32)


def draw(weights: Weights, uniform: Float[Array, " rows"]) -> Int[Array, " rows"]:
    """The id at the share `uniform` (0 to below 1) of each row's weights; never one of weight 0 if there is another."""
    rows, size = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -size % BLOCK))).reshape(rows, -1, BLOCK)
    sums = jnp.sum(blocks, axis=-1)
    target = uniform * jnp.sum(sums, axis=-1)
    block, before = _search(sums, target)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * BLOCK + _search(inside, target - before)[0]


def _search(
    weights: Float[Array, "rows n"], target: Float[Array, " rows"]
) -> tuple[Int[Array, " rows"], Float[Array, " rows"]]:
    """The first positive weight whose running sum passes the target (else the last one), and the sum before it."""
    running = jnp.cumsum(weights, axis=-1)
    # Rounding can leave the target below 0, where leading weights of 0 would pass it.
    reach = jnp.where(weights > 0, running, -1)
    last = jnp.max(reach, axis=-1, keepdims=True)
    found = jnp.argmax((reach > target[:, None]) | (reach == last), axis=-1)
    before = jnp.take_along_axis(running - weights, found[:, None], axis=-1)[:, 0]
    return found, before
