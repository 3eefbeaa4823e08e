"""Compiles the step of a training, or of generation, for a topology of accelerators that need not be there."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import nnx

from omni.compile.estimate import estimate, estimate_generation
from omni.compile.fitting import generation_remedies, training_remedies
from omni.compile.schedule import Program as Schedule
from omni.compile.topologies import GPUS, WITHOUT_A_GPU, accelerator_named, slice_numbers, topology_devices
from omni.generate import Engine
from omni.model import Transformer, decoder_on
from omni.model.attention import row_order
from omni.model.quantized import check_dtype
from omni.sharding import ShardingRules, activations_on, make_mesh
from omni.train.language import TransformerTask
from omni.train.loop import TrainConfig
from omni.train.program import Program, by_recipe
from omni_tokenizers.errors import OmniError, UsageError

_TOO_LARGE = (
    r"Used ([\d.]+)(\w) of ([\d.]+)(\w) hbm. Exceeded hbm capacity",
    r"total memory required for HLO temporaries \(([\d.]+)(\w)\) exceeds available HBM \(([\d.]+)(\w)\)",
)
"""How libtpu says so, once it has laid out all of memory and, where that is hopeless, before."""
_UNITS = {"K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


def compile_training(config: TrainConfig, topology: str, slices: int = 1) -> dict[str, Any]:
    """Compiles the very step that `omni train` calls, and measures it on paper.

    Args:
      topology: accelerator and shape of a slice, as v5p:4x4x4, or GPUs of a machine, as h100:8.
      slices: how many slices or machines, joined by a network.

    Returns:
      JSON with the keys topology, devices, slices, memory {arguments, temporaries, total, hbm} in bytes of a device,
      and, for a transformer, those of `Estimate.to_json`.

    Raises:
      UsageError: the topology is unknown, or the mesh does not fit it.
      OmniError: the compiler is not installed, or the program does not fit a device's memory.
    """
    accelerator, devices = accelerator_named(topology), topology_devices(topology, slices)
    program = Program(config, devices)
    config = program.config
    is_language = isinstance(config.task, TransformerTask)
    with activations_on(program.mesh, program.rules):
        lowered = program.train_step().lower(*program.step_shapes())
        is_balanced = is_language and row_order(config.task.row_length) is not None
    remedies = partial(training_remedies, config, program.mesh) if is_language else lambda missing: []
    compiled, found = _compiled(lowered, topology, slices, len(devices), remedies)
    if is_language:
        length = config.task.row_length
        tokens = config.batch_size * length / len(devices)
        schedule = Schedule(compiled.as_text(), len(devices))
        stretches = 1 if is_balanced else program.mesh.shape["context"]
        order = slice_numbers(program.mesh)
        work = (config.task.model, config.task.work().flops_per_token, tokens, length)
        found |= estimate(schedule, *work, order, accelerator, stretches).to_json()
    return found


def compile_generation(
    config: TrainConfig,
    topology: str,
    slices: int = 1,
    *,
    requests: int = 8,
    capacity: int | None = None,
    weights_dtype: str | None = None,
    cache_dtype: str | None = None,
) -> dict[str, Any]:
    """Compiles the very loop by which `omni generate` emits tokens, of the model of a training.

    Args:
      requests: how many are answered together.
      capacity: tokens of prompt and reply that the cache has room for; by default those of a row of the training.
      weights_dtype, cache_dtype: as of `omni.load`.

    Returns:
      As `compile_training`; all but memory is of one token for each request, and "tokens_per_second", [low, high], is
      what all requests can get together.

    Raises:
      UsageError: the topology is unknown, the mesh does not fit it, or no transformer is trained.
      OmniError: as `compile_training`.
    """
    accelerator = accelerator_named(topology)
    if not isinstance(config.task, TransformerTask):
        raise UsageError("only a transformer generates; this experiment trains a tokenizer")
    capacity = config.task.row_length if capacity is None else capacity
    if min(requests, capacity) < 1:
        raise UsageError(f"requests and capacity must be at least 1, got {requests} and {capacity}")
    check_dtype("weights_dtype", weights_dtype)
    check_dtype("cache_dtype", cache_dtype)
    devices = topology_devices(topology, slices)
    config = by_recipe(config, devices) if config.recipe else config
    mesh, model = make_mesh(config.mesh, devices), config.task.model
    shapes = nnx.eval_shape(lambda: Transformer(model, rngs=nnx.Rngs(0)))
    decoder = decoder_on(mesh, ShardingRules(), shapes, weights_dtype)
    engine = Engine(decoder, config.task.shards.grammar, mesh=mesh, cache_dtype=cache_dtype)
    held = {"weights_dtype": weights_dtype, "cache_dtype": cache_dtype}
    remedies = partial(generation_remedies, model, mesh, requests, capacity, **held)
    compiled, found = _compiled(engine.lower(requests, capacity), topology, slices, len(devices), remedies)
    schedule = Schedule(compiled.as_text(), len(devices)).loop()
    tokens = requests / len(devices)
    estimated = estimate_generation(schedule, model, tokens, capacity, slice_numbers(mesh), accelerator)
    rates = [requests / seconds for seconds in estimated.step_seconds()]
    return (
        found | {"requests": requests, "capacity": capacity} | held | estimated.to_json() | {"tokens_per_second": rates}
    )


def _compiled(
    lowered: jax.stages.Lowered, topology: str, slices: int, devices: int, remedies: Callable[[float], list[str]]
) -> tuple[jax.stages.Compiled, dict[str, Any]]:
    """A program, compiled, and what there is to say of any.

    Args:
      remedies: which settings free so many bytes of a device.
    """
    is_gpu = topology.partition(":")[0] in GPUS
    try:
        with warnings.catch_warnings():
            # Of devices that are not there jax's cache of programs reads none, and each is compiled anew.
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")
            compiled = lowered.compile(compiler_options=WITHOUT_A_GPU if is_gpu else None)
    except jax.errors.JaxRuntimeError as error:
        raise OmniError(refusal(str(error), topology, remedies)) from error
    used = memory(compiled) | {"hbm": accelerator_named(topology).memory}
    if is_gpu and used["total"] > used["hbm"]:  # libtpu refuses what does not fit; the compiler for GPUs does not mind
        raise OmniError(too_large(topology, used["total"], used["hbm"], remedies))
    return compiled, {"topology": topology, "slices": slices, "devices": devices, "memory": used}


def memory(compiled: jax.stages.Compiled) -> dict[str, float]:
    """Bytes of one device: arguments (the state, which the results overwrite), temporaries, and both with the code."""
    found = compiled.memory_analysis()
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    total = found.argument_size_in_bytes + results + found.temp_size_in_bytes + found.generated_code_size_in_bytes
    return {
        "arguments": float(found.argument_size_in_bytes),
        "temporaries": float(found.temp_size_in_bytes),
        "total": float(total),
    }


def refusal(message: str, topology: str, remedies: Callable[[float], list[str]]) -> str:
    """What a compiler's complaint about memory says to people; another complaint stays as it is, in a line."""
    found = next(filter(None, (re.search(pattern, message) for pattern in _TOO_LARGE)), None)
    if found is None:
        return f"{topology}: the compiler refuses the program ({message.strip().splitlines()[0][:300]})"
    wanted, unit, there, unit_there = found.groups()
    return too_large(topology, float(wanted) * _UNITS[unit], float(there) * _UNITS[unit_there], remedies)


