"""`omni bench generate`: replies here beside those of transformers' `generate`, on the same weights.

Each side has a process and all cores, and they are timed in turn. What transformers' side lacks is made up for: it gets
batches of one kind, sorted, processors that admit what the grammar admits here, and of its caches, with compilation and
without, the one that it is fastest with.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import statistics
import tempfile
from typing import Any

from tqdm import tqdm

from omni.bench.generation_sides import KINDS, Ours, Theirs, Work
from omni.bench.processes import Remote
from omni.bench.report import describe_machine
from omni_tokenizers.errors import OmniError, UsageError


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compared."""

    kinds: tuple[str, ...] = KINDS
    """Of `generation_sides.KINDS`."""
    batches: tuple[int, ...] = (1, 8)
    """Requests that are answered together."""
    text_tokens: int = 128
    """Length of texts."""
    prompt_tokens: int = 512
    """Length of prompts where reading is timed; elsewhere prompts have 32."""
    rounds: int = 3
    """Turns of each side."""
    device: str | None = None
    """"cpu" or "gpu"; None takes what both find."""

    def __post_init__(self):
        if unknown := set(self.kinds) - set(KINDS):
            raise UsageError(f"unknown kind {min(unknown)!r}; known are {', '.join(KINDS)}")
        if not self.kinds or not self.batches or min(*self.batches, self.rounds, self.text_tokens) < 1:
            raise UsageError("kinds and batches may not be empty; batches, rounds and tokens must be at least 1")
        if not 2 <= self.prompt_tokens <= 4096:
            raise UsageError(f"prompt tokens must be 2 to 4096, got {self.prompt_tokens}")


def compare(options: Options) -> dict[str, Any]:
    """Times everything; `{"machine", "options", "cells"}`, times in seconds.

    Raises:
        UsageError: torch or transformers is missing.
        OmniError: the sides run on different devices, disagree on greedy tokens, or something failed in one of them.
    """
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        raise UsageError("what replies are compared with is missing: pip install 'omni-any-to-any[parity]'")
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(Remote("ours", Ours, options.device))
        theirs = stack.enter_context(Remote("torch", Theirs, options.device))
        sides = [ours, theirs]
        machine = describe_machine(sides)
        _load(ours, theirs)
        works = [
            Work(kind, batch, options.prompt_tokens if kind == "prompt" else 32, options.text_tokens)
            for kind in options.kinds
            for batch in options.batches
            if kind != "mixed" or batch > 1
        ]
        progress = stack.enter_context(tqdm(works, unit="cell", disable=None))
        cells = []
        for work in progress:
            progress.set_description(f"{work.kind}, {work.batch}")
            cells.append({"kind": work.kind, "batch": work.batch, **_timed(work, options.rounds, sides)})
    return {"machine": machine, "options": dataclasses.asdict(options), "cells": cells}


def _load(ours: Remote, theirs: Remote) -> None:
    """The same weights on both sides, shown by greedy tokens."""
    with tempfile.TemporaryDirectory() as directory:
        theirs.call("make", directory)
        ours.call("load", directory)
    own, other = (side.call("greedy", 24) for side in (ours, theirs))
    if own != other:
        raise OmniError("ours and torch chose different greedy tokens, so their times mean nothing")


def _timed(work: Work, rounds: int, sides: list[Remote]) -> dict[str, Any]:
    found = {side.name: {"way": side.call("first", work), "turns": []} for side in sides}
    for _ in range(rounds):
        for side in sides:
            found[side.name]["turns"].append(side.call("turn", work))
    for times in found.values():
        times["median"] = statistics.median(times["turns"])
    return found | {"ratio": found["torch"]["median"] / found["ours"]["median"]}


def as_markdown(results: dict[str, Any]) -> str:
    """The machine in two lines and the cells as a table; seconds, in brackets those of the fastest and slowest turn."""
    machine, options = results["machine"], results["options"]
    versions = [f"{name} {version}" for side in machine["sides"].values() for name, version in side["versions"].items()]
    lines = [
        f"{machine['date']}, {machine['processor']}, {machine['cores']} cores, Python {machine['python']}, "
        f"{', '.join(versions)}.",
        f"Texts of {options['text_tokens']} tokens, pictures of 1,024, prompts of 32 or, where reading is timed, "
        f"{options['prompt_tokens']}; medians of {options['rounds']} turns.",
        "",
        "| | batch | ours, s | torch, s | torch / ours | torch's fastest way |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(_row, results["cells"])])


def _row(cell: dict[str, Any]) -> str:
    ours, theirs = cell["ours"], cell["torch"]
    columns = [cell["kind"], str(cell["batch"]), _seconds(ours), _seconds(theirs), f"{cell['ratio']:.2f}"]
    return f"| {' | '.join([*columns, theirs['way']])} |"


def _seconds(times: dict[str, Any]) -> str:
    return f"{times['median']:.2f} ({min(times['turns']):.2f} to {max(times['turns']):.2f})"
