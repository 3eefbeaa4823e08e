"""Split residual quantisation (Mimi, Défossez et al. 2024, arXiv:2410.00037, section 3.3.2): semantic beside acoustic.

Two residual quantisers read the same latent through projections of their own, and the sum of what they project back
decodes. So the semantic codes, which may be taught to follow a speech model, owe the acoustic ones no residual.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from omni_tokenizers.quantizers.base import PRECISION, Quantized, check_codebook
from omni_tokenizers.quantizers.ema import VectorQuantizerConfig
from omni_tokenizers.quantizers.residual import LevelConfig, ResidualQuantizer, ResidualQuantizerConfig


@dataclasses.dataclass(frozen=True)
class SplitQuantizerConfig:
    """A semantic and an acoustic residual quantiser side by side, with levels all alike."""

    dim: int = 512
    """Width of a latent; that of the branches is their levels'."""
    semantic_levels: int = 1
    """Levels of the first branch, whose codes come first."""
    acoustic_levels: int = 7
    """Levels of the second branch."""
    level: LevelConfig = dataclasses.field(default_factory=lambda: VectorQuantizerConfig(codebook_size=2048, dim=256))
    """What quantises at each level."""
    dropout: float = 0.0
    """Share of the rows that are trained on a random number of acoustic levels, 1 to all."""
    kind: Literal["split"] = "split"
    """Names this quantiser in a configuration file."""

    def __post_init__(self):
        check_codebook(self.level.codebook_size, self.dim)
        _ = self.semantic, self.acoustic  # check their own settings

    @property
    def semantic(self) -> ResidualQuantizerConfig:
        """The first branch."""
        return ResidualQuantizerConfig(self.semantic_levels, self.level)

    @property
    def acoustic(self) -> ResidualQuantizerConfig:
        """The second branch."""
        return ResidualQuantizerConfig(self.acoustic_levels, self.level, self.dropout)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codes of each level, semantic ones first."""
        return self.semantic.codebook_sizes + self.acoustic.codebook_sizes

    def make(self, *, rngs: nnx.Rngs) -> SplitResidualQuantizer:
        """The quantiser."""
        return SplitResidualQuantizer(self, rngs=rngs)


class _Branch(nnx.Module):
    """A residual quantiser between two projections without bias."""

    def __init__(self, dim: int, config: ResidualQuantizerConfig, *, rngs: nnx.Rngs):
        self.project_in = nnx.Linear(dim, config.dim, use_bias=False, precision=PRECISION, rngs=rngs)
        self.residual: ResidualQuantizer = config.make(rngs=rngs)
        self.project_out = nnx.Linear(config.dim, dim, use_bias=False, precision=PRECISION, rngs=rngs)

    def __call__(self, z: Array, key: PRNGKeyArray | None, *, training: bool, weights: Array | None) -> Quantized:
        result = self.residual(self.project_in(z), key, training=training, weights=weights)
        return dataclasses.replace(result, quantized=self.project_out(result.quantized))

    def codebooks(self) -> tuple[Float[Array, "codes dim"], ...]:
        return tuple(self.project_out(book) for book in self.residual.codebooks())

    def lookup(self, codes: Int[Array, "*batch levels"]) -> Float[Array, "*batch dim"]:
        return self.project_out(self.residual.lookup(codes))


class SplitResidualQuantizer(nnx.Module):
    """The sum of a semantic and an acoustic branch."""

    def __init__(self, config: SplitQuantizerConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.semantic = _Branch(config.dim, config.semantic, rngs=rngs)
        self.acoustic = _Branch(config.dim, config.acoustic, rngs=rngs)

    def __call__(
        self,
        z: Float[Array, "*batch dim"],
        key: PRNGKeyArray | None = None,
        *,
        training: bool,
        weights: Float[Array, "*batch"] | None = None,
    ) -> Quantized:
        """As `ResidualQuantizer.__call__`; the codes of the semantic levels come first."""
        keys = (None, None) if key is None else jax.random.split(key)
        latents = z.astype(jnp.float32)
        semantic = self.semantic(latents, keys[0], training=training, weights=weights)
        acoustic = self.acoustic(latents, keys[1], training=training, weights=weights)
        levels = len(self.config.codebook_sizes)

        def mean(name):
            first, second = getattr(semantic, name), getattr(acoustic, name)
            return (self.config.semantic_levels * first + self.config.acoustic_levels * second) / levels

        return Quantized(
            quantized=(semantic.quantized + acoustic.quantized).astype(z.dtype),
            codes=jnp.concatenate([semantic.codes, acoustic.codes], -1),
            commitment=mean("commitment"),
            perplexity=mean("perplexity"),
            usage=mean("usage"),
            auxiliary=mean("auxiliary"),
        )

    def codebooks(self) -> tuple[Float[Array, "codes dim"], ...]:
        """The vectors that each level's codes stand for, as wide as latents; semantic ones first."""
        return self.semantic.codebooks() + self.acoustic.codebooks()

    def lookup(self, codes: Int[Array, "*batch levels"]) -> Float[Array, "*batch dim"]:
        """The sum of the vectors of all levels (of the first ones, where fewer are given)."""
        first = self.config.semantic_levels
        semantic = self.semantic.lookup(codes[..., :first])
        return semantic if codes.shape[-1] <= first else semantic + self.acoustic.lookup(codes[..., first:])
