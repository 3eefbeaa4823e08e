"""What XLA is told when it compiles a training step, for each accelerator, and why.

`omni train` and `omni compile` take their options from here and from nowhere else; `LIBTPU_INIT_ARGS` and `XLA_FLAGS`
are left to whoever runs them.
"""

from __future__ import annotations

from dataclasses import dataclass

from omni.accelerators import ACCELERATORS, accelerator_of

_TPUS = ("v4", "v5e", "v5p", "v6e")


@dataclass(frozen=True)
class CompilerOption:
    """One option of the compiler."""

    name: str
    value: str
    accelerators: tuple[str, ...]
    """Those that it is for, by their names in `ACCELERATORS`."""
    reason: str


COMPILER_OPTIONS = (
    CompilerOption("xla_enable_async_all_gather", "true", _TPUS, "weights of the next layer are gathered meanwhile"),
    CompilerOption("xla_enable_async_collective_permute", "true", _TPUS, "pieces of a ring travel meanwhile"),
    CompilerOption(
        "xla_tpu_overlap_compute_collective_tc", "true", _TPUS, "the matrix unit's core serves collectives beside it"
    ),
    CompilerOption(
        "xla_tpu_enable_async_collective_fusion", "true", _TPUS, "products run in the steps of what is gathered"
    ),
    CompilerOption(
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather", "true", _TPUS, "of all-gathers too, fsdp's traffic"
    ),
    CompilerOption(
        "xla_tpu_enable_async_collective_fusion_multiple_steps",
        "true",
        _TPUS,
        "and over several products, if one is short",
    ),
    CompilerOption(
        "xla_jf_spmd_threshold_for_windowed_einsum_mib",
        "1000000",
        _TPUS,
        "a product with a gathered weight is one product: piece by piece, its sum would pass memory once a piece, "
        "rounded to bfloat16 (1B on 16 chips of a v5p: 1,198 GB touched a step instead of 322)",
    ),
    CompilerOption(
        "xla_tpu_prefer_async_allgather_to_allreduce",
        "true",
        ("v4", "v5p"),
        "on a torus of three dimensions weights are else gathered by summing zero-padded shards: twice the bytes",
    ),
    CompilerOption("xla_enable_all_gather_3d_emitter", "true", ("v4", "v5p"), "so that they use its six links"),
    CompilerOption(
        "xla_tpu_enable_net_router_in_all_gather",
        "false",
        ("v4", "v5p"),
        "part of that recipe: the two above alone change nothing",
    ),
    CompilerOption(
        "xla_tpu_enable_data_parallel_all_reduce_opt",
        "true",
        _TPUS,
        "gradients between slices beside the backward pass",
    ),
    CompilerOption("xla_tpu_data_parallel_opt_different_sized_ops", "true", _TPUS, "whatever their sizes"),
    CompilerOption("xla_tpu_scoped_vmem_limit_kib", "98304", ("v6e",), "its 128 MiB hold larger blocks of a product"),
)
"""Sources: MaxText's recipes for v5e, v5p and Trillium; for three dimensions, Google's recipe of Mixtral on a v5p."""


def compiler_options(device_kind: str) -> dict[str, str]:
    """The options for devices that jax calls so (`device_kind`); none for devices that are not listed, as CPUs."""
    device = accelerator_of(device_kind)
    return {
        each.name: each.value for each in COMPILER_OPTIONS for name in each.accelerators if ACCELERATORS[name] is device
    }
