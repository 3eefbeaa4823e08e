"""Finite scalar quantisation (Mentzer et al. 2023, arXiv:2309.15505): each dimension rounded to a few levels.

The codebook is the grid of all combinations, and nothing is learned. The paper prints the shift of even levels with
tan and the bound with 1 - epsilon; atanh and 1 + epsilon, as published checkpoints have them (X-Codec-2), keep a latent
of 0 at 0 and allow two levels.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from omni_tokenizers.errors import UsageError
from omni_tokenizers.quantizers.base import Quantized, check_codebook, estimated, flattened, spread, tally

_EPSILON = 1e-3
_MOST_LEVELS = 256


@dataclasses.dataclass(frozen=True)
class FSQConfig:
    """A fixed grid: each dimension rounded to a few levels."""

    levels: tuple[int, ...] = (8, 5, 5, 5)
    """Levels of each dimension; their product is the number of codes: 8 5 5 5 make 1000, 8 8 8 5 5 5 64000."""
    kind: Literal["fsq"] = "fsq"
    """Names this quantiser in a configuration file."""

    def __post_init__(self):
        if not self.levels or not all(2 <= level <= _MOST_LEVELS for level in self.levels):
            raise UsageError(f"levels must be one or more numbers of 2 to {_MOST_LEVELS}, got {self.levels}")
        check_codebook(self.codebook_size, self.dim)

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return math.prod(self.levels)

    @property
    def dim(self) -> int:
        """Width of a code vector."""
        return len(self.levels)

    def make(self, *, rngs: nnx.Rngs) -> FiniteScalarQuantizer:
        """The quantiser; nothing of it is random."""
        return FiniteScalarQuantizer(self)


class FiniteScalarQuantizer(nnx.Module):
    """Rounds bounded latents to a grid within [-1, 1], in float32: bfloat16 halves the codes that are used."""

    def __init__(self, config: FSQConfig):
        self.config = config

    def __call__(
        self,
        z: Float[Array, "*batch dim"],
        key: PRNGKeyArray | None = None,
        *,
        training: bool,
        weights: Float[Array, "*batch"] | None = None,
    ) -> Quantized:
        """Quantises latents; `key` and `training` do nothing, and there is no loss.

        Args:
            weights: 0 keeps a latent (a padded frame) out of perplexity and usage; None = all 1.
        """
        latents, weights = flattened(z, weights)
        bounded = self._bounded(latents)
        steps = jnp.round(jax.lax.stop_gradient(bounded))
        codes = ((steps.astype(jnp.int32) + self._middle) * self._strides).sum(-1)
        quantized = estimated(bounded, steps, "straight_through") / self._middle
        perplexity, usage = spread(tally(codes, weights, self.config.codebook_size), weights)
        return Quantized(
            quantized=quantized.reshape(z.shape).astype(z.dtype),
            codes=codes.reshape(z.shape[:-1]),
            commitment=jnp.zeros(()),
            perplexity=perplexity,
            usage=usage,
            auxiliary=jnp.zeros(()),
        )

    def codebook(self) -> Float[Array, "codes dim"]:
        """The grid; its first dimension changes fastest."""
        return self.lookup(jnp.arange(self.config.codebook_size))

    def lookup(self, codes: Int[Array, "*batch"]) -> Float[Array, "*batch dim"]:
        """The vectors of codes."""
        steps = codes[..., None] // self._strides % self._levels - self._middle
        return steps.astype(jnp.float32) / self._middle

    def _bounded(self, latents: Float[Array, "n dim"]) -> Float[Array, "n dim"]:
        """Latents squeezed so that rounding gives one of the levels: L integers from -floor(L / 2) on."""
        reach = (self._levels - 1) * (1 + _EPSILON) / 2
        offset = np.where(self._levels % 2, 0.0, 0.5)
        bounded = jnp.tanh(latents + np.arctanh(offset / reach)) * reach - offset
        return bounded.astype(jnp.float32)

    @property
    def _levels(self) -> Int[np.ndarray, " dim"]:
        return np.array(self.config.levels, np.int32)

    @property
    def _middle(self) -> Int[np.ndarray, " dim"]:
        """Steps from the lowest level to 0."""
        return self._levels // 2

    @property
    def _strides(self) -> Int[np.ndarray, " dim"]:
        """What a step in each dimension adds to the code."""
        return np.cumprod([1, *self.config.levels[:-1]], dtype=np.int32)