def too_large(topology: str, wanted: float, there: float, remedies: Callable[[float], list[str]]) -> str:
    """That a device has not as many bytes as are wanted, and which settings would fit."""
    settings = remedies(wanted - there)
    told = f"{', or '.join(settings)} would fit it" if settings else "no single setting frees as much"
    needs, has, over = (f"{size / _UNITS['G']:.2f}G" for size in (wanted, there, wanted - there))
    return f"{topology}: it needs {needs} of a device's {has}, {over} too much; {told}"


def as_text(found: dict[str, Any]) -> str:
    """What was found, for people."""
    used = found["memory"]
    lines = [
        f"{found['topology']}, {found['slices']} slices, {found['devices']} devices"
        if found["slices"] > 1
        else f"{found['topology']}, {found['devices']} devices",
        f"memory of a device: {used['total'] / 1e9:.1f} of {used['hbm'] / 1e9:.1f} GB "
        f"({used['arguments'] / 1e9:.1f} arguments, {used['temporaries'] / 1e9:.1f} temporaries)",
    ]
    if "seconds" in found:
        flops, sent, seconds = found["flops"], found["bytes"], found["seconds"]
        generating = "tokens_per_second" in found
        step = f"a token of each of {found['requests']} requests" if generating else "a step"
        low, high = found["tokens_per_second"] if generating else (100 * share for share in found["mfu"])
        lines += [
            f"{step}: {flops['model'] / 1e12:.3g} TFLOP a device for the model, {flops['hardware'] / 1e12:.3g} in all, "
            f"{sent['hbm'] / 1e9:.3g} GB of memory touched, {sent['ici'] / 1e9:.3g} GB sent within its slice, "
            f"{sent['dcn'] / 1e9:.3g} GB to others, {100 * found['overlap']:.0f} % of it beside computation",
            f"seconds at least: {seconds['matrix']:.3g} matrix units, {seconds['memory']:.3g} memory, "
            f"{seconds['interconnect']:.3g} interconnect; {found['binds']} binds",
            f"at most {low:.0f} to {high:.0f} tokens/s of all requests together, {found['capacity']} slots of cache"
            if generating
            else f"MFU of at most {low:.0f} to {high:.0f} % (6 N D and causal attention)",
        ]
    return "\n".join(lines)
