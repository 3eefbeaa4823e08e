"""Vector quantiser whose codebook follows exponential moving averages (van den Oord et al. 2017, appendix A.1)."""

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
    Gradient,
    Quantized,
    check_codebook,
    check_gradient,
    check_weights,
    estimated,
    flattened,
    nearest,
    spread,
    weighted_mean,
)
from omni_tokenizers.quantizers.clusters import draw, k_means, statistics


@dataclasses.dataclass(frozen=True)
class VectorQuantizerConfig:
    """A codebook that follows the moving averages of its latents."""

    codebook_size: int = 512
    """Number of codes."""
    dim: int = 8
    """Width of a code vector."""
    decay: float = 0.99
    """Decay of the moving averages of counts and sums, per step."""
    commitment: float = 0.25
    """Weight of the commitment loss that draws latents to their codes."""
    restart_threshold: float = 0.1
    """A code used less than this share of uniform usage is replaced by a latent of the batch; 0 never restarts."""
    kmeans_iterations: int = 10
    """k-means iterations over the first training batch, from which the codebook starts."""
    gradient: Gradient = "straight_through"
    """How the gradient passes from codes to latents."""
    kind: Literal["ema"] = "ema"
    """Names this quantiser in a configuration file."""

    def __post_init__(self):
        check_codebook(self.codebook_size, self.dim)
        check_gradient(self.gradient)
        check_weights(commitment=self.commitment)
        if not 0 <= self.decay < 1:
            raise UsageError(f"decay must be at least 0 and below 1, got {self.decay}")

    def make(self, *, rngs: nnx.Rngs) -> EMAVectorQuantizer:
        """The quantiser."""
        return EMAVectorQuantizer(self, rngs=rngs)


class CodebookState(nnx.Variable):
    """Statistics of a codebook: learned by counting, not by gradients, and updated by the forward pass."""


class EMAVectorQuantizer(nnx.Module):
    """Nearest-code quantiser; the codebook is the moving average of the latents that chose each code.

    Only the average count N and sum m of each code are kept, e = m / N, so no restart can leave them contradicting
    the codebook. The first training call starts both by k-means.
    """

    def __init__(self, config: VectorQuantizerConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.count = CodebookState(jnp.ones(config.codebook_size))
        self.sum = CodebookState(jax.random.normal(rngs.params(), (config.codebook_size, config.dim)))
        self.initialized = CodebookState(jnp.zeros((), bool))

    def __call__(
        self,
        z: Float[Array, "*batch dim"],
        key: PRNGKeyArray | None = None,
        *,
        training: bool,
        weights: Float[Array, "*batch"] | None = None,
    ) -> Quantized:
        """Quantises latents; when `training`, also moves the codebook (nothing is mutated otherwise).

        Args:
            key: draws the k-means start and restarts; needed only when training.
            weights: 0 keeps a latent (a padded frame) out of every statistic and of the loss; None = all 1.
        """
        latents, weights = flattened(z, weights)
        detached = jax.lax.stop_gradient(latents)
        if training:
            start_key, restart_key = jax.random.split(key)
            self._start(detached, weights, start_key)
        codebook = self.codebook()
        codes, distances = nearest(detached, codebook)
        counts, sums = statistics(detached, weights, codes, len(codebook))
        if training:
            self._update(counts, sums)
            self._restart(detached, weights * distances, restart_key)
        chosen = codebook[codes]
        perplexity, usage = spread(counts, weights)
        return Quantized(
            quantized=estimated(z, chosen.reshape(z.shape), self.config.gradient),
            codes=codes.reshape(z.shape[:-1]),
            commitment=self.config.commitment * weighted_mean(jnp.square(latents - chosen).mean(-1), weights),
            perplexity=perplexity,
            usage=usage,
            auxiliary=jnp.zeros(()),
        )

    def codebook(self) -> Float[Array, "codes dim"]:
        """Code vectors: m / N, with Laplace smoothing of N."""
        count = self.count[...]
        total = count.sum()
        smoothed = (count + EPSILON) / (total + len(count) * EPSILON) * total
        return self.sum[...] / smoothed[:, None]

    def lookup(self, codes: Int[Array, "*batch"]) -> Float[Array, "*batch dim"]:
        """The vectors of codes."""
        return self.codebook()[codes]

    def _start(self, latents: Array, weights: Array, key: PRNGKeyArray) -> None:
        def start(_):
            return k_means(latents, weights, self.config.codebook_size, self.config.kmeans_iterations, key)

        ready = self.initialized[...] | (weights.sum() == 0)
        count, total = jax.lax.cond(ready, lambda held: held, start, (self.count[...], self.sum[...]))
        self.count[...], self.sum[...] = count, total
        self.initialized[...] = self.initialized[...] | (weights.sum() > 0)

    def _update(self, counts: Array, sums: Array) -> None:
        decay = jnp.where(counts.sum() > 0, self.config.decay, 1.0)
        self.count[...] = decay * self.count[...] + (1 - decay) * counts
        self.sum[...] = decay * self.sum[...] + (1 - decay) * sums

    def _restart(self, latents: Array, mass: Array, key: PRNGKeyArray) -> None:
        """Gives dead codes a latent and an average count, so that they live on in both statistics."""
        count = self.count[...]
        dead = (count < self.config.restart_threshold * count.mean()) & (mass.sum() > 0)
        fresh = latents[draw(mass, len(count), key)]
        self.sum[...] = jnp.where(dead[:, None], fresh * count.mean(), self.sum[...])
        self.count[...] = jnp.where(dead, count.mean(), count)
