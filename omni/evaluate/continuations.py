"""What a model writes behind the contexts of documents, beside what truly follows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from omni.bundle import Model
from omni.data.sources import Samples
from omni.evaluate.data import seed_of
from omni.evaluate.documents import Direction
from omni.evaluate.intervals import cluster_interval
from omni.evaluate.replies import Progress, answers
from omni.evaluate.settings import DocumentSettings
from omni.grammar import Span
from omni.pages import described
from omni.prompts import Request
from omni.reply import Reply, reply_spans


def measure_continuations(
    model: Model, samples: Samples, direction: Direction, settings: DocumentSettings, progress: Progress
) -> dict:
    """Shares of well-formed replies and of texts that come out as they stand in the document; examples of replies.

    Texts and examples are of replies that have the parts of their document's target, in order, and are as long as the
    direction's longest target at most. Those that show what is well-formed are free: the grammar does not hold them,
    nobody tells them which parts are wanted, and they may fill the model's context, lest they be cut.
    """
    rng = np.random.default_rng(seed_of(settings.seed, direction.name, "replies"))
    chosen = rng.permutation(len(direction.documents))[: settings.limit].tolist()
    parts = [samples[direction.documents[place].index] for place in chosen]
    contexts = [[part for part in own if part.context] for own in parts]
    targets = [reply_spans(model.grammar, direction.documents[place].target.ids) for place in chosen]
    rooms = [model.context_length - len(direction.documents[place].context.ids) for place in chosen]
    longest = max(len(document.target.ids) for document in direction.documents)

    def answered(constrained: bool) -> list[Reply]:
        requests = [
            Request(
                context,
                [span.modality for span in target] if constrained else None,
                seed=seed_of(settings.seed, direction.name, place, constrained),
                max_tokens=min(longest, room) if constrained else room,
                constrained=constrained,
            )
            for place, context, target, room in zip(chosen, contexts, targets, rooms, strict=True)
        ]
        return answers(model, requests, settings.batch, progress)

    def share(right: Sequence[bool]) -> dict:
        right, clusters = np.array(right), [direction.contexts[place] for place in chosen]
        return {"share": right.mean(), "ci95": cluster_interval(right, clusters), "n": len(right)}

    replies = answered(constrained=True)
    found = {"well_formed": share([reply.well_formed for reply in answered(constrained=False)])}
    if any(span.modality == "text" for target in targets for span in target):
        others = [direction.documents[direction.wrong[place, 0]] for place in chosen]
        written = _texts(model, [reply.spans for reply in replies])
        true = _texts(model, targets)
        shuffled = _texts(model, [reply_spans(model.grammar, other.target.ids) for other in others])
        found["exact_match"] = share([own == text for own, text in zip(written, true, strict=True)])
        found["exact_match"]["shuffled"] = np.mean([own == text for own, text in zip(written, shuffled, strict=True)])
    shown = zip(contexts, parts, replies, strict=True)
    found["samples"] = [
        {
            "context": [described(part) for part in context],
            "target": [described(part) for part in own if not part.context],
            "reply": [described(part) for part in reply.parts],
        }
        for context, own, reply in itertools.islice(shown, settings.shown)
    ]
    return found


def _texts(model: Model, documents: Sequence[Sequence[Span]]) -> list[list[str]]:
    """The texts of each, as their tokenizer gives them back, without white space at their ends."""
    texts = model.processor.parts([[span for span in spans if span.modality == "text"] for spans in documents])
    return [[text.text.strip() for text in own] for own in texts]
