"""Batches on the devices of all processes, and trees of arrays back on every host."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from omni.sharding import mesh_axes, replicated
from omni.train.task import Batch


def local_rows(rows: NamedSharding, batch_size: int) -> list[int]:
    """The rows of a batch that lie on this process's devices, in order."""
    indices = rows.addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for (index,) in indices for row in range(batch_size)[index]})


def place(batch: dict[str, np.ndarray], rows: NamedSharding, batch_size: int) -> Batch:
    """A global batch on the devices, from the rows that this process loaded."""
    return {
        name: jax.make_array_from_process_local_data(rows, array, (batch_size, *array.shape[1:]))
        for name, array in batch.items()
    }


def place_whole(batch: dict[str, np.ndarray], rows: NamedSharding) -> Batch:
    """A batch that every process holds whole, on the devices; copied to each if it does not split evenly."""
    size = len(next(iter(batch.values())))
    sharding = replicated(rows.mesh) if size % shard_count(rows) else rows
    return {name: jax.make_array_from_callback(x.shape, sharding, x.__getitem__) for name, x in batch.items()}


def shard_count(rows: NamedSharding) -> int:
    """Into how many pieces a batch is split."""
    return math.prod(rows.mesh.shape[axis] for axis in mesh_axes(rows.spec[0]))


def on_host(tree: Any) -> Any:
    """A tree of arrays that may lie on many processes, whole on each as numpy."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.device_get(tree)


def anywhere(flag: bool) -> bool:
    """Whether the flag is set in any process; all of them must ask."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())
