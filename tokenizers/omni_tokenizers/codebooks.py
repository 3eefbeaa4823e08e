"""Codebooks as public codecs bring them, which only quantise here, and quantisers that learn in their place."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from omni_tokenizers.quantizers import CodebookState, LevelledQuantizerConfig, Quantized, make_quantizer, nearest


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

    def codebooks(self) -> tuple[Float[Array, "codes dim"], ...]:
        """The vectors of each level's codes."""
        return tuple(level.codebook() for level in self.levels)


class LearnedCodebooks(nnx.Module):
    """A quantiser with levels that learns where `ResidualCodebooks` would stand, and encodes and decodes like them."""

    def __init__(self, config: LevelledQuantizerConfig, *, rngs: nnx.Rngs):
        self.quantizer = make_quantizer(config, rngs=rngs)

    def __call__(
        self,
        latents: Float[Array, "batch frames dim"],
        key: PRNGKeyArray | None,
        *,
        training: bool,
        weights: Float[Array, "batch frames"],
    ) -> Quantized:
        """As the quantiser."""
        return self.quantizer(latents, key, training=training, weights=weights)

    def encode(self, latents: Float[Array, "batch frames dim"], number: int) -> Int[Array, "batch number frames"]:
        """Codes of the first `number` levels."""
        return self.quantizer(latents, training=False).codes[..., :number].swapaxes(1, 2)

    def lookup(self, codes: Int[Array, "batch number frames"]) -> Float[Array, "batch frames dim"]:
        """The sum of what the codes of each level stand for."""
        return self.quantizer.lookup(codes.swapaxes(1, 2))

    def codebooks(self) -> tuple[Float[Array, "codes dim"], ...]:
        """The vectors of each level's codes."""
        return self.quantizer.codebooks()
