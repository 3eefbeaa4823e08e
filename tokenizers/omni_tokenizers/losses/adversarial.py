"""Losses between a tokenizer and a discriminator, each for every example of a batch, so that sums over microbatches and
devices stay exact.

`logits` and `features` are lists, as discriminators return them: the mean over an entry's positions, then over entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

_EPSILON = 1e-4
_LARGEST = 1e4


def hinge(
    real: Sequence[Float[Array, "batch ..."]], fake: Sequence[Float[Array, "batch ..."]]
) -> Float[Array, " batch"]:
    """What a discriminator minimises: (max(0, 1 - D(x)) + max(0, 1 + D(x'))) / 2.

    Source: Lim and Ye 2017, arXiv:1705.02894; halved as in VQGAN.
    """
    return (_mean(lambda x: jax.nn.relu(1 - x), real) + _mean(lambda x: jax.nn.relu(1 + x), fake)) / 2


def deception(fake: Sequence[Float[Array, "batch ..."]]) -> Float[Array, " batch"]:
    """What the net minimises against `hinge`: -D(x')."""
    return _mean(lambda x: -x, fake)


def feature_matching(
    real: Sequence[Float[Array, "batch ..."]], fake: Sequence[Float[Array, "batch ..."]]
) -> Float[Array, " batch"]:
    """Absolute difference of a discriminator's features, relative to the mean size of the original's, mean over layers.

    Source: EnCodec (Défossez et al. 2022, arXiv:2210.13438, equation 2), with each example's own mean size.
    """
    layers = []
    for original, copy in zip(real, fake, strict=True):
        original = jax.lax.stop_gradient(original)
        axes = tuple(range(1, original.ndim))
        size = jnp.maximum(jnp.abs(original).mean(axes), _EPSILON)
        layers.append(jnp.abs(original - copy).mean(axes) / size)
    return jnp.stack(layers).mean(0)


def adaptive_weight(reconstruction: Any, adversarial: Any) -> Float[Array, ""]:
    """|gradient of the reconstruction loss| / (|gradient of the adversarial loss| + 1e-4), at most 1e4, and constant.

    Source: VQGAN (Esser et al. 2021, arXiv:2012.09841, equation 7), with the gradients at the decoder's last layer.
    """
    ratio = optax.global_norm(reconstruction) / (optax.global_norm(adversarial) + _EPSILON)
    return jax.lax.stop_gradient(jnp.clip(ratio, 0, _LARGEST))


def _mean(function: Callable[[Array], Array], entries: Sequence[Float[Array, "batch ..."]]) -> Float[Array, " batch"]:
    return jnp.stack([function(entry).mean(tuple(range(1, entry.ndim))) for entry in entries]).mean(0)
