"""Time and memory of a training step from its compiled program and its arithmetic: the roofline of a pod."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omni.accelerators import Accelerator
from omni.compile.schedule import Program
from omni.model.config import TENSORS, TransformerConfig
from omni.model.presets import active_parameter_count


@dataclass(frozen=True)
class Estimate:
    """What one step takes on each device."""

    model_flops: float
    """Operations that the model needs; see `omni.train.task.Work`."""
    hardware_flops: float
    """Those that the busiest device computes: the model's, what the backward pass computes anew, and where rows are
    split, what the last stretch of a row has more to look back at than the others, which wait for it."""
    memory_bytes: float
    link_bytes: float
    """Sent to devices of the same slice."""
    network_bytes: float
    """Sent to other slices."""
    hidden: float
    """Share of all that is sent while computation is scheduled beside it."""
    accelerator: Accelerator

    def seconds(self) -> dict[str, float]:
        """Least time of matrix units, memory and interconnect, each alone."""
        device = self.accelerator
        return {
            "matrix": self.hardware_flops / device.flops,
            "memory": self.memory_bytes / device.memory_rate,
            "interconnect": self.link_bytes / device.link_rate + self.network_bytes / device.network_rate,
        }

    def step_seconds(self) -> tuple[float, float]:
        """Least time of a step, (long, short): memory is waited for in the first and hidden behind the matrix units in
        the second; what is sent beside computation costs nothing up to its length, and the rest is waited for."""
        seconds = self.seconds()
        waited = (1 - self.hidden) * seconds["interconnect"]
        busy = max(seconds["matrix"], self.hidden * seconds["interconnect"])
        return busy + seconds["memory"] + waited, max(busy, seconds["memory"]) + waited

    def mfu(self) -> tuple[float, float]:
        """Model FLOPs utilisation, (low, high), of the two times of a step."""
        long, short = self.step_seconds()
        needed = self.model_flops / self.accelerator.flops
        return needed / long, needed / short

    def to_json(self) -> dict[str, Any]:
        """The keys of `omni compile --json` that speak of time."""
        seconds = self.seconds()
        return {
            "flops": {"model": self.model_flops, "hardware": self.hardware_flops},
            "bytes": {"hbm": self.memory_bytes, "ici": self.link_bytes, "dcn": self.network_bytes},
            "seconds": seconds,
            "binds": max(seconds, key=seconds.get),
            "overlap": self.hidden,
            "mfu": list(self.mfu()),
        }


def estimate(
    program: Program,
    config: TransformerConfig,
    model_flops_per_token: float,
    tokens: float,
    length: int,
    slices: Sequence[int],
    accelerator: Accelerator,
    stretches: int = 1,
) -> Estimate:
    """The estimate of a step.

    Args:
      model_flops_per_token: see `omni.train.task.Work`.
      tokens: that a device is given, on average.
      length: tokens of a row.
      stretches: devices over which a row is split as it comes, so that the last one has most to look back at.
      slices: the slice of each device of the mesh, in the mesh's order.
    """
    model = tokens * model_flops_per_token
    return Estimate(
        model_flops=model,
        hardware_flops=model
        + tokens * recomputed_flops_per_token(config, length)
        + tokens * (1 - 1 / stretches) * attention_flops_per_token(config, length),
        accelerator=accelerator,
        **_moved(program, slices),
    )


def estimate_generation(
    program: Program,
    config: TransformerConfig,
    tokens: float,
    capacity: int,
    slices: Sequence[int],
    accelerator: Accelerator,
) -> Estimate:
    """The estimate of a program that emits one token for each request.

    Args:
      tokens: that a device computes, on average: requests over devices.
      capacity: slots of the cache, all of which every token looks back at.
      slices: the slice of each device of the mesh, in the mesh's order.
    """
    attention = 4.0 * config.depth * config.heads * config.head_dim * capacity
    flops = tokens * (2.0 * active_parameter_count(config) + attention)
    return Estimate(model_flops=flops, hardware_flops=flops, accelerator=accelerator, **_moved(program, slices))


def _moved(program: Program, slices: Sequence[int]) -> dict[str, float]:
    """The fields of an estimate that say what moves between devices and their memories."""
    collectives = program.collectives()
    sent = sum(each.bytes for each in collectives)
    network = sum(each.bytes * between_slices(each.groups[0], slices) for each in collectives)
    return {
        "memory_bytes": program.memory_bytes(),
        "link_bytes": sent - network,
        "network_bytes": network,
        "hidden": sum(each.bytes for each in collectives if each.hidden) / sent if sent else 0.0,
    }


def between_slices(group: Sequence[int], slices: Sequence[int]) -> float:
    """Share of a collective's bytes that leave a device's slice: in a group of m devices in each of k slices, a
    device's own m-th of what k devices send to one another, (k - 1) / (m k - 1) of all it sends."""
    count = len({slices[device] for device in group})
    return (count - 1) / (len(group) - 1) if count > 1 else 0.0


def recomputed_flops_per_token(config: TransformerConfig, length: int) -> float:
    """Operations of the backward pass that the forward pass had done before: the tensors of a block that were not kept,
    attention's scores, which no kernel keeps, and the logits."""
    width, groups = config.heads * config.head_dim, config.key_value_heads * config.head_dim
    logits, scores = 2.0 * config.vocabulary_size * config.dim, width * length  # with half of the keys
    feed = config.mlp_dim * (config.experts_per_token if config.experts else 1)
    cost = {
        "query": 2 * config.dim * width,
        "key": 2 * config.dim * groups,
        "value": 2 * config.dim * groups,
        "attention": 2 * scores,
        "attention_output": 2 * config.dim * width,
        "gate": 2 * config.dim * feed,
        "up": 2 * config.dim * feed,
        "mlp_output": 0,  # the block's last: nothing in it needs it
    }
    kept = kept_tensors(config)
    return logits + config.depth * (scores + sum(value for name, value in cost.items() if name not in kept))


def attention_flops_per_token(config: TransformerConfig, length: int) -> float:
    """Operations of causal attention between the projections: two products forward, five backward (one of them the
    scores again), and the first two again where their result is not kept."""
    products = 7 if "attention" in kept_tensors(config) else 9
    return float(products * config.depth * config.heads * config.head_dim * length)


def kept_tensors(config: TransformerConfig) -> set[str]:
    """The tensors of a block that the backward pass finds as the forward pass left them, among `TENSORS`."""
    if config.remat == "none":
        return set(TENSORS)
    return set(TENSORS) - {"attention"} if config.remat == "dots" else {*config.saved, *config.offloaded}
