"""What tokens cost a transformer: documents of any lengths in batches of few shapes."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from omni.generate.programs import power_of_two
from omni.grammar import Grammar, Tokens
from omni.model import Transformer
from omni.train.cross_entropy import token_losses

BATCH_TOKENS = 8192
"""Tokens of a batch, those that fill up rows among them; a longer row is a batch by itself."""
LOGITS = 1024
"""Tokens of a batch whose logits exist at once."""


def document_losses(
    transformer: Transformer, grammar: Grammar, documents: Sequence[Tokens]
) -> list[Float[np.ndarray, " tokens"]]:
    """Nats that each token costs after those before it in its document, float32; 0 for the first.

    Documents of like lengths share a batch, a row each, filled up behind its end: what stands there is a segment of its
    own, so a document costs what it would alone.
    """
    losses: list[Float[np.ndarray, " tokens"]] = [np.zeros(0, np.float32)] * len(documents)
    by_length: dict[int, list[int]] = {}
    for place, document in enumerate(documents):
        by_length.setdefault(bucket(len(document.ids)), []).append(place)
    for length, places in by_length.items():
        most = max(1, BATCH_TOKENS // length)
        most = 1 << (most.bit_length() - 1)
        for start in range(0, len(places), most):
            batch = places[start : start + most]
            rows = _padded(grammar, [documents[place] for place in batch], length)
            nats = np.asarray(_losses(transformer, *rows))
            for place, row in zip(batch, nats, strict=False):
                losses[place] = np.concatenate([[np.float32(0)], row[: len(documents[place].ids) - 1]])
    return losses


def _padded(
    grammar: Grammar, documents: Sequence[Tokens], length: int
) -> tuple[
    Int[np.ndarray, "rows length"],
    Int[np.ndarray, "rows length 3"],
    Int[np.ndarray, "rows length"],
]:
    """Ids, positions and segments; 0 is the segment of what fills up a row, and of rows that are no document."""
    rows = power_of_two(len(documents))
    ids = np.full((rows, length), grammar.control["pad"], np.int32)
    positions, segments = np.zeros((rows, length, 3), np.int32), np.zeros((rows, length), np.int32)
    for row, document in enumerate(documents):
        index = np.arange(len(document.ids))
        ids[row, index], segments[row, index] = document.ids, 1
        positions[row, index] = grammar.positions(document.states, index)
    return ids, positions, segments


@nnx.jit
def _losses(
    transformer: Transformer,
    ids: Int[Array, "rows length"],
    positions: Int[Array, "rows length 3"],
    segments: Int[Array, "rows length"],
) -> Float[Array, "rows length"]:
    """What the token after each costs; the last column means nothing."""
    stream = transformer.features(ids, positions, segments).stream
    following, chunk = jnp.roll(ids, -1, axis=1), max(1, LOGITS // len(ids))
    heads = transformer.output_weights(), following, transformer.code_head()
    return token_losses(stream, *heads, chunk=chunk).cross_entropy


def bucket(length: int, step: int = 64) -> int:
    """The padded length: a multiple of `step` up to 512, then a power of two."""
    return -(-length // step) * step if length <= 512 else power_of_two(length)
