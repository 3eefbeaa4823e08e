"""The mesh, and the rules that place logical axes of arrays on its axes."""

import difflib
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from omni_tokenizers.errors import UsageError

log = logging.getLogger(__name__)

ACTIVE: ContextVar[tuple["Mesh", "ShardingRules"] | None] = ContextVar("mesh and rules of activations", default=None)

MeshAxes = str | tuple[str, ...] | None


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one axis may be -1: all devices that the others leave."""

    slice: int = 1
    """Groups of devices joined by the slow network; replicates parameters."""
    data: int = -1
    """Splits the batch, replicates parameters."""
    fsdp: int = 1
    """Splits the batch and the parameters (fully sharded data parallelism)."""
    context: int = 1
    """Splits sequences along their length."""
    expert: int = 1
    """Splits experts, and the batch everywhere else."""
    tensor: int = 1
    """Splits heads, hidden widths and the vocabulary (tensor parallelism)."""


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with every axis of `config` over all devices (or those given); what leaves a slice of TPUs goes along the
    axis `slice` alone.

    Raises UsageError where the sizes do not multiply to the number of devices, or `slice` is no multiple of the slices
    that there are.
    """
    devices = jax.devices() if devices is None else devices
    sizes = asdict(config)
    wanted = ", ".join(f"{name} {size}" for name, size in sizes.items() if size != 1) or "1 device"
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 for name, size in sizes.items() if name not in free):
        raise UsageError(f"mesh ({wanted}): sizes must be at least 1, and at most one of them -1 (the rest)")
    rest, remainder = divmod(len(devices), math.prod(size for size in sizes.values() if size != -1))
    sizes |= dict.fromkeys(free, rest)
    if remainder or math.prod(sizes.values()) != len(devices):
        raise UsageError(
            f"mesh ({wanted}) does not fit {len(devices)} devices: choose sizes whose product is that number"
        )
    shape, count = tuple(sizes.values()), len({getattr(device, "slice_index", 0) for device in devices})
    if sizes["slice"] % count:
        raise UsageError(f"mesh.slice is {sizes['slice']}, but the devices are in {count} slices; set it to {count}")
    try:
        placed = _placed(shape, devices, count, split=False)
    except NotImplementedError:  # no axes of the torus have these products: an axis of the mesh takes parts of them
        placed = _placed(shape, devices, count, split=True)
    return Mesh(placed, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _placed(shape: tuple[int, ...], devices: list[jax.Device], slices: int, *, split: bool) -> np.ndarray:
    """The devices in a mesh's shape, neighbours in it being neighbours in their slice, as far as that goes."""
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=split)
    within, between = (shape[0] // slices, *shape[1:]), (slices, *(1 for _ in shape[1:]))
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=split)


@dataclass(frozen=True)
class ShardingRules:
    """For each logical axis, the mesh axis or axes that split it; None: not split."""

    batch: MeshAxes = ("slice", "data", "fsdp", "expert")
    """Rows of a batch."""
    length: MeshAxes = "context"
    """Tokens of a row."""
    stream: MeshAxes = ("context", "tensor")
    """Tokens of a row in the residual stream between the matrix products of blocks: its norms and sums are not repeated
    on each device of `tensor`, nor is what is kept of it (sequence parallelism, arXiv:2205.05198)."""
    layers: MeshAxes = None
    """Stacked blocks."""
    vocabulary: MeshAxes = "tensor"
    """Ids: rows of the embedding, logits."""
    embed: MeshAxes = "fsdp"
    """Residual stream's width in parameters."""
    heads: MeshAxes = "tensor"
    """Query heads."""
    key_value_heads: MeshAxes = "tensor"
    """Key and value heads."""
    head_dim: MeshAxes = None
    """Width of a head."""
    mlp: MeshAxes = "tensor"
    """Hidden width of feed-forward layers."""
    experts: MeshAxes = "expert"
    """Experts of a mixture."""
    rank: MeshAxes = None
    """Narrow side of an adapter."""

    def spec(self, axes: tuple[str | None, ...]) -> PartitionSpec:
        """Where an array with these logical axes lies (None: an axis that is never split).

        Raises UsageError for an unknown logical axis, and where two dimensions would use one mesh axis.
        """
        names = [field.name for field in fields(self)]
        for axis in axes:
            if axis is not None and axis not in names:
                nearest = difflib.get_close_matches(axis, names, 1, 0) or names
                raise UsageError(f"no sharding rule for logical axis {axis!r}; the nearest is {nearest[0]!r}")
        spec = [None if axis is None else getattr(self, axis) for axis in axes]
        used = [name for entry in spec for name in mesh_axes(entry)]
        for name in used:
            if used.count(name) > 1:
                raise UsageError(
                    f"sharding rules put mesh axis {name!r} on two dimensions of an array with axes {axes}"
                )
        return PartitionSpec(*spec)


