"""What a run compiles: the state's shapes and places on a mesh, and the functions of its steps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx

from omni.compiler_options import compiler_options
from omni.machines import applied, mesh_of, recipe_for
from omni.model.config import TransformerConfig
from omni.sharding import ShardingRules, batch_sharding, make_mesh, replicated, sharding_tree
from omni.train.placement import shard_count
from omni.train.step import (
    TrainState,
    initial_moments,
    make_gallery_step,
    make_state,
    make_train_step,
    make_validation_step,
)
from omni.train.task import Gallery
from omni_tokenizers.errors import UsageError

if TYPE_CHECKING:
    from omni.train.loop import TrainConfig


class Program:
    """The jitted functions of a training run.

    Args:
      devices: all by default; they need not be there to compile for.
      schedule: steps over which the schedule of the learning rate runs; by default all of the run's.

    Attributes:
      config: the run's; with a recipe, as that lays it out on these devices.
      mesh, rules: how devices are laid out, and what lies where on them.
      rows: the sharding of a batch.
      graphdef: the structure of the net.
      shapes: the state before the first step, as shapes with shardings.

    Raises:
      UsageError: mesh, batch size, microbatches and length of a row do not fit.
    """

    def __init__(self, config: TrainConfig, devices: Sequence[jax.Device] | None = None, schedule: range | None = None):
        config = by_recipe(config, devices) if config.recipe else config
        self.config, self._schedule = config, range(config.steps) if schedule is None else schedule
        self.rules, self.mesh = ShardingRules(), make_mesh(config.mesh, devices)
        self.rows = batch_sharding(self.rules, self.mesh)
        check_batch_size(config, shard_count(self.rows))
        check_row_length(config)
        self.graphdef, abstract = jax.eval_shape(self._initial)
        self._shardings = sharding_tree(abstract, self.rules, self.mesh)
        self.shapes = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, self._shardings
        )

    def start(self) -> TrainState:
        """The state before the first step, on the mesh."""
        return jax.jit(lambda: self._initial()[1], out_shardings=self._shardings)()

    @functools.cache  # noqa: B019, a run has one program
    def train_step(self, adversarial: bool = False) -> Callable:
        """The step: (state, batch) -> (state, metrics); the state is given away. See `omni.train.step`."""
        config = self.config
        settings = (config.task, config.optimizer, len(self._schedule), config.seed)
        choices = {"adversarial": adversarial, "spike": config.skip.spike, "begin": self._schedule.start}
        usual = () if config.skip.spike is None else (replicated(self.mesh),)
        return jax.jit(
            make_train_step(self.graphdef, *settings, **choices),
            in_shardings=(self._shardings, self.rows, *usual),
            out_shardings=(self._shardings, replicated(self.mesh)),
            donate_argnums=0,
            compiler_options=compiler_options(self.mesh.devices.flat[0].device_kind),
        )

    def step_shapes(self) -> tuple[Any, ...]:
        """What `train_step` is called with, as shapes with shardings: (state, batch), and the usual loss if it is."""
        config = self.config
        batch = {
            key: jax.ShapeDtypeStruct((config.batch_size, *np.shape(x)), np.asarray(x).dtype, sharding=self.rows)
            for key, x in config.task.dataset(config.seed)[0].items()
        }
        usual = () if config.skip.spike is None else (jax.ShapeDtypeStruct((), np.float32),)
        return self.shapes, batch, *usual

    def take_over(self, state: TrainState, before: Program) -> TrainState:
        """The state at the end of another stage, which is given away, as this stage goes on with it.

        Moments of parameters that moved there and move here are kept; those that were frozen begin with none.
        """
        if jax.tree.structure(before.shapes.optimizer) == jax.tree.structure(self.shapes.optimizer):
            return state

        def changed(state: TrainState) -> TrainState:
            config, steps = self.config, len(self._schedule)
            trained, begin = config.task.trained(), self._schedule.start
            fresh = initial_moments(config.optimizer, steps, state.params, trained, begin)
            old = dict(jax.tree.leaves_with_path(state.optimizer))
            moments = jax.tree.map_with_path(lambda path, leaf: old.get(path, leaf), fresh)
            return dataclasses.replace(state, optimizer=moments)

        return jax.jit(changed, out_shardings=self._shardings, donate_argnums=0)(state)

    @functools.cached_property
    def validation_step(self) -> Callable:
        """(state, batch) -> metrics of a held-out batch."""
        return jax.jit(make_validation_step(self.graphdef, self.config.task), out_shardings=replicated(self.mesh))

    def gallery_step(self, gallery: Gallery) -> Callable:
        """(state, batch) -> what the run's page shows."""
        return jax.jit(make_gallery_step(self.graphdef, gallery), out_shardings=replicated(self.mesh))

    def _initial(self) -> tuple[nnx.GraphDef, TrainState]:
        config = self.config
        return make_state(config.task, config.optimizer, config.steps, config.seed)


def by_recipe(config: TrainConfig, devices: Sequence[jax.Device] | None = None) -> TrainConfig:
    """The run as `omni.machines` lays it out on these devices (all by default).

    Raises:
      UsageError: there is no recipe for them, or nothing to compute by it.
    """
    model = getattr(config.task, "model", None)
    if not isinstance(model, TransformerConfig):
        raise UsageError("recipe is for transformers; set mesh yourself")
    devices = jax.devices() if devices is None else devices
    recipe = recipe_for(devices[0].device_kind, model)
    mesh = mesh_of(recipe, len(devices), len({getattr(device, "slice_index", 0) for device in devices}))
    task = dataclasses.replace(config.task, model=applied(recipe, model))
    return dataclasses.replace(config, task=task, mesh=mesh, recipe=False)


def check_row_length(config: TrainConfig) -> None:
    """Raises `UsageError` unless rows of tokens split evenly over the mesh axis `context`."""
    work = config.task.work() if config.mesh.context > 1 else None
    if work is not None and work.tokens % config.mesh.context:
        raise UsageError(
            f"rows of {work.tokens} tokens do not split over mesh.context {config.mesh.context}; use a row_length that "
            f"is a multiple of {config.mesh.context}"
        )


def check_batch_size(config: TrainConfig, shards: int) -> None:
    """Raises `UsageError` unless every microbatch splits evenly over the devices that share a batch."""
    if config.batch_size % (shards * config.optimizer.accumulation):
        raise UsageError(
            f"batch_size {config.batch_size} does not split into {config.optimizer.accumulation} microbatches "
            f"over {shards} devices; use a multiple of {shards * config.optimizer.accumulation}"
        )
