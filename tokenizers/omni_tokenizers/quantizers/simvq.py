"""SimVQ: a frozen random codebook behind one learned linear map (Zhu et al. 2024, arXiv:2411.02038).

Codes are C W: a gradient reaches every code through the shared W, so none is left behind and dies.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from omni_tokenizers.quantizers.base import (
    PRECISION,
    Gradient,
    Quantized,
    attraction,
    check_codebook,
    check_gradient,
    check_weights,
    estimated,
    flattened,
    nearest,
    spread,
    tally,
)


@dataclasses.dataclass(frozen=True)
class SimVQConfig:
    """A frozen random codebook behind a learned linear map."""

    codebook_size: int = 1024
    """Number of codes."""
    dim: int = 8
    """Width of a code vector."""
    codebook_weight: float = 1.0
    """Weight of the loss that draws codes to their latents."""
    commitment: float = 0.25
    """Weight of the loss that draws latents to their codes."""
    gradient: Gradient = "straight_through"
    """How the gradient passes from codes to latents."""
    kind: Literal["simvq"] = "simvq"
    """Names this quantiser in a configuration file."""

    def __post_init__(self):
        check_codebook(self.codebook_size, self.dim)
        check_gradient(self.gradient)
        check_weights(codebook_weight=self.codebook_weight, commitment=self.commitment)

    def make(self, *, rngs: nnx.Rngs) -> SimVQ:
        """The quantiser."""
        return SimVQ(self, rngs=rngs)


class FrozenCodes(nnx.Variable):
    """Vectors drawn once and never learned."""


class SimVQ(nnx.Module):
    """Nearest-code quantiser over the rows of C W."""

    def __init__(self, config: SimVQConfig, *, rngs: nnx.Rngs):
        self.config = config
        rows = jax.random.normal(rngs.params(), (config.codebook_size, config.dim))
        self.frozen = FrozenCodes(rows / config.dim**0.5)
        self.basis = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (config.dim, config.dim)))

    def __call__(
        self,
        z: Float[Array, "*batch dim"],
        key: PRNGKeyArray | None = None,
        *,
        training: bool,
        weights: Float[Array, "*batch"] | None = None,
    ) -> Quantized:
        """Quantises latents; the codebook moves by the gradient of `auxiliary`, so `key` and `training` do nothing.

        Args:
            weights: 0 keeps a latent (a padded frame) out of every statistic and loss; None = all 1.
        """
        config = self.config
        latents, weights = flattened(z, weights)
        codebook = self.codebook()
        codes, _ = nearest(*jax.lax.stop_gradient((latents, codebook)))
        chosen = codebook[codes]
        commitment, learning = attraction(latents, chosen, weights)
        perplexity, usage = spread(tally(codes, weights, config.codebook_size), weights)
        return Quantized(
            quantized=estimated(z, chosen.reshape(z.shape), config.gradient),
            codes=codes.reshape(z.shape[:-1]),
            commitment=config.commitment * commitment,
            perplexity=perplexity,
            usage=usage,
            auxiliary=config.codebook_weight * learning,
        )

    def codebook(self) -> Float[Array, "codes dim"]:
        """Code vectors: C W."""
        return jnp.matmul(self.frozen[...], self.basis[...], precision=PRECISION)

    def lookup(self, codes: Int[Array, "*batch"]) -> Float[Array, "*batch dim"]:
        """The vectors of codes."""
        return self.codebook()[codes]
