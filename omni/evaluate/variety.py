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
NEAR = 1 / 8  # share of codes that may differ in a near-copy: two of a picture's sixteen
_BLOCK = 64  # examples compared at once: a block beside some 20,000 others stays in the processor's cache


def measure_variety(model: Model, data: EvaluationData, modality: str, replies: Sequence[Reply]) -> dict:
    """Generated parts of a modality beside the training examples.

    A copy has the code sequence of a training example (`data.train` or `data.pool`) as the tokenizer writes it, or lies
    within `SAME` of one. A near-copy is a copy, or differs from a training example in at most `NEAR` of its codes: a
    model that replays what it knows by heart, with a slip here and there, makes no copies but near-copies. `differing`
    is the share of codes that differ from the nearest training example, median. Distances are root mean square
    differences of `FEATURES`, between things that have all been through the tokenizer (generated ones have), to the
    nearest training example, median. Real held-out examples give the same numbers (`_real`) to compare with: coarse
    codes coincide by chance too.
    """
    pairs = [
        (part, span.codes)
        for reply in replies
        for part, span in zip(reply.parts, reply.spans, strict=True)
        if part.modality == modality
    ]
    train, train_codes = _through_tokenizer(model, data.train[modality].parts)
    real, real_codes = _through_tokenizer(model, data.test[modality].parts)
    known = {_key(codes): codes for codes in (*train_codes, *data.pool.get(modality, ()))}.values()
    reference = FEATURES[modality](train)
    result = {"distinct": len({_key(codes) for _, codes in pairs}), "n": len(pairs)}
    for suffix, parts, codes in (
        ("", [part for part, _ in pairs], [codes for _, codes in pairs]),
        ("_real", real, real_codes),
    ):
        if not parts:
            result |= {f"{name}{suffix}": None for name in ("copies", "near_copies", "differing", "nearest")}
            continue
        distances = nearest_distances(FEATURES[modality](parts), reference)
        differing = fewest_differing(codes, known)
        copied = (differing == 0) | (distances < SAME)
        result |= {
            f"copies{suffix}": float(np.mean(copied)),
            f"near_copies{suffix}": float(np.mean(copied | (differing <= NEAR))),
            f"differing{suffix}": float(np.median(differing)),
            f"nearest{suffix}": float(np.median(distances)),
        }
    return result


def fewest_differing(
    items: Sequence[Int[np.ndarray, "*shape"]], known: Iterable[Int[np.ndarray, "*shape"]]
) -> Float[np.ndarray, " n"]:
    """Share of each item's codes that differ from those of the nearest known one of its shape; 1 if there is none."""
    by_shape: dict[tuple, list] = {}
    for codes in known:
        by_shape.setdefault(codes.shape, []).append(codes.ravel())
    shares = np.ones(len(items))
    for shape, others in by_shape.items():
        places = [place for place, codes in enumerate(items) if codes.shape == shape]
        columns = np.ascontiguousarray(np.stack(others).T, np.int32)
        for start in range(0, len(places), _BLOCK):
            chosen = places[start : start + _BLOCK]
            block = np.stack([items[place].ravel() for place in chosen])
            shares[chosen] = _count_differing(block, columns).min(axis=1) / len(columns)
    return shares


def _count_differing(
    block: Int[np.ndarray, "rows size"], columns: Int[np.ndarray, "size known"]
) -> Int[np.ndarray, "rows known"]:
    """How many codes differ, for every pair: code after code, so that no array of all pairs' codes is made."""
    counts = np.zeros((len(block), columns.shape[1]), np.uint16)
    for own, others in zip(block.T.astype(np.int32), columns, strict=True):
        counts += own[:, None] != others
    return counts


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


def _key(codes: Int[np.ndarray, "*shape"]) -> tuple:
    codes = np.asarray(codes, np.int32)
    return codes.shape, codes.tobytes()
