"""Residual quantisation (SoundStream, Zeghidour et al. 2021, section III-C): each level quantises what is left over.

With quantiser dropout (same section; DAC, Kumar et al. 2023, arXiv:2306.06546, section 3.3) a share of the batch's
rows is quantised by the first levels only, a number drawn for each row: one net then serves every number of levels.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from omni_tokenizers.errors import UsageError
from omni_tokenizers.quantizers.base import Quantized, estimated
from omni_tokenizers.quantizers.ema import VectorQuantizerConfig
from omni_tokenizers.quantizers.ibq import IBQConfig
from omni_tokenizers.quantizers.learned import LearnedQuantizerConfig
from omni_tokenizers.quantizers.simvq import SimVQConfig

_MOST_LEVELS = 64

LevelConfig = VectorQuantizerConfig | LearnedQuantizerConfig | SimVQConfig | IBQConfig


@dataclasses.dataclass(frozen=True)
class ResidualQuantizerConfig:
    """Levels, all alike, each quantising what those before it left over."""

    levels: int = 8
    """Number of levels: codes of a latent."""
    level: LevelConfig = dataclasses.field(default_factory=VectorQuantizerConfig)
    """What quantises at each level."""
    dropout: float = 0.0
    """Share of the rows that are trained on a random number of levels, 1 to all."""
    kind: Literal["residual"] = "residual"
    """Names this quantiser in a configuration file."""

    def __post_init__(self):
        if self.levels < 1:
            raise UsageError(f"a residual quantiser needs at least one level, got {self.levels}")
        if self.levels > _MOST_LEVELS:
            raise UsageError(f"a residual quantiser has at most {_MOST_LEVELS} levels, got {self.levels}")
        if not 0 <= self.dropout <= 1:
            raise UsageError(f"dropout is a share of rows, 0 to 1, got {self.dropout}")
        if isinstance(self.level, LearnedQuantizerConfig) and self.level.normalize == "always":
            raise UsageError(
                'codes of length 1 cannot follow residuals that shrink; levels can have normalize "search" or "never"'
            )

    @property
    def dim(self) -> int:
        """Width of a latent."""
        return self.level.dim

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codes of each level."""
        return (self.level.codebook_size,) * self.levels

    def make(self, *, rngs: nnx.Rngs) -> ResidualQuantizer:
        """The quantiser."""
        return ResidualQuantizer(self.levels, self.level, dropout=self.dropout, rngs=rngs)


class ResidualQuantizer(nnx.Module):
    """Quantises what the levels before left over; the sum of all levels' codes stands for the latent.

    The gradient goes from that sum to the latent once, around the levels; only levels that have something of their own
    to learn from it (projections, a softmax) are gone through, one after the other as in DAC.
    """

    def __init__(self, levels: int, config: LevelConfig, *, dropout: float = 0.0, rngs: nnx.Rngs):
        self.config = ResidualQuantizerConfig(levels, config, dropout)
        projects = isinstance(config, LearnedQuantizerConfig) and config.code_dim is not None
        self.around = not projects and not isinstance(config, IBQConfig)
        self.levels = nnx.List([config.make(rngs=rngs) for _ in range(levels)])

    def __call__(
        self,
        z: Float[Array, "*batch dim"],
        key: PRNGKeyArray | None = None,
        *,
        training: bool,
        weights: Float[Array, "*batch"] | None = None,
    ) -> Quantized:
        """As `EMAVectorQuantizer.__call__`; codes are [*batch, levels].

        With dropout, training takes the first axis of `z` as rows, and levels that a row goes without count in no
        statistic, loss or sum; they have codes all the same.
        """
        dropping = training and self.config.dropout > 0
        kept = self._kept(z.shape[:-1], key) if dropping else [None] * len(self.levels)
        latents = z.astype(jnp.float32)
        residual, results, parts = latents, [], []
        for index, (level, present) in enumerate(zip(self.levels, kept, strict=True)):
            level_key = None if key is None else jax.random.fold_in(key, index)
            result = level(residual, level_key, training=training, weights=_both(weights, present))
            # Detached: with the straight-through value the residual would lose its gradient, and commitment with it.
            part = jax.lax.stop_gradient(result.quantized) if self.around else result.quantized
            residual = residual - part
            parts.append(part if present is None else jnp.where(present[..., None], part, 0))
            results.append(result)
        total = sum(parts)
        quantized = estimated(latents, total, self.config.level.gradient) if self.around else total
        return Quantized(
            quantized=quantized.astype(z.dtype),
            codes=jnp.stack([result.codes for result in results], -1),
            commitment=jnp.stack([result.commitment for result in results]).mean(),
            perplexity=jnp.stack([result.perplexity for result in results]).mean(),
            usage=jnp.stack([result.usage for result in results]).mean(),
            auxiliary=jnp.stack([result.auxiliary for result in results]).mean(),
        )

    def codebooks(self) -> tuple[Float[Array, "codes dim"], ...]:
        """The vectors of each level's codes."""
        return tuple(level.codebook() for level in self.levels)

    def lookup(self, codes: Int[Array, "*batch levels"]) -> Float[Array, "*batch dim"]:
        """The sum of the vectors of all levels (of the first ones, where fewer are given)."""
        return sum(level.lookup(codes[..., index]) for index, level in enumerate(self.levels[: codes.shape[-1]]))

    def _kept(self, shape: tuple[int, ...], key: PRNGKeyArray) -> list[Bool[Array, "*batch"]]:
        """Where each level is kept; level i itself draws from fold_in(key, i)."""
        share_key, number_key = jax.random.split(jax.random.fold_in(key, len(self.levels)))
        rows = (shape[0],) + (1,) * (len(shape) - 1)
        dropped = jax.random.bernoulli(share_key, self.config.dropout, rows)
        number = jax.random.randint(number_key, rows, 1, len(self.levels) + 1)
        number = jnp.where(dropped, number, len(self.levels))
        return [jnp.broadcast_to(index < number, shape) for index in range(len(self.levels))]


def _both(weights: Array | None, present: Array | None) -> Array | None:
    """Weights of the latents that are present, too; None = all 1."""
    if present is None:
        return weights
    return present.astype(jnp.float32) if weights is None else weights * present
