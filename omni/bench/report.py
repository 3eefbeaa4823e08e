"""What a comparison was made on, and its table."""

from __future__ import annotations

import contextlib
import datetime
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omni.bench.processes import Remote
from omni.bench.sides import cores
from omni_tokenizers.errors import OmniError, UsageError


def describe_machine(remotes: Sequence[Remote]) -> dict[str, Any]:
    """Date, processor, versions, and device and precision of each side.

    Raises:
        UsageError: they run on different kinds of devices.
    """
    sides = {remote.name: remote.call("machine") for remote in remotes}
    backends = {name: side["backend"] for name, side in sides.items()}
    if len(set(backends.values())) > 1:
        found = " and ".join(f"{name} runs on {backend}" for name, backend in backends.items())
        raise UsageError(f"{found}: add --device cpu, or install both for the GPU")
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "cores": cores(),
        "python": platform.python_version(),
        "sides": sides,
    }


def processor() -> str:
    """What Linux calls the CPU; elsewhere what Python does."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def as_markdown(results: dict[str, Any]) -> str:
    """The machine in two lines and the cells as a table; milliseconds a call, in brackets those of the
    fastest and of the slowest turn."""
    machine, options = results["machine"], results["options"]
    sides = machine["sides"]
    versions = [f"{name} {version}" for side in sides.values() for name, version in side["versions"].items()]
    precision = "; ".join(f"{name}: {side['device']}, {side['precision']}" for name, side in sides.items())
    lines = [
        f"{machine['date']}, {machine['processor']}, {machine['cores']} cores, Python {machine['python']}, "
        f"{', '.join(versions)}.",
        f"{precision}. Sounds of {options['seconds']:g} s, medians of {options['rounds']} turns.",
        "",
        "| tokenizer | | batch | ours, ms | torch, ms | torch / ours | by processor time | compiled in, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(_row, results["cells"])])


def _row(cell: dict[str, Any]) -> str:
    ours, ratio = cell["ours"], cell.get("ratio")
    columns = [
        cell["tokenizer"],
        cell["verb"],
        str(cell["batch"]),
        _milliseconds(ours),
        _milliseconds(cell["torch"]) if "torch" in cell else "",
        "" if ratio is None else f"{ratio:.2f}" if cell["agrees"] else f"{ratio:.2f}, results differ",
        _work_ratio(cell),
        f"{max(ours['first'] - ours['median'], 0):.1f}",
    ]
    return f"| {' | '.join(columns)} |"


def _work_ratio(cell: dict[str, Any]) -> str:
    """torch's processor time over ours: what is left to compare where others keep the processors busy."""
    if "torch" not in cell:
        return ""
    return f"{statistics.median(cell['torch']['work']) / statistics.median(cell['ours']['work']):.2f}"


def _milliseconds(times: dict[str, Any]) -> str:
    median, low, high = (1000 * value for value in (times["median"], min(times["turns"]), max(times["turns"])))
    digits = 0 if median >= 100 else 1
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def check_agreement(results: dict[str, Any]) -> None:
    """An OmniError that names the cells whose results differ."""
    cells = [cell for cell in results["cells"] if not cell.get("agrees", True)]
    if cells:
        names = ", ".join(f"{cell['tokenizer']} {cell['verb']} {cell['batch']}" for cell in cells)
        raise OmniError(f"ours and torch gave different results, so these times mean nothing: {names}")
