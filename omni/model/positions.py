"""Rotary positions in one dimension and in (time, row, column)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from omni.model.config import TransformerConfig

Rotation = tuple[Float[Array, "batch length 1 pairs"], Float[Array, "batch length 1 pairs"]]


def rotation(config: TransformerConfig, positions: Int[Array, "batch length 3"]) -> Rotation:
    """Cosines and sines, float32, of the angles by which each pair of a head's features turns.

    Rotary position embedding (Su et al. 2021, arXiv:2104.09864): pair i turns by position * theta^(-2i / head_dim).
    With `rope` "time" the position is the first coordinate. With "time_row_column" the coordinates are interleaved over
    the pairs (pair i reads coordinate i mod 3), so that each has slow and fast frequencies; where the three are equal,
    as in text, this is the one-dimensional rotation.
    """
    pairs = np.arange(config.head_dim // 2)
    frequencies = jnp.float32(rope_frequencies(config))
    coordinate = np.zeros_like(pairs) if config.rope == "time" else pairs % 3
    angles = jnp.asarray(positions, jnp.float32)[..., coordinate] * frequencies
    return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def rope_frequencies(config: TransformerConfig) -> Float[np.ndarray, " pairs"]:
    """Radians a token, float64, by which each pair turns, slowed by `rope_scaling` if there is any.

    Between the two bounds the factor's weight falls evenly with the turns in `original_length` tokens (Llama 3.1,
    arXiv:2407.21783; the bounds are those of its config.json).
    """
    frequencies = config.rope_theta ** (-2.0 * np.arange(config.head_dim // 2) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_length * frequencies / (2 * np.pi)
    kept = (turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
    kept = np.clip(kept, 0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rotate(x: Float[Array, "batch length heads head_dim"], by: Rotation) -> Float[Array, "batch length heads head_dim"]:
    """Turn the pairs (i, i + head_dim / 2) of every head: the half-rotate convention of Llama in transformers."""
    cosine, sine = by
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x.dtype)
