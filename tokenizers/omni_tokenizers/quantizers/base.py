"""What every quantiser shares: its result, the ways a gradient passes it, means and counts over weighted latents.

Everything is written over the global batch in plain jnp: under `jax.jit` with shardings the sums run over all devices,
and random draws depend on the key alone, so every device agrees.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from omni_tokenizers.errors import UsageError

EPSILON = 1e-5
PRECISION = jax.lax.Precision.HIGHEST
_SHORTEST = 1e-6  # vectors below this length have no direction
# Bounds for descriptions that come with files from elsewhere.
_LARGEST = 1 << 20

Gradient = Literal["straight_through", "rotation"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """What a quantiser returns."""

    quantized: Float[Array, "*batch dim"]
    """Code vectors; their gradient goes on to the latents."""
    codes: Int[Array, "*batch"]
    """int32; a residual quantiser has a last axis of levels."""
    commitment: Float[Array, ""]
    """Commitment loss, already times the configured weight: mean over weighted latents, dimensions (and levels)."""
    perplexity: Float[Array, ""]
    """exp(entropy) of the codes of this batch: how many codes are used evenly (mean over levels)."""
    usage: Float[Array, ""]
    """Share of the codebook that this batch uses (mean over levels)."""
    auxiliary: Float[Array, ""]
    """Other losses, already weighted: what moves a learned codebook, what spreads its use; 0 where nothing does."""


def flattened(
    z: Float[Array, "*batch dim"], weights: Float[Array, "*batch"] | None
) -> tuple[Float[Array, "n dim"], Float[Array, " n"]]:
    """Latents and their weights (None = all 1) as float32 rows."""
    latents = z.reshape(-1, z.shape[-1]).astype(jnp.float32)
    weights = jnp.ones(len(latents)) if weights is None else weights.reshape(-1).astype(jnp.float32)
    return latents, weights


def weighted_mean(values: Float[Array, " n"], weights: Float[Array, " n"]) -> Float[Array, ""]:
    """The mean of the rows that count; 0 where none does."""
    return (weights * values).sum() / jnp.maximum(weights.sum(), EPSILON)


def attraction(
    latents: Float[Array, "n dim"], chosen: Float[Array, "n dim"], weights: Float[Array, " n"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean squared distance from latents to their codes, as it moves the latents and as it moves the codes."""
    fixed_latents, fixed_codes = jax.lax.stop_gradient((latents, chosen))
    return (
        weighted_mean(jnp.square(latents - fixed_codes).mean(-1), weights),
        weighted_mean(jnp.square(chosen - fixed_latents).mean(-1), weights),
    )


def tally(codes: Int[Array, " n"], weights: Float[Array, " n"], number: int) -> Float[Array, " number"]:
    """How much weight chose each of `number` codes."""
    return jnp.zeros(number).at[codes].add(weights)


def spread(counts: Float[Array, " codes"], weights: Float[Array, " n"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Perplexity and usage, as in `Quantized`, of the weight on each code."""
    share = counts / jnp.maximum(weights.sum(), EPSILON)
    return jnp.exp(-jax.scipy.special.xlogy(share, share).sum()), (counts > 0).mean()


def entropy(probabilities: Float[Array, "*batch codes"]) -> Float[Array, "*batch"]:
    """Entropy in nats; its gradient is finite where a probability is 0."""
    return -(probabilities * jnp.log(jnp.maximum(probabilities, 1e-20))).sum(-1)


def nearest(
    latents: Float[Array, "n dim"], codebook: Float[Array, "codes dim"]
) -> tuple[Int[Array, " n"], Float[Array, " n"]]:
    """The nearest code of each latent and its squared distance, in float32 at the highest precision."""
    product = jnp.einsum("kd,nd->kn", codebook, latents, precision=PRECISION)
    scores = jnp.square(codebook).sum(-1)[:, None] - 2 * product
    codes = first_lowest(scores)
    return codes, jnp.square(latents - codebook[codes]).sum(-1)


def first_lowest(scores: Float[Array, "codes n"]) -> Int[Array, " n"]:
    """The code with the lowest score, the first of equals, int32.

    An argmin, several times faster on CPUs: two plain reductions, which run along n in vector registers.
    """
    numbers = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    return jnp.where(scores == scores.min(0), numbers, len(scores) - 1).min(0)


def unit(x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
    """Vectors at length 1 (0 stays 0)."""
    # Under the root, where the gradient of a length at 0 would be NaN.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), _SHORTEST**2))


def estimated(
    z: Float[Array, "*batch dim"], chosen: Float[Array, "*batch dim"], gradient: Gradient
) -> Float[Array, "*batch dim"]:
    """The chosen vectors, bit for bit, in z's dtype; their gradient goes to `z` and not to the codebook.

    Args:
        gradient: "straight_through" hands it on unchanged (van den Oord et al. 2017), "rotation" turns and scales it as
            the latent is turned and scaled into its code (Fifty et al. 2024, arXiv:2410.06424).
    """
    chosen = jax.lax.stop_gradient(chosen)
    moved = _rotated(z.astype(jnp.float32), chosen) if gradient == "rotation" else z
    # moved - moved is exactly 0: the value is the code itself, the gradient is what moved z.
    return chosen.astype(z.dtype) + (moved - jax.lax.stop_gradient(moved)).astype(z.dtype)


def _rotated(z: Float[Array, "*batch dim"], target: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
    """(|q| / |e|) R z with R = I - 2 r r' + 2 q^ e^', r along e^ + q^, all constant: |q| / |e| R e = q."""
    e, q = jax.lax.stop_gradient(z), target.astype(jnp.float32)
    length = jnp.linalg.norm(e, axis=-1, keepdims=True)
    length = jnp.where(length > _SHORTEST, length, 1)  # a latent at the origin has no angle, and must not divide by 0
    source, goal = e / length, unit(q)
    middle = unit(source + goal)

    def along(direction):
        return (z * direction).sum(-1, keepdims=True)

    turned = z - 2 * along(middle) * middle + 2 * along(source) * goal
    return jnp.linalg.norm(q, axis=-1, keepdims=True) / length * turned


def check_codebook(size: int, dim: int) -> None:
    """A UsageError unless a codebook of `size` codes of width `dim` can be made."""
    if size < 2 or dim < 1:
        raise UsageError(f"a codebook needs at least 2 codes of width 1, got {size} of {dim}")
    if max(size, dim) > _LARGEST:
        raise UsageError(f"a codebook has at most {_LARGEST} codes of at most that width, got {size} of {dim}")


def check_weights(**weights: float) -> None:
    """A UsageError that names the first weight below 0."""
    for name, value in weights.items():
        if not value >= 0:
            raise UsageError(f"{name} must be at least 0, got {value}")


def check_gradient(gradient: str) -> None:
    """A UsageError unless `gradient` is one of `Gradient`."""
    if gradient not in typing.get_args(Gradient):
        raise UsageError(f"gradient must be one of {', '.join(typing.get_args(Gradient))}, got {gradient!r}")
