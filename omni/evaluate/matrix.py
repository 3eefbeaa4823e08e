"""The modality matrix: how often what comes out in one modality shows what went in in another."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from jaxtyping import Int

from omni.bundle import Model
from omni.evaluate.data import EvaluationData, draw_inputs, seed_of
from omni.evaluate.intervals import cluster_interval, wilson_interval
from omni.evaluate.judges import Judge
from omni.evaluate.replies import Progress, ask, only_part
from omni.evaluate.settings import EvaluationSettings
from omni.parts import Part
from omni.reply import Reply


def clusters_of(source: str, inputs: Sequence[Part], replies: Sequence[Reply]) -> list[Hashable]:
    """What outcomes depend on together: the input, of which there may be fewer than replies.

    Pictures and sounds are a sample, so it is their number that counts, however often each is asked about. Texts are
    all the words and phrasings that there are, each as often as the next: replies to one of them are independent draws,
    unless they are the same reply (a greedy model gives no new evidence when asked again).
    """
    if source == "text":
        return [(id(part), reply.ids.tobytes()) for part, reply in zip(inputs, replies, strict=True)]
    return [id(part) for part in inputs]


def measure_direction(
    model: Model,
    data: EvaluationData,
    judges: Mapping[str, Judge],
    ceiling: float,
    direction: tuple[str, str],
    settings: EvaluationSettings,
    progress: Progress,
) -> tuple[dict, list[Part], list[Reply], list[Reply]]:
    """One cross direction: its cell of the matrix, the inputs, the replies to them and to the shuffled inputs."""
    source, target = direction
    name = f"{source}->{target}"
    inputs, labels = draw_inputs(data, source, settings.per_direction, seed_of(settings.seed, name))
    replies = ask(model, [[part] for part in inputs], [target], settings, name, progress)
    right = judged(judges, replies, target) == labels

    others, true_labels = draw_inputs(data, source, settings.shuffled, seed_of(settings.seed, name, "shuffled"))
    shown = [others[i] for i in derangement(len(others), seed_of(settings.seed, name, "order"))]
    shuffled_replies = ask(model, [[part] for part in shown], [target], settings, f"{name} shuffled", progress)
    cell = {
        "accuracy": float(np.mean(right)),
        "ci95": cluster_interval(right, clusters_of(source, inputs, replies)),
        "n": len(labels),
        "inputs": len({id(part) for part in inputs}),
        "ceiling": ceiling,
        "shuffled": float(np.mean(judged(judges, shuffled_replies, target) == true_labels)),
        "shuffled_n": len(true_labels),
    }
    return cell, inputs, replies, shuffled_replies


def measure_diagonal(
    model: Model,
    data: EvaluationData,
    judges: Mapping[str, Judge],
    ceiling: float,
    modality: str,
    settings: EvaluationSettings,
) -> tuple[dict, list[Part], list[Part]]:
    """decode(encode(x)) of every held-out example: its cell of the matrix, the examples and what came of them.

    Pictures and sounds are judged as generated ones are; text must come back as it was, to the last character.
    """
    examples = data.test[modality]
    decoded = [parts[0] for parts in model.processor.parts(model.processor.spans([[part] for part in examples.parts]))]
    order = derangement(len(examples), seed_of(settings.seed, modality, "diagonal"))
    if modality == "text":
        texts, out = np.array([part.text for part in examples.parts]), np.array([part.text for part in decoded])
        same, shuffled = texts == out, texts[order] == out
    else:
        labels, out = np.asarray(examples.labels), judges[modality].labels(decoded)
        same, shuffled = labels == out, labels[order] == out
    cell = {
        "accuracy": float(same.mean()),
        "ci95": wilson_interval(int(same.sum()), len(same)),
        "n": len(same),
        "inputs": len(same),
        "ceiling": ceiling,
        "shuffled": float(shuffled.mean()),
        "shuffled_n": len(shuffled),
    }
    return cell, list(examples.parts), decoded


def judged(judges: Mapping[str, Judge], replies: list[Reply], target: str) -> Int[np.ndarray, " n"]:
    """The class that each reply shows if it is one part of the target modality."""
    return judges[target].labels([only_part(reply, target) for reply in replies])


def derangement(count: int, seed: int) -> Int[np.ndarray, " count"]:
    """A permutation that leaves nothing in its place: one cycle through all places, in random order."""
    cycle = np.random.default_rng(seed).permutation(count)
    order = np.empty(count, np.int64)
    order[cycle] = np.roll(cycle, 1)
    return order
