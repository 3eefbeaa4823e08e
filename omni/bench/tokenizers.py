"""`omni bench tokenizers`: the public tokenizers here, beside transformers in torch, on the same weights and inputs.

Each side has a process and all cores; they are timed in turn, so that whatever else happens on the machine happens to
both. A comparison is of medians, after results were found to agree.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
import statistics
import tempfile
from typing import Any

import numpy as np
from tqdm import tqdm

from omni.bench.families import FAMILIES, Family, Verb
from omni.bench.processes import Remote
from omni.bench.report import describe_machine
from omni.bench.sides import Ours, Theirs
from omni_tokenizers.errors import UsageError

PICTURE = 256
"""Height and width of pictures, in pixels."""
SOUND_ERROR = 1e-4
"""Sounds may differ by this share of the largest value."""
PIXEL_ERROR = 1
"""Pixels may differ by as much: rounding."""
CODE_ERROR = 0.05
"""Share of frames or patches that may have another code somewhere: a tie decided otherwise changes what follows it."""

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compared."""

    families: tuple[str, ...] = tuple(FAMILIES)
    """Keys of `FAMILIES`."""
    batches: tuple[int, ...] = (1, 8)
    """Sounds or pictures in one call."""
    seconds: float = 1.0
    """Length of the sounds."""
    rounds: int = 7
    """Turns of each side."""
    device: str | None = None
    """"cpu" or "gpu"; None takes what both find."""

    def __post_init__(self):
        if unknown := set(self.families) - set(FAMILIES):
            raise UsageError(f"unknown tokenizer {min(unknown)!r}; known are {', '.join(FAMILIES)}")
        if not self.families or not self.batches or min(self.batches) < 1 or self.rounds < 1:
            raise UsageError("families and batches may not be empty, batches and rounds must be at least 1")
        if not 0.1 <= self.seconds <= 600:
            raise UsageError(f"seconds must lie in 0.1 to 600, got {self.seconds:g}")


def compare(options: Options) -> dict[str, Any]:
    """Times everything; `{"machine", "options", "cells"}`, times in seconds. Without torch ours alone is timed.

    Raises:
        OmniError: the sides run on different devices, or something failed in one of them.
    """
    has_torch = _has_torch()
    if not has_torch:
        log.warning("ours alone is timed: what it is compared with needs pip install 'omni-any-to-any[parity]'")
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(Remote("ours", Ours, options.device))
        theirs = stack.enter_context(Remote("torch", Theirs, options.device)) if has_torch else None
        machine = describe_machine([side for side in (ours, theirs) if side is not None])
        total = sum(len(FAMILIES[name].verbs) for name in options.families) * len(options.batches)
        progress = stack.enter_context(tqdm(total=total, unit="cell", disable=None))
        cells = []
        for name in options.families:
            cells += _compare_family(FAMILIES[name], options, ours, theirs, progress)
    return {"machine": machine, "options": dataclasses.asdict(options), "cells": cells}


def _has_torch() -> bool:
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def _compare_family(
    family: Family, options: Options, ours: Remote, theirs: Remote | None, progress: tqdm
) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as directory:
        progress.set_description(f"{family.title}, loading")
        if theirs is not None:
            theirs.call("make", family, directory)
        geometry = ours.call("load", family, directory if theirs is not None else None)
    cells = []
    for verb in family.verbs:
        for batch in options.batches:
            progress.set_description(f"{family.title}, {verb}, {batch}")
            x = example(verb, geometry, batch, options.seconds)
            found = _compare_cell(verb, x, options.rounds, ours, theirs, is_sound="sample_rate" in geometry)
            cells.append({"tokenizer": family.title, "verb": verb, "batch": batch, "input": list(x.shape), **found})
            progress.update()
    return cells


def example(verb: Verb, geometry: dict[str, int], batch: int, seconds: float) -> np.ndarray:
    """Noise to encode, or random codes to decode: what a net computes does not depend on what it reads."""
    random = np.random.default_rng(0)
    is_sound = "sample_rate" in geometry
    samples = round(seconds * geometry["sample_rate"]) if is_sound else 0
    if verb == "encode" and is_sound:
        return (0.3 * random.standard_normal((batch, geometry["channels"], samples))).astype(np.float32)
    if verb == "encode":
        return random.integers(0, 256, (batch, PICTURE, PICTURE, 3), np.uint8)
    if is_sound:
        shape = (batch, geometry["codebooks"], -(-samples // geometry["samples_per_frame"]))
    else:
        shape = (batch, *[PICTURE // geometry["downsampling"]] * 2)
    return random.integers(0, geometry["codebook_size"], shape)


def _compare_cell(
    verb: Verb, x: np.ndarray, rounds: int, ours: Remote, theirs: Remote | None, *, is_sound: bool
) -> dict[str, Any]:
    sides = [side for side in (ours, theirs) if side is not None]
    results, times = {}, {}
    for side in sides:
        results[side.name], first = side.call("first", verb, x)
        times[side.name] = {"first": first, "turns": [], "work": []}
    for _ in range(rounds):
        for side in sides:
            waited, work = side.call("turn")
            times[side.name]["turns"].append(waited)
            times[side.name]["work"].append(work)
    for found in times.values():
        found["median"] = statistics.median(found["turns"])
    if theirs is None:
        return times
    error, limit = difference(results["ours"], results["torch"], is_sound=is_sound)
    ratio = times["torch"]["median"] / times["ours"]["median"]
    return times | {"ratio": ratio, "difference": error, "agrees": bool(error <= limit)}


def difference(ours: np.ndarray, theirs: np.ndarray, *, is_sound: bool) -> tuple[float, float]:
    """How much results differ, and how much they may.

    Codes: the share of frames or patches. Sound: relative to the largest value. Pictures: levels of 0 to 255.
    """
    if ours.shape != theirs.shape:
        return float("inf"), 0.0
    if ours.dtype == np.float32:
        return float(np.abs(ours - theirs).max() / np.abs(theirs).max()), SOUND_ERROR
    if ours.dtype == np.uint8:
        return float(np.abs(ours.astype(int) - theirs).max()), PIXEL_ERROR
    differs = ours != theirs
    return float((differs.any(1) if is_sound else differs).mean()), CODE_ERROR
