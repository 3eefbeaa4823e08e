"""What a context tells a model about the target that follows it: the same targets behind right and wrong contexts.

Nothing is generated and nothing is judged. The contexts alone differ, so likelihoods of a target compare as they are.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float, Int

from omni.bundle import Model
from omni.evaluate.data import seed_of
from omni.evaluate.documents import Direction, joined
from omni.evaluate.intervals import bootstrap_interval, cluster_interval
from omni.evaluate.replies import Progress
from omni.evaluate.settings import DocumentSettings

_TOGETHER = 64  # documents whose rows are handed to the model at once


def measure_contexts(model: Model, direction: Direction, settings: DocumentSettings, progress: Progress) -> dict:
    """The loss of targets behind their own contexts and behind wrong ones, in nats per token, and how often a context
    is found by how likely it makes its target.

    `progress` is told of every target that was read.
    """
    nats, tokens = target_losses(model, direction, progress)
    totals, counts = nats.sum(-1), tokens.sum(-1)
    told, clusters = totals[:, 1] - totals[:, 0], direction.contexts
    modalities = model.grammar.modalities
    return {
        "documents": len(counts),
        "contexts": len(set(clusters)),
        "tokens": counts.sum(),
        "loss": {
            "own": totals[:, 0].sum() / counts.sum(),
            "shuffled": totals[:, 1].sum() / counts.sum(),
            "by_modality": {
                name: nats[:, 0, kind].sum() / tokens[:, kind].sum()
                for kind, name in enumerate(modalities)
                if tokens[:, kind].any()
            },
        },
        "told": {
            "nats_per_token": told.sum() / counts.sum(),
            "ci95": bootstrap_interval(told, counts, clusters, seed_of(settings.seed, direction.name, "interval")),
        },
        "matching": matching(totals[:, : settings.candidates], clusters),
        "matching_shuffled": matching(totals[:, 1:], clusters),
    }


def target_losses(
    model: Model, direction: Direction, progress: Progress
) -> tuple[Float[np.ndarray, "documents contexts kinds"], Int[np.ndarray, "documents kinds"]]:
    """Nats of each target behind its own context, which comes first, and each wrong one, and its number of tokens.

    Kinds of tokens are the grammar's modalities and, last, the document's end, which is of none.
    """
    tables, kinds, documents = model.grammar.tables, len(model.grammar.modalities) + 1, direction.documents
    sources = np.concatenate([np.arange(len(documents))[:, None], direction.wrong], axis=1)
    nats, tokens = np.zeros((*sources.shape, kinds)), np.zeros((len(documents), kinds), np.int64)
    order = np.argsort([len(each.context.ids) + len(each.target.ids) for each in documents], kind="stable")
    for start in range(0, len(order), _TOGETHER):
        pairs = [(place, column) for place in order[start : start + _TOGETHER] for column in range(sources.shape[1])]
        rows = [joined(documents[sources[pair]].context, documents[pair[0]].target) for pair in pairs]
        for pair, found in zip(pairs, model.token_losses(rows), strict=True):
            states = documents[pair[0]].target.states
            kind = np.where(states == tables.end, kinds - 1, tables.modality[states])
            nats[pair] = np.bincount(kind, found[-len(states) :], minlength=kinds)
            tokens[pair[0]] = np.bincount(kind, minlength=kinds)
        progress(len(rows))
    return nats, tokens


def matching(nats: Float[np.ndarray, "documents candidates"], clusters: Sequence[Hashable]) -> dict | None:
    """How often the first candidate is the one under which the target is likeliest; None of fewer than two candidates.

    A target that several candidates make equally likely counts as the share that a draw among them would have.
    """
    candidates = nats.shape[1]
    if candidates < 2:
        return None
    likeliest = nats == nats.min(axis=1, keepdims=True)
    right = likeliest[:, 0] / likeliest.sum(axis=1)
    interval = cluster_interval(right, clusters)
    return {"accuracy": right.mean(), "ci95": interval, "candidates": candidates, "chance": 1 / candidates}
