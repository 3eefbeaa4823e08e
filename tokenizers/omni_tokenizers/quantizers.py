"""Vector quantisers whose codebooks follow exponential moving averages.

Sources: VQ-VAE with moving averages (van den Oord et al. 2017, appendix A.1), residual quantisation (SoundStream,
Zeghidour et al. 2021, section III-C). Everything is written over the global batch in plain jnp: under `jax.jit` with
shardings the sums run over all devices, and random draws depend on the key alone, so every device agrees.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from omni_tokenizers.errors import UsageError

_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class VectorQuantizerConfig:
    """One codebook and how it is learned."""

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

    def __post_init__(self):
        if self.codebook_size < 2 or self.dim < 1:
            raise UsageError(f"a codebook needs at least 2 codes of width 1, got {self.codebook_size} of {self.dim}")
        if not 0 <= self.decay < 1:
            raise UsageError(f"decay must be at least 0 and below 1, got {self.decay}")


class CodebookState(nnx.Variable):
    """Statistics of a codebook: learned by counting, not by gradients, and updated by the forward pass."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """What a quantiser returns."""

    quantized: Float[Array, "*batch dim"]
    """Code vectors; their gradient goes straight through to the latents."""
    codes: Int[Array, "*batch"]
    """int32; a residual quantiser has a last axis of levels."""
    commitment: Float[Array, ""]
    """Commitment loss, already times the configured weight: mean over weighted latents, dimensions (and levels)."""
    perplexity: Float[Array, ""]
    """exp(entropy) of the codes of this batch: how many codes are used evenly (mean over levels)."""
    usage: Float[Array, ""]
    """Share of the codebook that this batch uses (mean over levels)."""


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
        shape, latents = z.shape[:-1], z.reshape(-1, z.shape[-1]).astype(jnp.float32)
        weights = jnp.ones(len(latents)) if weights is None else weights.reshape(-1).astype(jnp.float32)
        detached = jax.lax.stop_gradient(latents)
        if training:
            start_key, restart_key = jax.random.split(key)
            self._start(detached, weights, start_key)
        codebook = self.codebook()
        codes, distances = nearest(detached, codebook)
        counts, sums = _statistics(detached, weights, codes, len(codebook))
        if training:
            self._update(counts, sums)
            self._restart(detached, weights * distances, restart_key)
        chosen = codebook[codes]
        total = jnp.maximum(weights.sum(), _EPSILON)
        commitment = (weights * jnp.square(latents - chosen).mean(-1)).sum() / total
        share = counts / total
        return Quantized(
            # z - z is exactly 0: the value is the code itself, the gradient is z's.
            quantized=chosen.reshape(z.shape).astype(z.dtype) + (z - jax.lax.stop_gradient(z)),
            codes=codes.reshape(shape),
            commitment=self.config.commitment * commitment,
            perplexity=jnp.exp(-jax.scipy.special.xlogy(share, share).sum()),
            usage=(counts > 0).mean(),
        )

    def codebook(self) -> Float[Array, "codes dim"]:
        """Code vectors: m / N, with Laplace smoothing of N."""
        count = self.count[...]
        total = count.sum()
        smoothed = (count + _EPSILON) / (total + len(count) * _EPSILON) * total
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


class ResidualQuantizer(nnx.Module):
    """Quantises what the levels before left over; the sum of all levels' codes stands for the latent."""

    def __init__(self, levels: int, config: VectorQuantizerConfig, *, rngs: nnx.Rngs):
        if levels < 1:
            raise UsageError(f"a residual quantiser needs at least one level, got {levels}")
        self.levels = nnx.List([EMAVectorQuantizer(config, rngs=rngs) for _ in range(levels)])

    def __call__(
        self,
        z: Float[Array, "*batch dim"],
        key: PRNGKeyArray | None = None,
        *,
        training: bool,
        weights: Float[Array, "*batch"] | None = None,
    ) -> Quantized:
        """As `EMAVectorQuantizer.__call__`; codes are [*batch, levels]."""
        residual, results = z, []
        for index, level in enumerate(self.levels):
            level_key = None if key is None else jax.random.fold_in(key, index)
            result = level(residual, level_key, training=training, weights=weights)
            # Detached: with the straight-through value the residual would lose its gradient, and commitment with it.
            residual = residual - jax.lax.stop_gradient(result.quantized)
            results.append(result)
        total = sum(jax.lax.stop_gradient(result.quantized) for result in results)
        return Quantized(
            quantized=total + (z - jax.lax.stop_gradient(z)),
            codes=jnp.stack([result.codes for result in results], -1),
            commitment=jnp.stack([result.commitment for result in results]).mean(),
            perplexity=jnp.stack([result.perplexity for result in results]).mean(),
            usage=jnp.stack([result.usage for result in results]).mean(),
        )

    def lookup(self, codes: Int[Array, "*batch levels"]) -> Float[Array, "*batch dim"]:
        """The sum of the vectors of all levels (of the first ones, where fewer are given)."""
        return sum(level.lookup(codes[..., index]) for index, level in enumerate(self.levels[: codes.shape[-1]]))


def nearest(
    latents: Float[Array, "n dim"], codebook: Float[Array, "codes dim"]
) -> tuple[Int[Array, " n"], Float[Array, " n"]]:
    """The nearest code of each latent and its squared distance, in float32 at the highest precision."""
    product = jnp.einsum("nd,kd->nk", latents, codebook, precision=jax.lax.Precision.HIGHEST)
    scores = jnp.square(codebook).sum(-1) - 2 * product
    codes = jnp.argmin(scores, -1).astype(jnp.int32)
    return codes, jnp.square(latents - codebook[codes]).sum(-1)


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
        counts, sums = _statistics(latents, weights, assigned, codes)
        fresh = latents[draw(weights * distances, codes, jax.random.fold_in(key, index + 1))]
        return jnp.where(counts[:, None] > 0, sums / jnp.maximum(counts, _EPSILON)[:, None], fresh)

    start = latents[draw(weights, codes, jax.random.fold_in(key, 0))]
    centers = jax.lax.fori_loop(0, iterations, improve, start)
    return _statistics(latents, weights, nearest(latents, centers)[0], codes)


def _statistics(
    latents: Float[Array, "n dim"], weights: Float[Array, " n"], codes: Int[Array, " n"], number: int
) -> tuple[Float[Array, " codes"], Float[Array, "codes dim"]]:
    """Weighted count and sum of the latents of each code."""
    chosen: Bool[Array, "n codes"] = jax.nn.one_hot(codes, number) * weights[:, None]
    sums = jnp.einsum("nk,nd->kd", chosen, latents, precision=jax.lax.Precision.HIGHEST)
    return chosen.sum(0), sums
