"""The evaluation from beginning to end: `evaluate` measures cell after cell and writes evaluation/results.json."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Mapping

from etils import epath

from omni.bundle import Model
from omni.evaluate import judges as judging
from omni.evaluate.cells import Cells, model_hash, plain, write_json
from omni.evaluate.data import EvaluationData
from omni.evaluate.matrix import measure_diagonal, measure_direction
from omni.evaluate.replies import Progress, formed, kept_codes
from omni.evaluate.routing import measure_routing, measure_unconstrained
from omni.evaluate.samples import mixed_replies, spread
from omni.evaluate.settings import EvaluationSettings
from omni.evaluate.signature import as_line, model_fields
from omni.evaluate.tokens import measure_audio_tokenizer, measure_bits, measure_image_tokenizer
from omni.evaluate.variety import measure_variety
from omni_tokenizers.errors import OmniError

VERSION = 2  # of the measurements: results of another version are not comparable
DIRECTORY, RESULTS, SAMPLES = "evaluation", "results.json", "samples.json"

_TOKENIZER_MEASURES = {"image": measure_image_tokenizer, "audio": measure_audio_tokenizer}


def evaluate(
    model: Model,
    data: EvaluationData,
    directory: epath.PathLike,
    settings: EvaluationSettings | None = None,
    *,
    limit: int | None = None,
    seconds: Mapping[str, float] | None = None,
    attempts: Mapping[str, int] | None = None,
) -> dict:
    """Measures a model; returns the results and writes them to `directory`/evaluation.

    Cells that an evaluation of the same model, data and settings finished there before are read, not measured again.

    Args:
      settings: counts and sampling.
      limit: at most so many of everything generated; the signature tells.
      seconds: stage -> seconds that it took, put into the results. The evaluation's own are added as `evaluation` (to
        what it took to prepare it, where that is given), those of cells that were finished before among them.
      attempts: stage -> how often it was begun, of stages that were interrupted; put into the results.

    Raises:
      OmniError: if scikit-learn is missing, or the model cannot read the data.
    """
    start = time.monotonic()
    settings = (settings or EvaluationSettings()).limited(limit)
    directory = epath.Path(directory) / DIRECTORY
    key = {"version": VERSION, "judge": judging.VERSION, "model": model_hash(model), "data": data.hash}
    key["engine"] = model.engine.version
    counted = dataclasses.asdict(settings) | {"batch": None}  # the batch changes no reply
    cells = Cells(directory / "cells", key | {"settings": counted})
    bench = _Bench(model, data, settings)
    measured = cells.measure_all(bench.plan(), unit="reply")
    results = _results(measured) | {
        "chance": 1 / len(data.words),
        "held_out": {modality: len(examples) for modality, examples in data.test.items()},
        "limit": limit,
        "seconds": _with_own(seconds or {}, time.monotonic() - start + cells.seconds_before),
        "attempts": dict(attempts or {}),
        "signature": signature(model, data, settings, key["model"], limit),
    }
    results = plain(results)
    write_json(directory / SAMPLES, {name: cell["samples"] for name, cell in measured.items() if "samples" in cell})
    write_json(directory / RESULTS, results)
    return results


def read_samples(directory: epath.PathLike) -> dict[str, list[dict]]:
    """Examples that `evaluate` kept for the report: cell -> samples; `OmniError` where there is no evaluation."""
    path = epath.Path(directory) / DIRECTORY / SAMPLES
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        raise OmniError(f"{path}: no evaluation was finished there; run it first") from None


def signature(model: Model, data: EvaluationData, settings: EvaluationSettings, weights: str, limit: int | None) -> str:
    """Everything that a score depends on, in one line, as sacrebleu has it."""
    fields = {
        "task": f"{data.version}.{VERSION}",
        "data": data.hash,
        "judge": judging.VERSION,
        "n": settings.per_direction,
        "shuffled": settings.shuffled,
        "requests": settings.requests,
        "seed": settings.seed,
        "unconstrained": settings.unconstrained,
        "documents": settings.documents,
        "heard": settings.heard,
        **model_fields(model, {**model.generation, **settings.sampling}, weights),
    }
    if limit is not None:
        fields["limit"] = limit
    return as_line(fields)


class _Bench:
    """The cells of an evaluation; judges are trained when the first cell needs them."""

    def __init__(self, model: Model, data: EvaluationData, settings: EvaluationSettings):
        self.model, self.data, self.settings = model, data, settings

    @functools.cached_property
    def judges(self) -> dict[str, judging.Judge]:
        return judging.fit_judges(self.data)

    @functools.cached_property
    def ceilings(self) -> dict[str, float]:
        return judging.ceilings(self.data, self.judges)

    def plan(self) -> dict[str, tuple[int, Callable[[Progress], dict]]]:
        """Cell -> replies that it takes, and what measures it."""
        settings = self.settings
        modalities = [modality for modality in self.data.modalities if modality in self.model.tokenizers]
        directions = list(itertools.permutations(modalities, 2))
        amount = settings.per_direction + settings.shuffled
        plan = {f"{s}->{t}": (amount, functools.partial(self.direction, (s, t))) for s, t in directions}
        plan |= {f"{m}->{m}": (0, functools.partial(self.diagonal, m)) for m in modalities}
        if self.data.requests:
            plan["routing"] = (settings.requests, self.routing)
            plan["unconstrained"] = (settings.unconstrained, self.unconstrained)
            plan["mixed"] = (settings.shown + 2, self.mixed)
        plan |= {f"bits {s}->{t}": (settings.documents, functools.partial(self.bits, (s, t))) for s, t in directions}
        plan |= {
            f"tokenizer {m}": (0, functools.partial(self.tokenizer, m)) for m in modalities if m in _TOKENIZER_MEASURES
        }
        return plan

    def direction(self, direction: tuple[str, str], progress: Progress) -> dict:
        source, target = direction
        cell, inputs, replies, shuffled = measure_direction(
            self.model, self.data, self.judges, self.ceilings[target], direction, self.settings, progress
        )
        result = {
            "cell": cell,
            "formed": formed([*replies, *shuffled]),
            "kept": kept_codes(self.model, replies),
            "samples": spread(inputs, [reply.parts for reply in replies], self.settings.shown),
        }
        if source == "text":
            result["variety"] = measure_variety(self.model, self.data, target, replies)
        return result

    def diagonal(self, modality: str, progress: Progress) -> dict:
        cell, examples, decoded = measure_diagonal(
            self.model, self.data, self.judges, self.ceilings[modality], modality, self.settings
        )
        return {"cell": cell, "samples": spread(examples, [[part] for part in decoded], self.settings.shown)}

    def routing(self, progress: Progress) -> dict:
        result, _, replies = measure_routing(self.model, self.data, self.judges, self.settings, progress)
        return {"routing": result, "formed": formed(replies), "kept": kept_codes(self.model, replies)}

    def unconstrained(self, progress: Progress) -> dict:
        return {"unconstrained": measure_unconstrained(self.model, self.data, self.settings, progress)}

    def mixed(self, progress: Progress) -> dict:
        return {"samples": mixed_replies(self.model, self.data, self.settings, progress)}

    def bits(self, direction: tuple[str, str], progress: Progress) -> dict:
        return measure_bits(self.model, self.data, direction, self.settings, progress)

    def tokenizer(self, modality: str, progress: Progress) -> dict:
        return _TOKENIZER_MEASURES[modality](self.model, self.data, self.settings)


def _results(measured: dict[str, dict]) -> dict:
    """The results by what they are about, from the cells."""
    matrix: dict[str, dict] = {}
    variety, bits, kept = {}, {}, {}
    constrained = [0, 0]
    for name, cell in measured.items():
        source, _, target = name.removeprefix("bits ").partition("->")
        if "cell" in cell:
            matrix.setdefault(source, {})[target] = cell["cell"]
        if "variety" in cell:
            variety[target] = cell["variety"]
        if "bits" in cell:
            counts = [cell["bits"], cell["tokens"]]
            matrix[source][target]["bits_per_token"] = _share(counts)
            bits[target] = _sum(bits.get(target, [0, 0]), counts)
        for modality, counts in cell.get("kept", {}).items():
            kept[modality] = _sum(kept.get(modality, [0, 0]), counts)
        constrained = _sum(constrained, cell.get("formed", [0, 0]))
    free = measured.get("unconstrained", {}).get("unconstrained", [0, 0])
    return {
        "matrix": {
            source: {target: row[target] for target in matrix if target in row} for source, row in matrix.items()
        },
        "variety": variety,
        "routing": measured.get("routing", {}).get("routing"),
        "well_formed": {
            "constrained": _share(constrained),
            "unconstrained": _share(free),
            "n": constrained[1],
            "n_unconstrained": free[1],
        },
        "bits_per_token": {modality: _share(counts) for modality, counts in bits.items()},
        "token_agreement": {modality: _share(counts) for modality, counts in kept.items()},
        "tokenizers": {n.removeprefix("tokenizer "): c for n, c in measured.items() if n.startswith("tokenizer ")},
    }


def _with_own(seconds: Mapping[str, float], own: float) -> dict[str, float]:
    return {**seconds, "evaluation": round(seconds.get("evaluation", 0.0) + own, 1)}


def _sum(left: list, right: list) -> list:
    return [a + b for a, b in zip(left, right, strict=True)]


def _share(counts: list) -> float | None:
    return counts[0] / counts[1] if counts[1] else None
