"""What the trainer asks of whatever is trained."""

from __future__ import annotations

import abc
from typing import Any

import grain
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

Batch = dict[str, Array]
Sum = tuple[Float[Array, ""], Float[Array, ""]]
"""A total and the weight to divide it by, so that sums over microbatches and devices stay exact."""


class Task(abc.ABC):
    """A net, its loss and its data. Subclasses are frozen dataclasses, whose fields are the configuration."""

    @abc.abstractmethod
    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The net with fresh parameters (`nnx.Param`, with logical `axes` as metadata where they are to be sharded)."""

    @abc.abstractmethod
    def loss(
        self, model: nnx.Module, batch: Batch, key: PRNGKeyArray, *, training: bool
    ) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, Sum]]:
        """(total, weight, metrics) of a batch; total / weight is the loss, and a metric is a (total, weight) too.

        `total` must be a sum over examples. In training the forward pass may change variables that are no parameters.
        """

    @abc.abstractmethod
    def dataset(self, seed: int) -> grain.MapDataset:
        """Single examples, endless and in an order that depends on `seed`: dicts of numpy arrays of fixed shapes."""

    def validation(self) -> list[dict[str, np.ndarray]] | None:
        """Held-out batches, on which the loss is measured at every checkpoint."""
        return None

    def metadata(self) -> dict[str, dict[str, Any]]:
        """JSON objects by name that every checkpoint carries, and that must not change within a run."""
        return {}

    @abc.abstractmethod
    def save(self, model: nnx.Module, directory: epath.Path) -> None:
        """Writes what the finished net is used from."""
