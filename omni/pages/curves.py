"""Loss curves as SVG, written by hand so that the report needs no script and no plotting library.

A chart shows itself in a notebook, too: `chart("losses", read_losses("runs/own/image/metrics.jsonl"))`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jinja2
from etils import epath

WIDTH, HEIGHT = 350, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 40
COLOURS = ("#2563c9", "#d9622b", "#1d8a5b", "#8b46c4", "#b58900", "#c2366b", "#4a7a8c", "#6b6f76")
_MOST_POINTS = 300
_LOGARITHMIC_FROM = 10.0  # ratio of the largest to the smallest loss


@dataclass(frozen=True)
class Line:
    """One curve, its points in the picture's coordinates."""

    name: str
    points: str
    held_out: bool
    colour: int
    """Index into the style sheet's series."""


@dataclass(frozen=True)
class Chart:
    """Curves of one training run."""

    title: str
    lines: list[Line]
    steps: list[tuple[float, str]]
    """(x, label) of the ticks of the horizontal axis."""
    losses: list[tuple[float, str]]
    """(y, label) of the ticks of the vertical axis."""
    logarithmic: bool
    stages: list[float]
    """x of the last step of each stage but the last, of a run that has stages."""

    def __repr__(self) -> str:
        return f"Chart({self.title}: {', '.join(line.name for line in self.lines)})"

    def _repr_svg_(self) -> str:
        environment = jinja2.Environment(loader=jinja2.PackageLoader("omni.pages"), autoescape=True, trim_blocks=True)
        return environment.get_template("chart.svg.j2").render(chart=self, drawing=sys.modules[__name__])


def read_losses(path: epath.PathLike) -> dict[str, list[tuple[int, float]]]:
    """Name -> (step, value) of every loss in a metrics.jsonl; a line that was cut off is left out."""
    losses: dict[str, list[tuple[int, float]]] = {}
    for values in _lines(path):
        for name, value in values.items():
            if "loss" in name.split("/") and math.isfinite(value):
                losses.setdefault(name, []).append((values["step"], value))
    return losses


def read_boundaries(path: epath.PathLike) -> list[int]:
    """Last step of each stage but the last in a metrics.jsonl; empty of a run without stages."""
    pairs = itertools.pairwise(_lines(path))
    return [before["step"] for before, after in pairs if before.get("stage") != after.get("stage")]


def _lines(path: epath.PathLike) -> Iterator[dict[str, float]]:
    path = epath.Path(path)
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def chart(title: str, losses: dict[str, list[tuple[int, float]]], boundaries: Sequence[int] = ()) -> Chart | None:
    """A chart of named losses; None where there is nothing to draw. Logarithmic where losses span a factor of ten.

    Args:
      boundaries: steps at which a stage ends and another one begins.
    """
    if not losses:
        return None
    steps = [step for points in losses.values() for step, _ in points]
    values = [value for points in losses.values() for _, value in points]
    logarithmic = min(values) > 0 and max(values) / min(values) >= _LOGARITHMIC_FROM
    scale = math.log10 if logarithmic else float
    y_ticks = _logarithmic_ticks(min(values), max(values)) if logarithmic else _ticks(min(0.0, *values), max(values))
    low, high = scale(min(y_ticks[0], min(values))), scale(max(y_ticks[-1], max(values)))
    x_ticks = _ticks(0, max(steps))
    right = max(max(steps), 1)

    def x(step: float) -> float:
        return round(LEFT + step / right * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (scale(value) - low) / max(high - low, 1e-9) * (HEIGHT - TOP - BOTTOM), 1)

    families = sorted({name.removeprefix("held_out/") for name in losses})
    lines = [
        Line(
            name=_title(name),
            points=" ".join(f"{x(step)},{y(value)}" for step, value in _thinned(points)),
            held_out=name.startswith("held_out/"),
            colour=families.index(name.removeprefix("held_out/")),
        )
        for name, points in sorted(losses.items(), key=lambda item: (item[0].startswith("held_out/"), item[0]))
    ]
    return Chart(
        title,
        lines,
        [(x(tick), f"{tick:g}") for tick in x_ticks if tick <= right],
        [(y(tick), f"{tick:g}") for tick in y_ticks],
        logarithmic,
        [x(step) for step in boundaries],
    )


def _title(name: str) -> str:
    held_out, name = name.startswith("held_out/"), name.removeprefix("held_out/").removeprefix("loss/")
    return f"{name}, held out" if held_out else name


def _thinned(points: Sequence[tuple[int, float]]) -> Sequence[tuple[int, float]]:
    stride = -(-len(points) // _MOST_POINTS)
    return [*points[:: max(stride, 1)], points[-1]]


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers from at most `low` to at least `high`."""
    span = max(high - low, 1e-9)
    rough = span / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first = math.floor(low / step)
    return [round(step * i, 10) for i in range(first, math.ceil(high / step - 1e-9) + 1)]


def _logarithmic_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    dense = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    inside = [tick for tick in dense if low / 2 <= tick <= high * 2]
    return [round(tick, 10) for tick in (inside if len(inside) <= 7 else [10.0**power for power in powers])]
