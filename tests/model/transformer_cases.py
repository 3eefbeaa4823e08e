"""Configurations, models and batches for the tests of the transformer."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omni.model import Transformer, TransformerConfig

TINY = TransformerConfig(
    vocabulary_size=64, depth=2, dim=24, heads=4, key_value_heads=2, head_dim=12, mlp_dim=32, rope="time_row_column"
)
VARIANTS = {
    "pre rms": TINY,
    "swin layer": dataclasses.replace(TINY, norm_order="swin", qk_norm="layer", tied_embeddings=False),
    "one dimension": dataclasses.replace(TINY, rope="time", qk_norm="none", rope_theta=100.0, norm_epsilon=1e-2),
}


apply_model = nnx.jit(Transformer.__call__)


@cache
def noisy_model(config: TransformerConfig) -> Transformer:
    """A model whose every parameter is random, norms and biases too."""
    random = np.random.default_rng(0)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))

    def fill(path: tuple[str, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        centre = 1 if "norm" in jax.tree_util.keystr(path) else 0
        return jnp.asarray(centre + 0.25 * random.standard_normal(leaf.shape), leaf.dtype)

    nnx.update(model, jax.tree_util.tree_map_with_path(fill, nnx.state(model, nnx.Param)))
    return model


def batch(seed: int = 0, rows: int = 2, length: int = 11) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random ids and positions, and rows of two segments with padding behind (and one of padding between them)."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, TINY.vocabulary_size, (rows, length), dtype=np.int32)
    positions = random.integers(0, 40, (rows, length, 3), dtype=np.int32)
    segments = np.tile(np.array([1, 1, 1, 1, 0, 2, 2, 2, 2, 0, 0], np.int32), (rows, 1))
    return ids, positions, segments
