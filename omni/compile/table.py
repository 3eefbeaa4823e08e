"""Compiles the pods of docs/pods.md, and the published runs beside which predictions are held.

    python -m omni.compile.table docs/results/compile.json [NAME ...]

compiles all, or those that are named, from the directory of the checkout. Each is written when it is compiled, so what
is interrupted goes on with the names that are left. `omni compile` with a row's arguments finds the same.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omni.compile.compiling import compile_training
from omni.experiment import load_experiment, override
from omni_tokenizers.errors import UsageError

MISSED = 8.0
"""Points of MFU by which a prediction may miss a published run; what lies further above it is an upper bound."""


@dataclass(frozen=True)
class Pod:
    """A training and the chips for which it is compiled."""

    experiment: str
    """File under experiments/, without its ending."""
    topology: str
    slices: int = 1
    overrides: tuple[str, ...] = ()
    """Of the experiment's keys, as on a command line."""
    published: float | None = None
    """MFU in percent that others measured with this shape, batch and mesh; the experiment says who."""

    def command(self) -> str:
        """What a user types for the same."""
        slices = f" --slices {self.slices}" if self.slices > 1 else ""
        words = [f"omni compile experiments/{self.experiment}.py --topology {self.topology}{slices}", *self.overrides]
        return " ".join(words)

    def compile(self) -> dict[str, Any]:
        """As `compile_training`, from the checkout's directory."""
        config = override(
            load_experiment(f"experiments/{self.experiment}.py"), list(self.overrides), prog="omni compile"
        )
        found = compile_training(config, self.topology, self.slices)
        return {"length": config.task.row_length, "batch_size": config.batch_size, **found}


_LESS_KEPT = ("--task.model.saved", "query", "key", "value", "attention")
PODS = {
    "7b v5p:4x4x4": Pod("pods/chameleon_7b", "v5p:4x4x4"),
    "7b v5e:16x16": Pod("pods/chameleon_7b", "v5e:16x16", overrides=_LESS_KEPT),
    "34b v5p:4x8x8": Pod("pods/chameleon_34b", "v5p:4x8x8"),
    "1b v6e:4x4, 2 slices": Pod("pods/early_fusion_1b", "v6e:4x4", slices=2),
    "8 experts v5p:4x4x4": Pod("pods/mixture_1b", "v5p:4x4x4"),
    "7b, 128k tokens v5p:4x4x4": Pod("pods/context_128k", "v5p:4x4x4"),
}
"""What CI compiles under `aot`."""
PUBLISHED = {
    "32b v5p:4x4x4": Pod("published/v5p_32b", "v5p:4x4x4", published=71.5),
    "16b v5e:16x16": Pod("published/v5e_16b", "v5e:16x16", published=61.1),
    "32b v5e:16x16": Pod("published/v5e_32b", "v5e:16x16", published=66.9),
    "70b v6e:16x16": Pod("published/v6e_70b", "v6e:16x16", published=50.0),
    "70b v5p:4x8x8": Pod("published/v5p_70b", "v5p:4x8x8", published=65.0),
}
"""Runs of others, beside which the predictor is held."""


def pods_table(rows: dict[str, dict[str, Any]]) -> str:
    """What was found of `PODS`, as Markdown."""
    columns: dict[str, Callable[[dict], str]] = {
        "tokens of a row x rows": lambda row: f"{row['length']:,} x {row['batch_size']}",
        "memory, of GB": lambda row: f"{row['memory']['total'] / 1e9:.1f} of {row['memory']['hbm'] / 1e9:.0f}",
        "TFLOP": lambda row: f"{row['flops']['model'] / 1e12:.0f}",
        "computed": lambda row: f"{row['flops']['hardware'] / 1e12:.0f}",
        "GB touched": lambda row: f"{row['bytes']['hbm'] / 1e9:.0f}",
        "GB sent": lambda row: f"{row['bytes']['ici'] / 1e9:.1f}",
        "to other slices": lambda row: f"{row['bytes']['dcn'] / 1e9:.2f}",
        "binds": lambda row: row["binds"],
        "MFU, %": lambda row: "{:.0f} to {:.0f}".format(*(100 * x for x in row["mfu"])),
    }
    return _markdown("compiled", columns, {name: rows[name] for name in PODS if name in rows})


def published_table(rows: dict[str, dict[str, Any]]) -> str:
    """What was found of `PUBLISHED`, beside what was measured, as Markdown."""
    columns: dict[str, Callable[[dict], str]] = {
        "published MFU, %": lambda row: f"{row['published']:.1f}",
        "predicted": lambda row: "{:.0f} to {:.0f}".format(*(100 * x for x in row["mfu"])),
        "": verdict,
    }
    return _markdown("run", columns, {name: rows[name] for name in PUBLISHED if name in rows})


def verdict(row: dict[str, Any]) -> str:
    """How the range that was predicted stands to the MFU that was published."""
    low, high = (100 * x for x in row["mfu"])
    if low - row["published"] > MISSED:
        return "upper bound"
    return "too low" if row["published"] - high > MISSED else "within 8 points"


def _markdown(first: str, columns: dict[str, Callable[[dict], str]], rows: dict[str, dict]) -> str:
    lines = [[first, *columns], ["---"] * (1 + len(columns))]
    lines += [[name, *(show(row) for show in columns.values())] for name, row in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(file: str, *names: str) -> None:
    """Compiles the named rows, or all, into a JSON file."""
    every, path = PODS | PUBLISHED, Path(file)
    for name in names:
        if name not in every:
            raise UsageError(f"no row is called {name!r}; choose among {', '.join(map(repr, every))}")
    kept = (
        json.loads(path.read_text())
        if path.exists()
        else {"command": "python -m omni.compile.table " + file, "rows": {}}
    )
    for name in names or every:
        pod, since = every[name], time.process_time()
        found = pod.compile()
        published = {} if pod.published is None else {"published": pod.published}
        versions = {package: version(package) for package in ("jax", "libtpu")}
        kept["rows"][name] = {"command": pod.command(), "versions": versions, **published, **found}
        path.write_text(json.dumps(kept, indent=1) + "\n")
        print(f"{name}: {time.process_time() - since:.0f} s of processor time", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
