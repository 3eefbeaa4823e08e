"""Lookup-free quantisation (Yu et al. 2023, arXiv:2310.05737, section 3.1): each dimension gives one bit, its sign.

The entropy loss makes every choice sure and the codes of a batch many: E[H(p)] - H(E[p]) with the softmax p of
-|z - c|^2 / temperature over all 2^bits codes c. Bits are independent given z, so H(p) is the sum of the bits'
entropies, and E[p] is one matrix product of the probabilities of the low and of the high half of the bits. Both
entropies are exact, and memory holds 2^bits numbers once, not once for each latent.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from omni_tokenizers.errors import UsageError
from omni_tokenizers.quantizers.base import (
    EPSILON,
    PRECISION,
    Quantized,
    check_weights,
    entropy,
    estimated,
    flattened,
    spread,
    tally,
    weighted_mean,
)

_MOST_BITS = 20


@dataclasses.dataclass(frozen=True)
class LFQConfig:
    """Codes of bits: the signs of all dimensions."""

    bits: int = 10
    """Bits of a code, and width of a latent: there are 2^bits codes."""
    commitment: float = 0.25
    """Weight of the loss that draws latents to their codes."""
    entropy_weight: float = 0.1
    """Weight of the loss that makes each choice sure and all codes used."""
    temperature: float = 0.01
    """Temperature of the softmax whose entropies are taken."""
    kind: Literal["lfq"] = "lfq"
    """Names this quantiser in a configuration file."""

    def __post_init__(self):
        if not 1 <= self.bits <= _MOST_BITS:
            raise UsageError(f"bits must be 1 to {_MOST_BITS}, got {self.bits}")
        check_weights(commitment=self.commitment, entropy_weight=self.entropy_weight)
        if not self.temperature > 0:
            raise UsageError(f"temperature must be above 0, got {self.temperature}")

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return 2**self.bits

    @property
    def dim(self) -> int:
        """Width of a code vector."""
        return self.bits

    def make(self, *, rngs: nnx.Rngs) -> LookupFreeQuantizer:
        """The quantiser; nothing of it is random."""
        return LookupFreeQuantizer(self)


class LookupFreeQuantizer(nnx.Module):
    """The signs of a latent (0 counts as negative); bit i of a code is set where dimension i is positive."""

    def __init__(self, config: LFQConfig):
        self.config = config

    def __call__(
        self,
        z: Float[Array, "*batch dim"],
        key: PRNGKeyArray | None = None,
        *,
        training: bool,
        weights: Float[Array, "*batch"] | None = None,
    ) -> Quantized:
        """Quantises latents; `key` and `training` do nothing.

        Args:
            weights: 0 keeps a latent (a padded frame) out of every statistic and loss; None = all 1.
        """
        config = self.config
        latents, weights = flattened(z, weights)
        positive = latents > 0
        codes = (positive << jnp.arange(config.bits, dtype=jnp.int32)).sum(-1, dtype=jnp.int32)
        chosen = jnp.where(positive, 1.0, -1.0)
        perplexity, usage = spread(tally(codes, weights, config.codebook_size), weights)
        return Quantized(
            quantized=estimated(z, chosen.reshape(z.shape), "straight_through"),
            codes=codes.reshape(z.shape[:-1]),
            commitment=config.commitment * weighted_mean(jnp.square(latents - chosen).mean(-1), weights),
            perplexity=perplexity,
            usage=usage,
            auxiliary=config.entropy_weight * self._indecision(latents, weights),
        )

    def codebook(self) -> Float[Array, "codes dim"]:
        """All vectors of signs."""
        return self.lookup(jnp.arange(self.config.codebook_size))

    def lookup(self, codes: Int[Array, "*batch"]) -> Float[Array, "*batch dim"]:
        """The vectors of codes."""
        bits = codes[..., None] >> jnp.arange(self.config.bits, dtype=codes.dtype) & 1
        return 2.0 * bits - 1

    def _indecision(self, latents: Float[Array, "n bits"], weights: Float[Array, " n"]) -> Float[Array, ""]:
        """E[H(p)] - H(E[p])."""
        # |z - 1|^2 and |z + 1|^2 differ by 4 z.
        logits = 4 * latents / self.config.temperature
        size = jnp.abs(logits)
        sample = weighted_mean((jax.nn.softplus(-size) + size * jax.nn.sigmoid(-size)).sum(-1), weights)
        low, high = _products(logits[:, : self.config.bits // 2]), _products(logits[:, self.config.bits // 2 :])
        total = jnp.einsum("nh,nl->hl", high * weights[:, None], low, precision=PRECISION)
        return sample - entropy((total / jnp.maximum(weights.sum(), EPSILON)).reshape(-1))


def _products(logits: Float[Array, "n bits"]) -> Float[Array, "n codes"]:
    """The probability of each combination of independent bits, the first bit changing fastest."""
    products = jnp.ones((len(logits), 1))
    for bit in logits.T:
        chance = jax.nn.sigmoid(bit)[:, None]
        products = jnp.concatenate([products * (1 - chance), products * chance], -1)
    return products
