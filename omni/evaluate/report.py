"""The report: one self-contained page that shows what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from etils import epath

from omni.pages import curves as drawing
from omni.pages import write_page

MODALITIES = ("text", "image", "audio")
FILE = "report.html"
NOT_MEASURED = "not measured"


def write_report(
    results: Mapping,
    samples: Mapping[str, Sequence[Mapping]],
    curves: Mapping[str, epath.PathLike],
    directory: epath.PathLike,
    *,
    title: str = "Omni",
    command: str = "",
) -> epath.Path:
    """Writes `directory`/report.html, with pictures, sounds and curves inside it; returns its path.

    Args:
      results: as `evaluate` returned them.
      samples: as `read_samples` gives them.
      curves: title -> metrics.jsonl of a training run; what is not there is left out.
      title: of the page.
      command: the command that made it.
    """
    charts = [drawing.chart(name, drawing.read_losses(path)) for name, path in curves.items()]
    values = {
        "title": title,
        "command": command,
        "results": results,
        "matrix": results.get("matrix", {}),
        "samples": samples,
        "charts": [chart for chart in charts if chart],
        "modalities": _modalities(results),
        "longest_stage": max(results.get("seconds", {}).values(), default=0),
    }
    filters = {"percent": percent, "number": number, "duration": duration}
    return write_page(epath.Path(directory) / FILE, "omni.evaluate", "report.html.j2", values, filters)


def write_documents_report(
    results: Mapping, samples: Mapping[str, Sequence[Mapping]], directory: epath.PathLike, *, title: str
) -> epath.Path:
    """Writes `directory`/report.html of an evaluation on a user's documents; returns its path.

    Args:
      results, samples: as `evaluate_documents` returned them.
      title: of the page.
    """
    values = {"title": title, "results": results, "samples": samples}
    filters = {"percent": percent, "number": number, "duration": duration}
    return write_page(epath.Path(directory) / FILE, "omni.evaluate", "documents.html.j2", values, filters)


def as_table(results: Mapping) -> str:
    """What `evaluate_documents` measured, a line for each direction."""
    rows = [("direction", "documents", "loss", "shuffled", "told", "context found (chance)", "well-formed", "exact")]
    for name, found in results["directions"].items():
        low, high = found["told"]["ci95"]
        matching = found["matching"]
        exact = found.get("exact_match")
        rows.append(
            (
                *(name, str(found["documents"]), number(found["loss"]["own"]), number(found["loss"]["shuffled"])),
                f"{number(found['told']['nats_per_token'])} ({number(low)} to {number(high)})",
                f"{percent(matching['accuracy'])} ({percent(matching['chance'])})",
                percent(found["well_formed"]["share"]),
                percent(exact["share"]) if exact else "-",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, "loss, shuffled, told: nats a token, with 95 % intervals"])


def percent(share: float | None, digits: int = 1) -> str:
    """A share as a percentage, without needless zeros; "not measured" where there is none."""
    if share is None:
        return NOT_MEASURED
    text = f"{100 * share:.{digits}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) + "\N{NO-BREAK SPACE}%"


def number(value: float | None, digits: int = 2) -> str:
    """A number with fixed digits; "not measured" where there is none."""
    return NOT_MEASURED if value is None else f"{value:.{digits}f}"


def duration(seconds: float) -> str:
    """Seconds in words."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else (f"{rest} s" if seconds >= 10 else f"{seconds:.1f} s")


def _modalities(results: Mapping) -> list[str]:
    """Text, image and audio, and whatever else was measured."""
    found = set(results.get("matrix", {}))
    found |= {target for row in results.get("matrix", {}).values() for target in row}
    return [*MODALITIES, *sorted(found - set(MODALITIES))]
