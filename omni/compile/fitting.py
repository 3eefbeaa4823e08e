"""Which settings would bring what is too large within the memory of its devices.

What they free is counted from shapes, without compiling again: what blocks keep for the backward pass, the state, and
caches. A compiler needs a little more or less, so a remedy has to free a tenth more than is missing.
"""

from __future__ import annotations

import math

import jax
from flax import nnx
from jax.sharding import Mesh

from omni.compile.estimate import kept_tensors
from omni.model.config import TENSORS, TransformerConfig
from omni.model.presets import parameter_count
from omni.sharding import ShardingRules, spread
from omni.train.loop import TrainConfig
from omni.train.optimizer import partition

_MARGIN = 1.1
_TIMES = (2, 4, 8, 16, 32, 64)
"""As many microbatches or devices, that are still worth a word."""


def training_remedies(config: TrainConfig, mesh: Mesh, missing: float) -> list[str]:
    """Settings of a transformer's training, each of which frees `missing` bytes of a device, and how much it frees."""
    model, accumulation, wanted = config.task.model, config.optimizer.accumulation, missing * _MARGIN
    rows = spread(mesh, ShardingRules().batch)
    tokens = config.batch_size * config.task.row_length / (rows * mesh.shape["context"] * accumulation)
    on_device = kept_tensors(model) - set(model.offloaded)
    sizes = tensor_bytes(model, tokens, mesh.shape["tensor"])
    kept = {name: sizes[name] for name in TENSORS if name in on_device}
    split = mesh.shape["fsdp"] * mesh.shape["tensor"] * mesh.shape["expert"]
    parameters, moving = (count / split for count in _counts(config))
    inputs = tokens * model.dim / mesh.shape["tensor"] * model.depth * _width(model)  # of the blocks
    activations = sum(kept.values()) + inputs
    gradients = 4 * moving if accumulation == 1 else 0  # which are summed up apart

    found = []
    if names := _enough(kept, wanted):
        words = [] if model.remat == "blocks" else ["--task.model.remat", "blocks"]
        words += ["--task.model.saved", *(name for name in kept if name not in names)]
        anew = ", ".join(name for name in kept if name in names)
        found.append(f"{' '.join(words)} ({_gib(sum(kept[name] for name in names))} less; {anew} computed anew)")
    splits = [times for times in _TIMES if config.batch_size % (rows * accumulation * times) == 0]
    for times in splits:
        if (freed := activations * (1 - 1 / times) - gradients) >= wanted:
            found.append(f"--optimizer.accumulation {accumulation * times} ({_gib(freed)} less)")
            break
    for times in splits:
        if (freed := (activations + 4 * parameters + 8 * moving) * (1 - 1 / times)) >= wanted:
            found.append(f"{times} times as many devices along fsdp ({_gib(freed)} less)")
            break
    return found


def generation_remedies(
    model: TransformerConfig,
    mesh: Mesh,
    requests: int,
    capacity: int,
    missing: float,
    weights_dtype: str | None = None,
    cache_dtype: str | None = None,
) -> list[str]:
    """Settings of a generation, each of which frees `missing` bytes of a device."""
    tensor, wanted = mesh.shape["tensor"], missing * _MARGIN
    heads = model.key_value_heads / (tensor if model.key_value_heads % tensor == 0 else 1)
    rows = max(1, requests / spread(mesh, ShardingRules().batch))
    scale = 4 / model.head_dim  # of a cache in int8
    widths = {None: _width(model), "float32": 4, "bfloat16": 2, "int8": 1 + scale}
    cache = 2 * model.depth * rows * heads * capacity * model.head_dim * widths[cache_dtype]
    weights = (widths | {"int8": 1})[weights_dtype] * parameter_count(model) / (tensor * mesh.shape["fsdp"])
    found = []
    if (freed := cache * (1 - widths["int8"] / widths[cache_dtype])) >= wanted:
        found.append(f"--cache-dtype int8 ({_gib(freed)} less)")
    if cache > wanted:
        settings = {"--requests": requests, "--capacity": capacity}
        fewer = {name: math.floor(value * (1 - wanted / cache)) for name, value in settings.items()}
        found += [f"{name} {value}" for name, value in fewer.items() if value]
    for times in _TIMES:
        if model.key_value_heads % (tensor * times) == 0 and (cache + weights) * (1 - 1 / times) >= wanted:
            return [*found, f"{times} times as many devices along tensor"]
    return found


def tensor_bytes(model: TransformerConfig, tokens: float, tensor: int = 1) -> dict[str, float]:
    """Bytes that a device needs to keep each of a block's `TENSORS`, in all blocks.

    Args:
      tokens: of a microbatch, that it is given.
      tensor: devices over which heads, hidden widths and the stream's tokens are split.
    """
    heads, groups = model.heads * model.head_dim / tensor, model.key_value_heads * model.head_dim / tensor
    hidden = model.mlp_dim * (model.experts_per_token if model.experts else 1) / tensor
    widths = {"query": heads, "key": groups, "value": groups, "attention": heads}
    widths |= {"gate": hidden, "up": hidden, "attention_output": model.dim / tensor, "mlp_output": model.dim / tensor}
    return {name: tokens * width * model.depth * _width(model) for name, width in widths.items()}


def _counts(config: TrainConfig) -> tuple[int, int]:
    """(of all, of those that move) parameters."""
    params = nnx.state(nnx.eval_shape(lambda: config.task.build(nnx.Rngs(0))), nnx.Param)
    moving, _ = partition(params, config.task.trained(), config.optimizer.frozen)
    return tuple(sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, moving))


def _enough(kept: dict[str, float], wanted: float) -> list[str]:
    """The fewest tensors that free so much together, the largest first; none if all are not enough."""
    names, freed = [], 0.0
    for name in sorted(kept, key=kept.get, reverse=True):
        if freed >= wanted:
            break
        names.append(name)
        freed += kept[name]
    return names if freed >= wanted else []


def _width(model: TransformerConfig) -> int:
    """Bytes of a value in the compute type."""
    return 2 if model.compute_dtype == "bfloat16" else 4


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}G"
