"""How fast a transformer trains: tokens a second, MFU, and what of a step costs most, on the devices that there are."""

from __future__ import annotations

import dataclasses
import re
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from omni.accelerators import accelerator_of
from omni.bench.report import processor
from omni.data.loader import batches
from omni.model.config import TransformerConfig
from omni.model.presets import PRESETS, parameter_count
from omni.sharding import activations_on
from omni.train.flight import speed
from omni.train.language import TransformerTask
from omni.train.loop import TrainConfig
from omni.train.placement import local_rows, place
from omni.train.program import Program
from omni_tokenizers.errors import UsageError

CONVENTION = (
    "model FLOPs of a token: 6 for each parameter in a matrix product, and causal attention (half the square); nothing "
    "for what is computed anew; over the devices' dense bfloat16 peak"
)
TINY = TransformerConfig(
    vocabulary_size=512, depth=2, dim=64, heads=2, key_value_heads=2, head_dim=32, mlp_dim=128, compute_dtype="bfloat16"
)
_TINY_LENGTH = 128
_WARM_UP, _TRACED = 3, 3
_CONTAINERS = ("while", "call", "conditional", "tuple", "jit", "main")


@dataclass(frozen=True)
class TrainingOptions:
    """What is trained."""

    presets: tuple[str, ...] = ("0.1b", "1b")
    """Names in `omni.model.presets.PRESETS`."""
    row_length: int = 4096
    """Tokens of a row."""
    rows: int = 8
    """Rows of a step on each device."""
    steps: int = 20
    """Steps that are timed."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.presets if name not in PRESETS]:
            raise UsageError(f"no preset {unknown[0]!r}; choose among {', '.join(PRESETS)}")
        for name in ("row_length", "rows", "steps"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")


def measure(options: TrainingOptions) -> dict[str, Any]:
    """Trains each preset for some steps, as its recipe has it, on random documents.

    Where there are none but CPUs, one tiny transformer is trained instead, which only shows that all of this runs.

    Returns:
      {"machine", "convention", "models": by name what `measure_one` finds}.

    Raises:
      UsageError: there is no recipe for the devices.
    """
    device = jax.devices()[0]
    machine = {"device": device.device_kind, "devices": jax.device_count(), "jax": jax.__version__}
    machine |= {"processor": processor()} if device.platform == "cpu" else {}
    with tempfile.TemporaryDirectory() as folder:
        if device.platform == "cpu":
            options = dataclasses.replace(options, row_length=_TINY_LENGTH)
            models = {"tiny": measure_one(configured(TINY, options, folder, recipe=False), options, Path(folder))}
        else:
            models = {
                name: measure_one(
                    configured(dataclasses.replace(PRESETS[name], dropout=0.0), options, folder), options, Path(folder)
                )
                for name in options.presets
            }
    return {"machine": machine, "convention": CONVENTION, "models": models}


def configured(model: TransformerConfig, options: TrainingOptions, folder: str, *, recipe: bool = True) -> TrainConfig:
    """The training that is timed; its step is that of `omni train`."""
    model = dataclasses.replace(model, compute_dtype="bfloat16")
    task = TransformerTask("random", model, row_length=options.row_length)
    return TrainConfig(folder, task, batch_size=options.rows * jax.device_count(), recipe=recipe)


def measure_one(config: TrainConfig, options: TrainingOptions, folder: Path) -> dict[str, Any]:
    """Compiles a training's step and times it, the batches ready on the devices.

    Returns:
      parameters, compile_seconds, step_seconds (the median), tokens_per_second, mfu where the device is known, loss
      after the last step, costs (see `costs`), and how it was computed.
    """
    program = Program(config)
    data = iter(batches(config.task.dataset(0), config.batch_size, local_rows(program.rows, config.batch_size)))
    ready = [place(next(data), program.rows, config.batch_size) for _ in range(4)]
    state, seconds = program.start(), []
    with activations_on(program.mesh, program.rules):
        began = time.perf_counter()
        step = program.train_step().lower(program.shapes, ready[0]).compile()
        compile_seconds = time.perf_counter() - began
        for number in range(_WARM_UP + options.steps):
            began = time.perf_counter()
            state, metrics = jax.block_until_ready(step(state, ready[number % len(ready)]))
            seconds.append(time.perf_counter() - began)
        with jax.profiler.trace(str(folder)):
            for number in range(_TRACED):
                state, metrics = jax.block_until_ready(step(state, ready[number]))
    (trace,) = folder.rglob("*.xplane.pb")
    found = costs(trace)
    trace.unlink()
    total, weight = jax.device_get(metrics["loss"])
    median = statistics.median(seconds[_WARM_UP:])
    model = program.config.task.model
    return {
        "parameters": parameter_count(model),
        "row_length": options.row_length,
        "batch_size": config.batch_size,
        "compile_seconds": round(compile_seconds, 1),
        "step_seconds": median,
        "step_seconds_range": [min(seconds[_WARM_UP:]), max(seconds[_WARM_UP:])],
        **speed(config.task.work(), config.batch_size, 1 / median),
        "loss": float(total / weight),
        "costs": found,
        "computed": {
            "mesh": dataclasses.asdict(program.config.mesh),
            **{name: getattr(model, name) for name in ("attention", "attention_blocks", "remat", "saved")},
        },
    }


def costs(trace: Path, most: int = 3) -> list[dict[str, Any]]:
    """The largest costs in a trace of the profiler: operations by kind, each with its share of the time of all.

    Of accelerators what ran on them, else what the CPU's threads ran. An operation of a compiled program is named
    after what it does, and a number; the number is left out, and so are those that only hold others.
    """
    planes = list(jax.profiler.ProfileData.from_file(str(trace)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:") and any(plane.lines)]
    spent: Counter[str] = Counter()
    for plane in devices or planes:
        lines = list(plane.lines)
        for line in [line for line in lines if line.name == "XLA Ops"] or lines:
            for event in line.events:
                operation = dict(event.stats).get("hlo_op") or (event.name if line.name == "XLA Ops" else None)
                if operation is None:
                    continue
                kind = re.sub(r"[.\d]+(\.clone)*$", "", str(operation).lstrip("%").split(" ")[0])
                if kind not in _CONTAINERS:
                    spent[kind] += event.duration_ns
    whole = sum(spent.values())
    return [{"operation": kind, "share": round(time / whole, 4)} for kind, time in spent.most_common(most)]


def as_text(results: dict[str, Any]) -> str:
    """What was measured, a line or two for each model."""
    machine = results["machine"]
    lines = [f"{machine['devices']} x {machine['device']}, jax {machine['jax']}"]
    if "tiny" in results["models"]:
        lines.append(
            "No accelerator is here: this is a tiny transformer, which shows that all runs and nothing of speed."
        )
    for name, found in results["models"].items():
        mfu = f", MFU {100 * found['mfu']:.1f} %" if "mfu" in found else ""
        lines.append(
            f"{name}: {found['tokens_per_second']:.0f} tokens/s{mfu} ({found['parameters'] / 1e6:.0f} million "
            f"parameters, {found['batch_size']} rows of {found['row_length']} tokens, "
            f"{1000 * found['step_seconds']:.1f} ms a step)"
        )
        largest = ", ".join(f"{cost['operation']} {100 * cost['share']:.0f} %" for cost in found["costs"])
        lines.append(f"  largest costs: {largest}")
    if accelerator_of(machine["device"]):
        lines.append(f"MFU: {results['convention']}.")
    return "\n".join(lines)
