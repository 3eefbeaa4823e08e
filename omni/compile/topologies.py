"""The devices of a topology that need not be there: TPUs as libtpu describes them, GPUs as jax's CUDA plugin does."""

from __future__ import annotations

import os
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from omni.accelerators import ACCELERATORS, Accelerator
from omni_tokenizers.errors import OmniError, UsageError


@dataclass(frozen=True)
class Gpu:
    """What XLA must know of a GPU beside `Accelerator`; NVIDIA's data, as XLA's own descriptions of targets have it."""

    kind: str
    """What jax calls it."""
    capability: int
    """Major number of its compute capability; the minor one is 0."""
    processors: int
    """Streaming multiprocessors."""
    units: int
    """Float32 units of a multiprocessor."""
    shared_memory: int
    """Bytes of a multiprocessor."""
    clock: float
    """GHz."""
    cache: int
    """Bytes of its second-level cache."""


_HOPPER_MEMORY = 233_472
GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 8, 108, 64, 167_936, 1.41, 41_943_040),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 9, 132, 128, _HOPPER_MEMORY, 1.98, 52_428_800),
    "h100-pcie": Gpu("NVIDIA H100 PCIe", 9, 114, 128, _HOPPER_MEMORY, 1.755, 52_428_800),
    "h200": Gpu("NVIDIA H200", 9, 132, 128, _HOPPER_MEMORY, 1.98, 52_428_800),
}
"""By the names of `ACCELERATORS`; all others there are TPUs."""
WITHOUT_A_GPU = {"xla_gpu_autotune_level": "0"}
"""Options for a compiler that has no GPU on which it could try out kernels."""


def accelerator_named(topology: str) -> Accelerator:
    """The accelerator that a topology begins with; a `UsageError` names those that there are."""
    name = topology.partition(":")[0]
    if name not in ACCELERATORS:
        raise UsageError(f"topology {topology!r}: choose one of {', '.join(ACCELERATORS)}, as in v5p:4x4x4 or h100:8")
    return ACCELERATORS[name]


def topology_devices(topology: str, slices: int) -> list[jax.Device]:
    """The devices of `slices` slices of a topology, as v5p:4x4x4, or of as many machines of GPUs, as h100:8.

    Raises:
      UsageError: there is no such accelerator, or it is not written so.
      OmniError: what describes it is not installed, or does not know the shape.
    """
    from jax.experimental import topologies

    accelerator_named(topology)
    name, _, shape = topology.partition(":")
    if name in GPUS:
        if not shape.isdigit() or int(shape) < 1:
            raise UsageError(f"topology {topology!r}: GPUs are counted by machine, as in {name}:8")
        place = {"topology": f"1x{slices}x{shape}", "target_config": target_description(name)}
        described, extra = {"platform": "cuda", **place}, "aot-gpu"
    else:
        described, extra = {"platform": "tpu", "topology_name": topology, "num_slices": slices}, "aot"
        # Nothing is asked of a machine's metadata, and other processes may compile at the same time.
        for variable, value in (("TPU_SKIP_MDS_QUERY", "1"), ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")):
            os.environ.setdefault(variable, value)
    try:
        return list(topologies.get_topology_desc(**described).devices)
    except Exception as error:  # whatever the plugin raises
        line = str(error).strip().splitlines()[0]
        raise OmniError(
            f"{topology}: it cannot be described here ({line}); pip install 'omni-any-to-any[{extra}]', or choose "
            "another topology"
        ) from error


def target_description(name: str) -> str:
    """A GPU as XLA's compiler takes it (text of a `GpuTargetConfigProto`)."""
    gpu, accelerator = GPUS[name], ACCELERATORS[name]
    features = "ACCELERATED_FEATURES" if gpu.capability == 9 else "NONE"
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {gpu.shared_memory - 1024}
  shared_memory_per_core: {gpu.shared_memory}
  core_count: {gpu.processors} fpus_per_core: {gpu.units} clock_rate_ghz: {gpu.clock} l2_cache_size: {gpu.cache}
  memory_bandwidth: {int(accelerator.memory_rate)} device_memory_size: {int(accelerator.memory)}
  cuda_compute_capability {{ major: {gpu.capability} feature_extension: {features} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 minor: 0 }}
device_description_str: "{gpu.kind}"
"""


def slice_numbers(mesh: Mesh) -> list[int]:
    """The slice, or the machine of GPUs, of each device of a mesh, in its order."""
    return [
        device.process_index if device.platform == "gpu" else getattr(device, "slice_index", 0)
        for device in mesh.devices.flat
    ]
