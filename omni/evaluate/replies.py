"""Asking the model, and looking at what it answered."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from omni.bundle import Model
from omni.evaluate.data import seed_of
from omni.evaluate.settings import EvaluationSettings
from omni.parts import Part
from omni.prompts import Request
from omni.reply import Reply

Progress = Callable[[int], None]


def ask(
    model: Model,
    prompts: Sequence[Sequence[Part]],
    want: Sequence[str] | None,
    settings: EvaluationSettings,
    name: str,
    progress: Progress,
    constrained: bool = True,
) -> list[Reply]:
    """A reply to each prompt; the seed of each follows from the settings' seed, `name` and its place."""
    requests = [
        Request(list(prompt), want, seed=seed_of(settings.seed, name, i), constrained=constrained, **settings.sampling)
        for i, prompt in enumerate(prompts)
    ]
    return answers(model, requests, settings.batch, progress)


def answers(model: Model, requests: Sequence[Request], batch: int, progress: Progress) -> list[Reply]:
    """The replies to requests, of which `batch` are handed to the model at once."""
    replies = []
    for start in range(0, len(requests), batch):
        replies += model.generate_batch(requests[start : start + batch])
        progress(len(requests[start : start + batch]))
    return replies


def only_part(reply: Reply, modality: str) -> Part | None:
    """The reply's part if it is a single one of that modality, else None."""
    return reply.parts[0] if [part.modality for part in reply.parts] == [modality] else None


def kept_codes(model: Model, replies: Sequence[Reply]) -> dict[str, list[int]]:
    """How many codes of pictures and sounds survive decoding and encoding again: modality -> [same, all]."""
    pairs = [
        (part, span)
        for reply in replies
        for part, span in zip(reply.parts, reply.spans, strict=True)
        if part.modality != "text"
    ]
    again = model.processor.spans([[part] for part, _ in pairs])
    counts: dict[str, list[int]] = {}
    for (part, span), (encoded,) in zip(pairs, again, strict=True):
        count = counts.setdefault(part.modality, [0, 0])
        if span.codes.shape == encoded.codes.shape:
            count[0] += int(np.sum(span.codes == encoded.codes))
        count[1] += span.codes.size
    return counts


def formed(replies: Sequence[Reply]) -> list[int]:
    """[well-formed replies, all replies]."""
    return [sum(reply.well_formed for reply in replies), len(replies)]
