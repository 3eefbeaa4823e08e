"""Variety: does the model make its own examples, or replay those that it was trained on?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float, Int

from omni.bundle import Model
from omni.evaluate.data import EvaluationData
from omni.evaluate.features import FEATURES
from omni.parts import Part
from omni.reply import Reply

SAME = 0.01  # root mean square difference of features under which two examples are one


def measure_variety(model: Model, data: EvaluationData, modality: str, replies: Sequence[Reply]) -> dict:
    """Generated parts of a modality beside the training examples.

    A copy has the code sequence of a training example (`data.train` or `data.pool`) as the tokenizer writes it, or lies
    within `SAME` of one. Distances are root mean square differences of `FEATURES`, between things that have all been
    through the tokenizer (generated ones have), to the nearest training example, median. Real held-out examples give
    the same two numbers to compare with: coarse codes coincide by chance too.
    """
    pairs = [
        (part, span.codes)
        for reply in replies
        for part, span in zip(reply.parts, reply.spans, strict=True)
        if part.modality == modality
    ]
    train, train_codes = _through_tokenizer(model, data.train[modality].parts)
    real, real_codes = _through_tokenizer(model, data.test[modality].parts)
    known = _keys(train_codes) | _keys(data.pool.get(modality, ()))
    reference = FEATURES[modality](train)
    result = {"distinct": len(_keys(codes for _, codes in pairs)), "n": len(pairs)}
    for suffix, parts, codes in (
        ("", [part for part, _ in pairs], [codes for _, codes in pairs]),
        ("_real", real, real_codes),
    ):
        if not parts:
            result |= {f"copies{suffix}": None, f"nearest{suffix}": None}
            continue
        distances = nearest_distances(FEATURES[modality](parts), reference)
        copied = [_key(item) in known or distance < SAME for item, distance in zip(codes, distances, strict=True)]
        result |= {f"copies{suffix}": float(np.mean(copied)), f"nearest{suffix}": float(np.median(distances))}
    return result


def nearest_distances(
    items: Float[np.ndarray, "n features"], reference: Float[np.ndarray, "m features"]
) -> Float[np.ndarray, " n"]:
    """Root mean square difference of each item to the nearest of the reference."""
    items, reference = items.astype(np.float64), reference.astype(np.float64)
    squares = (items**2).sum(1)[:, None] - 2 * items @ reference.T + (reference**2).sum(1)
    return np.sqrt(np.maximum(squares.min(axis=1), 0) / items.shape[1])


def _through_tokenizer(model: Model, parts: Sequence[Part]) -> tuple[list[Part], list[Int[np.ndarray, "*shape"]]]:
    spans = model.processor.spans([[part] for part in parts])
    return [own[0] for own in model.processor.parts(spans)], [own[0].codes for own in spans]


def _keys(items: Iterable[Int[np.ndarray, "*shape"]]) -> set[tuple]:
    return {_key(item) for item in items}


def _key(codes: Int[np.ndarray, "*shape"]) -> tuple:
    codes = np.asarray(codes, np.int32)
    return codes.shape, codes.tobytes()
