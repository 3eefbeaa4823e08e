"""Index backpropagation quantisation (Shi et al. 2024, arXiv:2412.02692): a gradient through the choice of the code.

The code is the likeliest under softmax(z E'). Its one-hot vector takes the gradient of those probabilities, so every
code learns from every latent. The losses are those of the released code: the squared distance once as a whole, through
that gradient, and once in its two halves as in VQ-VAE; with the entropy loss of MAGVIT (`lfq`) over the same softmax.
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
    attraction,
    check_codebook,
    check_weights,
    entropy,
    flattened,
    spread,
    tally,
    weighted_mean,
)


@dataclasses.dataclass(frozen=True)
class IBQConfig:
    """A codebook learned through a softmax over all codes."""

    codebook_size: int = 1024
    """Number of codes."""
    dim: int = 8
    """Width of a code vector."""
    codebook_weight: float = 0.25
    """Weight of the loss that draws codes to their latents."""
    commitment: float = 1.0
    """Weight of the loss that draws latents to their codes."""
    entropy_weight: float = 0.05
    """Weight of the loss that makes each choice sure and all codes used."""
    temperature: float = 0.01
    """Temperature of the softmax whose entropies are taken."""
    kind: Literal["ibq"] = "ibq"
    """Names this quantiser in a configuration file."""

    def __post_init__(self):
        check_codebook(self.codebook_size, self.dim)
        check_weights(
            codebook_weight=self.codebook_weight, commitment=self.commitment, entropy_weight=self.entropy_weight
        )
        if not self.temperature > 0:
            raise UsageError(f"temperature must be above 0, got {self.temperature}")

    def make(self, *, rngs: nnx.Rngs) -> IndexBackpropagationQuantizer:
        """The quantiser."""
        return IndexBackpropagationQuantizer(self, rngs=rngs)


class IndexBackpropagationQuantizer(nnx.Module):
    """The code of the largest inner product, by a softmax that every code has a gradient from."""

    def __init__(self, config: IBQConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.vectors = nnx.Param(jax.random.normal(rngs.params(), (config.codebook_size, config.dim)))

    def __call__(
        self,
        z: Float[Array, "*batch dim"],
        key: PRNGKeyArray | None = None,
        *,
        training: bool,
        weights: Float[Array, "*batch"] | None = None,
    ) -> Quantized:
        """Quantises latents; the codebook moves by gradients alone, so `key` and `training` do nothing.

        Args:
            weights: 0 keeps a latent (a padded frame) out of every statistic and loss; None = all 1.
        """
        config = self.config
        latents, weights = flattened(z, weights)
        codebook = self.codebook()
        logits = jnp.einsum("nd,kd->nk", latents, codebook, precision=PRECISION)
        codes = jnp.argmax(logits, -1).astype(jnp.int32)
        chosen, soft = codebook[codes], jax.nn.softmax(logits, -1)
        # soft - soft is exactly 0: the value is the code itself, the gradient that of the one-hot vector through soft.
        through = jnp.matmul(soft - jax.lax.stop_gradient(soft), codebook, precision=PRECISION)
        quantized = chosen + through
        whole = weighted_mean(jnp.square(quantized - latents).mean(-1), weights)
        commitment, learning = attraction(latents, chosen, weights)
        perplexity, usage = spread(tally(codes, weights, config.codebook_size), weights)
        return Quantized(
            quantized=quantized.reshape(z.shape).astype(z.dtype),
            codes=codes.reshape(z.shape[:-1]),
            commitment=config.commitment * commitment,
            perplexity=perplexity,
            usage=usage,
            auxiliary=whole
            + config.codebook_weight * learning
            + config.entropy_weight * self._indecision(logits, weights),
        )

    def codebook(self) -> Float[Array, "codes dim"]:
        """Code vectors."""
        return self.vectors[...]

    def lookup(self, codes: Int[Array, "*batch"]) -> Float[Array, "*batch dim"]:
        """The vectors of codes."""
        return self.codebook()[codes]

    def _indecision(self, logits: Float[Array, "n codes"], weights: Float[Array, " n"]) -> Float[Array, ""]:
        """E[H(p)] - H(E[p]): least where each latent is sure and all together use every code alike."""
        probabilities = jax.nn.softmax(logits / self.config.temperature, -1)
        total = jnp.einsum("nk,n->k", probabilities, weights, precision=PRECISION)
        mean = total / jnp.maximum(weights.sum(), EPSILON)
        return weighted_mean(entropy(probabilities), weights) - entropy(mean)
