"""What the trainer asks of whatever is trained."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import grain
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from omni.parts import Part
from omni.train.optimizer import OptimizerConfig
from omni_tokenizers.errors import UsageError
from omni_tokenizers.losses.terms import Sum

Batch = dict[str, Array]


LARGEST = "largest/"
"""How the names of metrics begin of which the largest counts, not the mean: (value, 1), or (anything, 0) for none."""
Loss = tuple[Float[Array, ""], Float[Array, ""], dict[str, Sum]]
"""(total, weight, metrics): total / weight is the loss."""


@dataclass(frozen=True)
class Work:
    """What training on an example takes."""

    tokens: int
    """Tokens of an example, padding too."""
    flops_per_token: float
    """Of the model, forward and backward, as they are counted for MFU: six for each parameter in a matrix product
    (the output head, but no table that is looked up), four where adapters are trained in its place, as it has no
    gradient, and those of causal attention, half a square; neither the adapters' own, nor what is computed anew to save
    memory."""


@dataclass(frozen=True)
class Adversary:
    """How a critic, a net that tells what a task's net makes from what it should make, is trained against it."""

    start: int = 0
    """Steps before the critic takes part; until then it neither learns nor teaches."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=3e-4, warmup_steps=0, beta1=0.5, beta2=0.9, weight_decay=0.0
        )
    )
    """The critic's own optimizer, whose schedule begins at `start`; it has no averages and the net's microbatches."""

    def __post_init__(self) -> None:
        if self.start < 0:
            raise UsageError(f"adversary start is {self.start}; it must be at least 0")
        if self.optimizer.ema_decay or self.optimizer.accumulation != 1:
            raise UsageError("the adversary's optimizer has neither ema_decay nor accumulation; set those of the run")


@dataclass(frozen=True)
class Gallery:
    """Held-out examples that a run's page shows, and how."""

    batch: dict[str, np.ndarray]
    """What is given to the net, on the host."""
    originals: list[list[Part]]
    """What it should make of each example, as parts: a picture, or a sound with its picture."""
    make: Callable[[nnx.Module, Batch], Array]
    """What it makes of a batch, to be compiled."""
    exhibits: Callable[[np.ndarray], list[list[Part]]]
    """That, as parts."""


class Task(abc.ABC):
    """A net, its loss and its data. Subclasses are frozen dataclasses, whose fields are the configuration.

    A task with an `adversary` has a critic, too, and the three methods that speak of one.
    """

    adversary: ClassVar[Adversary | None] = None
    """How a critic is trained against the net; None trains the net alone."""

    @abc.abstractmethod
    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The net with fresh parameters (`nnx.Param`, with logical `axes` as metadata where they are to be sharded)."""

    @abc.abstractmethod
    def loss(self, model: nnx.Module, batch: Batch, key: PRNGKeyArray, *, training: bool) -> Loss:
        """(total, weight, metrics) of a batch; total / weight is the loss, and a metric is a (total, weight) too.

        `total` must be a sum over examples. In training the forward pass may change variables that are no parameters.
        """

    def build_critic(self, rngs: nnx.Rngs) -> nnx.Module:
        """The critic with fresh parameters."""
        raise NotImplementedError

    def adversarial_loss(
        self, model: nnx.Module, critic: nnx.Module, batch: Batch, key: PRNGKeyArray
    ) -> tuple[Loss, Any]:
        """The net's loss in training while the critic, constant here, judges it; and what the critic is to learn from.

        The second is a tree of arrays, which `critic_loss` takes as constants.
        """
        raise NotImplementedError

    def critic_loss(self, critic: nnx.Module, shown: Any) -> Loss:
        """The critic's loss on what `adversarial_loss` returned for it; the same sums over examples."""
        raise NotImplementedError

    def trained(self) -> Sequence[str]:
        """Patterns of the names of the parameters that are trained, where the optimizer freezes none of them."""
        return ("*",)

    @abc.abstractmethod
    def dataset(self, seed: int) -> grain.MapDataset:
        """Single examples, endless and in an order that depends on `seed`: dicts of numpy arrays of fixed shapes."""

    def next_dataset(self, seed: int, before: Sequence[tuple[Task, int]]) -> grain.MapDataset:
        """`dataset` of a stage, where stages `before` have taken some examples each: the number at which it goes on."""
        return self.dataset(seed)[sum(taken for _, taken in before) :]

    def validation(self) -> list[dict[str, np.ndarray]] | None:
        """Held-out batches, on which the loss is measured at every checkpoint."""
        return None

    def gallery(self) -> Gallery | None:
        """What the run's page shows at every checkpoint; without it there is no page."""
        return None

    def metadata(self) -> dict[str, dict[str, Any]]:
        """JSON objects by name that every checkpoint carries, and that must not change within a run."""
        return {}

    def work(self) -> Work | None:
        """What an example takes; None where tokens mean nothing."""
        return None

    @abc.abstractmethod
    def save(self, model: nnx.Module, directory: epath.Path) -> None:
        """Writes what the finished net is used from."""
