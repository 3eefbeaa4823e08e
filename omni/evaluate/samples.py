"""Examples kept for the report, as JSON."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from omni.bundle import Model
from omni.evaluate.data import EvaluationData, draw_inputs, seed_of
from omni.evaluate.replies import Progress, ask
from omni.evaluate.settings import EvaluationSettings
from omni.pages import described
from omni.parts import Part, Text
from omni.reply import Reply


def sample(inputs: Sequence[Part], outputs: Sequence[Part], title: str = "") -> dict:
    """An input and what came of it; pictures and sounds as data URIs."""
    return {
        "title": title,
        "input": [described(part) for part in inputs],
        "output": [described(part) for part in outputs],
    }


def spread(inputs: Sequence[Part], outputs: Sequence[Sequence[Part]], count: int) -> list[dict]:
    """The first `count` examples."""
    return [sample([part], own) for part, own in zip(inputs[:count], outputs[:count], strict=True)]


def mixed_replies(model: Model, data: EvaluationData, settings: EvaluationSettings, progress: Progress) -> list[dict]:
    """Replies of three parts to words alone, and replies of every modality to a prompt of every modality."""
    longest = max((len(request.order) for request in data.requests), default=0)
    candidates = [request for request in data.requests if len(request.order) == longest]
    chosen = np.random.default_rng(settings.seed).permutation(len(candidates))[: settings.shown]
    asked = [candidates[i] for i in chosen]
    free = ask(model, [[Text(request.text)] for request in asked], None, settings, "mixed", progress)
    samples = [sample([Text(r.text)], reply.parts, "words alone") for r, reply in zip(asked, free, strict=True)]
    want = list(data.modalities)
    for reply, prompt in _together(model, data, want, settings, progress):
        samples.append(sample(prompt, reply.parts, "text, picture and sound together"))
    return samples


def _together(
    model: Model, data: EvaluationData, want: list[str], settings: EvaluationSettings, progress: Progress
) -> list[tuple[Reply, list[Part]]]:
    columns = []
    for modality in want:
        parts, labels = draw_inputs(data, modality, 10 * len(data.words) ** 2, seed_of(settings.seed, "together"))
        columns.append([parts[labels.tolist().index(label)] for label in (7 % len(data.words), 3 % len(data.words))])
    prompts = [list(prompt) for prompt in zip(*columns, strict=True)]
    return list(zip(ask(model, prompts, want, settings, "together", progress), prompts, strict=True))
