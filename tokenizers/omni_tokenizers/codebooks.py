"""Codebooks as public codecs bring them, which only quantise here: learning them is the matter of `quantizers`."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from omni_tokenizers.quantizers import CodebookState, nearest


class Codebook(nnx.Module):
    """Vectors, of which the nearest stands for a latent."""

    def __init__(self, codes: int, dim: int, *, rngs: nnx.Rngs):
        # Not parameters: a save in half precision leaves them as they are.
        self.vectors = CodebookState(jax.random.normal(rngs.params(), (codes, dim)))

    def codebook(self) -> Float[Array, "codes dim"]:
        """The vectors."""
        return self.vectors[...]

    def encode(self, latents: Float[Array, "batch frames dim"]) -> Int[Array, "batch frames"]:
        """The nearest code of each latent."""
        codes, _ = nearest(latents.reshape(-1, latents.shape[-1]), self.codebook())
        return codes.reshape(latents.shape[:-1])

    def lookup(self, codes: Int[Array, "batch frames"]) -> Float[Array, "batch frames dim"]:
        """What each code stands for."""
        return self.codebook()[codes]


class ResidualCodebooks(nnx.Module):
    """Each level quantises what the levels before left over; the first levels alone are a coarser code."""

    def __init__(self, levels: Iterable[nnx.Module]):
        self.levels = nnx.List(levels)

    def encode(self, latents: Float[Array, "batch frames dim"], number: int) -> Int[Array, "batch number frames"]:
        """Codes of the first `number` levels."""
        residual, codes = latents, []
        for level in self.levels[:number]:
            codes.append(level.encode(residual))
            residual = residual - level.lookup(codes[-1])
        return jnp.stack(codes, 1)

    def lookup(self, codes: Int[Array, "batch number frames"]) -> Float[Array, "batch frames dim"]:
        """The sum of what the codes of each level stand for."""
        return sum(level.lookup(codes[:, index]) for index, level in enumerate(self.levels[: codes.shape[1]]))