def spread(mesh: Mesh, entry: MeshAxes) -> int:
    """Over how many devices a dimension with this entry in its spec is split."""
    return math.prod(mesh.shape[name] for name in mesh_axes(entry))


def mesh_axes(entry: MeshAxes) -> tuple[str, ...]:
    """A rule's mesh axes as a tuple."""
    return (entry,) if isinstance(entry, str) else entry or ()


def named_sharding(
    axes: tuple[str | None, ...], rules: ShardingRules, mesh: Mesh, shape: tuple[int, ...] | None = None
) -> NamedSharding:
    """The sharding of an array with these logical axes.

    Given its shape, a dimension that its mesh axes do not divide is split over the first of them that do; the log says
    so once, but of a single element.
    """
    spec = rules.spec(axes)
    if shape is not None:
        spec = [_dividing(mesh, *each) for each in zip(axes, spec, shape, strict=True)]
    return NamedSharding(mesh, PartitionSpec(*spec))


def _dividing(mesh: Mesh, axis: str | None, entry: MeshAxes, size: int) -> MeshAxes:
    """As many of an entry's leading mesh axes as divide a dimension's size."""
    if size % (count := spread(mesh, entry)) == 0:
        return entry
    names = mesh_axes(entry)
    while size % spread(mesh, names):
        names = names[:-1]
    if size > 1:
        left = f"it is split over {spread(mesh, names)}" if spread(mesh, names) > 1 else "it is replicated"
        warn_once(f"axis {axis} of size {size} is not divisible by its {count} mesh devices: {left}")
    return names or None


@cache
def warn_once(message: str) -> None:
    """Log a warning the first time it occurs."""
    log.warning(message)


def batch_sharding(rules: ShardingRules, mesh: Mesh) -> NamedSharding:
    """The sharding of arrays [batch, ...] fed to a step: rows split, the rest whole."""
    return named_sharding(("batch",), rules, mesh)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


@contextmanager
def activations_on(mesh: Mesh, rules: ShardingRules) -> Iterator[None]:
    """Where a function is traced inside this (within jit), `constrain` places its activations by these rules."""
    token = ACTIVE.set((mesh, rules))
    try:
        yield
    finally:
        ACTIVE.reset(token)


def active_mesh() -> tuple[Mesh, ShardingRules] | None:
    """Mesh and rules inside `activations_on`; elsewhere None."""
    return ACTIVE.get()


def constrain(x: Array, *axes: str | None) -> Array:
    """An activation laid out by its logical axes, inside `activations_on`; elsewhere `x` itself.

    Without this, the compiler may split activations as parameters are split, along the width, and give every device the
    whole batch.
    """
    active = active_mesh()
    if active is None:
        return x
    mesh, rules = active
    return jax.lax.with_sharding_constraint(x, named_sharding(axes, rules, mesh, x.shape))


def placed(value: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """The array on its devices, each of which is given its part alone; of several processes, each gives its own devices
    theirs, and none asks the others whether they hold the same."""
    return jax.make_array_from_callback(value.shape, sharding, value.__getitem__)


def sharding_tree(abstract_state: Any, rules: ShardingRules, mesh: Mesh) -> Any:
    """The same tree with a NamedSharding for every leaf, as jit's in_shardings and out_shardings or device_put take it.

    nnx variables with metadata `axes` follow the rules; all else is replicated. An optax state over an nnx.State
    needs no more: its moments are mapped from the parameters, so they are variables with the same metadata.
    """

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return replicated(mesh)
        if not jax.tree.leaves(leaf):  # an optimiser that leaves this parameter to another one
            return leaf
        value, axes = leaf.get_value(), leaf.get_metadata().get("axes", ())
        if len(axes) != len(value.shape):  # no axes, or an optimiser's reduced statistics
            return leaf.replace(replicated(mesh))
        return leaf.replace(named_sharding(axes, rules, mesh, value.shape))

    return jax.tree.map(place, abstract_state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
