"""A prompt as it is read into a row of the cache, and as it is remembered there."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from omni.generate.requests import PreparedRequest, Shadow
from omni.grammar import Grammar


@dataclass(eq=False)
class Prompt:
    """Ids to read into a row, and their positions and grammar states.

    Where a feature stands the id is negative and tells which, so that what was read of one picture is no other's.
    """

    ids: Int[np.ndarray, " tokens"]
    positions: Int[np.ndarray, "tokens 3"]
    states: Int[np.ndarray, " tokens"]
    features: Float[np.ndarray, "tokens dim"] | None = None
    """What stands where ids are negative; None where none is."""

    @classmethod
    def of(cls, grammar: Grammar, prompt: PreparedRequest | Shadow, is_chat: bool) -> Prompt:
        """The prompt of a request or a shadow; `GrammarError` where it has none of the grammar."""
        ids = np.array(prompt.ids, np.int32)
        states = grammar.annotate_chat(ids) if is_chat else grammar.annotate(ids)
        positions, features = grammar.positions(states, np.arange(len(ids))), None
        if len(places := grammar.feature_places(ids)):
            features = np.zeros((len(ids), prompt.features.shape[1]), np.float32)
            features[places] = prompt.features
            ids[places] = [_name(row) for row in features[places]]
        return cls(ids, positions, states, features)


def shared(held: Int[np.ndarray, " held"], ids: Int[np.ndarray, " tokens"]) -> int:
    """How many ids two sequences begin with alike."""
    length = min(len(held), len(ids))
    differs = held[:length] != ids[:length]
    return int(np.argmax(differs)) if differs.any() else length


def _name(feature: Float[np.ndarray, " dim"]) -> int:
    """A negative id for a feature, by its numbers."""
    return -1 - int.from_bytes(hashlib.blake2b(feature.tobytes(), digest_size=4).digest()) // 2
