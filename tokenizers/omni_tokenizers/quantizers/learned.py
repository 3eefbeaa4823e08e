"""Vector quantiser whose codebook is learned by gradients: VQ-VAE (van den Oord et al. 2017, equation 3).

Two refinements of ViT-VQGAN (Yu et al. 2021, arXiv:2110.04627) can be had: codes narrower than latents,
between two projections, and a length of 1 for both. LlamaGen (arXiv:2406.06525) quantises unit vectors; DAC (Kumar et
al. 2023, arXiv:2306.06546) projects to 8 dimensions and compares by angle, but keeps lengths otherwise.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from typing import Literal

import jax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from omni_tokenizers.errors import UsageError
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
    unit,
)

Normalize = Literal["never", "search", "always"]


@dataclasses.dataclass(frozen=True)
class LearnedQuantizerConfig:
    """A codebook learned by gradients, as in VQ-VAE, DAC and LlamaGen."""

    codebook_size: int = 1024
    """Number of codes."""
    dim: int = 8
    """Width of a latent."""
    code_dim: int | None = None
    """Width of a code between two projections; None has no projections: codes are as wide as latents."""
    normalize: Normalize = "never"
    """Where latents and codes have length 1: "never", in the "search" for the nearest (DAC), or "always" (LlamaGen)."""
    codebook_weight: float = 1.0
    """Weight of the loss that draws codes to their latents."""
    commitment: float = 0.25
    """Weight of the loss that draws latents to their codes."""
    gradient: Gradient = "straight_through"
    """How the gradient passes from codes to latents."""
    kind: Literal["learned"] = "learned"
    """Names this quantiser in a configuration file."""

    def __post_init__(self):
        check_codebook(self.codebook_size, self.dim)
        check_codebook(self.codebook_size, self.width)
        check_gradient(self.gradient)
        check_weights(codebook_weight=self.codebook_weight, commitment=self.commitment)
        if self.normalize not in typing.get_args(Normalize):
            raise UsageError(
                f"normalize must be one of {', '.join(typing.get_args(Normalize))}, got {self.normalize!r}"
            )

    @property
    def width(self) -> int:
        """Width of a code."""
        return self.dim if self.code_dim is None else self.code_dim

    def make(self, *, rngs: nnx.Rngs) -> LearnedVectorQuantizer:
        """The quantiser."""
        return LearnedVectorQuantizer(self, rngs=rngs)


class LearnedVectorQuantizer(nnx.Module):
    """Nearest-code quantiser whose codes are parameters."""

    def __init__(self, config: LearnedQuantizerConfig, *, rngs: nnx.Rngs):
        self.config = config
        # Rows of about length 1, in every direction alike.
        rows = jax.random.normal(rngs.params(), (config.codebook_size, config.width))
        self.vectors = nnx.Param(rows / config.width**0.5)
        projects = config.code_dim is not None
        linear = functools.partial(nnx.Linear, precision=PRECISION, rngs=rngs)
        self.project_in = linear(config.dim, config.width) if projects else None
        self.project_out = linear(config.width, config.dim) if projects else None

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
        latents, codebook = self._inner(latents), self._codes()
        compared = (latents, codebook) if config.normalize == "never" else (unit(latents), unit(codebook))
        codes, _ = nearest(*jax.lax.stop_gradient(compared))
        chosen = codebook[codes]
        commitment, learning = attraction(latents, chosen, weights)
        perplexity, usage = spread(tally(codes, weights, config.codebook_size), weights)
        return Quantized(
            quantized=self._outer(estimated(latents, chosen, config.gradient)).reshape(z.shape).astype(z.dtype),
            codes=codes.reshape(z.shape[:-1]),
            commitment=config.commitment * commitment,
            perplexity=perplexity,
            usage=usage,
            auxiliary=config.codebook_weight * learning,
        )

    def codebook(self) -> Float[Array, "codes dim"]:
        """The vectors that the codes stand for, as wide as latents."""
        return self._outer(self._codes())

    def lookup(self, codes: Int[Array, "*batch"]) -> Float[Array, "*batch dim"]:
        """The vectors of codes."""
        return self._outer(self._codes()[codes])

    def _codes(self) -> Float[Array, "codes width"]:
        vectors = self.vectors[...]
        return unit(vectors) if self.config.normalize == "always" else vectors

    def _inner(self, latents: Float[Array, "n dim"]) -> Float[Array, "n width"]:
        latents = latents if self.project_in is None else self.project_in(latents)
        return unit(latents) if self.config.normalize == "always" else latents

    def _outer(self, vectors: Float[Array, "*batch width"]) -> Float[Array, "*batch dim"]:
        return vectors if self.project_out is None else self.project_out(vectors)
