"""What accelerators can do, as their makers state it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """One device; rates are a second's."""

    kinds: tuple[str, ...]
    """What jax calls it (`device_kind`), or how that begins."""
    flops: float
    """Dense bfloat16 floating-point operations."""
    memory: float
    """Bytes of its own memory."""
    memory_rate: float
    """Bytes to and from that memory."""
    link_rate: float
    """Bytes that it sends over all links to its neighbours together (ICI, NVLink)."""
    network_rate: float
    """Bytes that it sends over the network between slices or machines: its share of its host's."""


GIB = 2.0**30
ACCELERATORS = {
    # cloud.google.com/tpu/docs/v4, v5e, v5p, v6e; a host's network is 100 to 400 Gbit/s, shared by its 4 or 8 chips
    "v4": Accelerator(("TPU v4",), 275e12, 32 * GIB, 1228e9, 300e9, 6.25e9),
    "v5e": Accelerator(("TPU v5 lite", "TPU v5e"), 197e12, 16 * GIB, 819e9, 200e9, 3.1e9),
    "v5p": Accelerator(("TPU v5", "TPU v5p"), 459e12, 95 * GIB, 2765e9, 600e9, 6.25e9),
    "v6e": Accelerator(("TPU v6 lite", "TPU v6e"), 918e12, 32 * GIB, 1640e9, 448e9, 6.25e9),
    # nvidia.com data sheets, SXM where nothing else is said; NVLink one way; 400 Gbit/s of network a GPU
    "a100": Accelerator(("NVIDIA A100",), 312e12, 80e9, 2039e9, 300e9, 25e9),
    "h100": Accelerator(("NVIDIA H100",), 989e12, 80e9, 3350e9, 450e9, 50e9),
    "h100-pcie": Accelerator(("NVIDIA H100 PCIe",), 756e12, 80e9, 2000e9, 64e9, 25e9),
    "h200": Accelerator(("NVIDIA H200",), 989e12, 141e9, 4800e9, 450e9, 50e9),
}
"""Accelerators by the name that a topology begins with, as in v5p:4x4x4."""


def accelerator_of(device_kind: str) -> Accelerator | None:
    """The accelerator that jax calls so; None if it is not listed, as a CPU."""
    fitting = [
        (len(kind), each) for each in ACCELERATORS.values() for kind in each.kinds if device_kind.startswith(kind)
    ]
    return max(fitting, key=lambda found: found[0])[1] if fitting else None
