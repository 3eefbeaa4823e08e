"""Embedding rows of codes that begin where the codes' own vectors are."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


def start_from_codebook(
    embedding: Float[Array, "vocabulary dim"],
    ids: Int[Array, " codes"],
    vectors: Float[Array, "codes code_dim"],
    share: float,
    key: PRNGKeyArray,
) -> Float[Array, "vocabulary dim"]:
    """An embedding in which codes that look or sound alike begin close to each other.

    A random row tells a transformer nothing of what its code stands for, so that it must learn from data which codes
    are alike, which takes most of a short training. Here the tokenizer's own vectors, centred and scaled to variance 1
    (all dimensions alike, so that distances keep their proportions), go through a random projection, which keeps
    distances too (Johnson and Lindenstrauss 1984), and make up `share` of the variance of each row; the rest stays what
    it was, and keeps close codes apart.

    Args:
      embedding: rows drawn with a deviation of dim ** -0.5.
      ids: the row of each code.
      vectors: the tokenizer's vector of each code.
      share: 0 to 1.
    """
    dim = embedding.shape[1]
    centred = vectors - vectors.mean(0)
    centred /= jnp.maximum(jnp.sqrt(jnp.square(centred).mean()), 1e-6)
    projection = jax.random.normal(key, (vectors.shape[1], dim)) * vectors.shape[1] ** -0.5
    projected = centred @ projection * dim**-0.5
    return embedding.at[ids].set(math.sqrt(share) * projected + math.sqrt(1 - share) * embedding[ids])
