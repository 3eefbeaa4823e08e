"""The training step: state in, state out, one compiled function for every mesh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Int

from omni.train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from omni.train.task import Batch, Sum, Task

Metrics = dict[str, Sum]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "rest", "optimizer", "ema"],
    meta_fields=[],
)
@dataclass
class TrainState:
    """All that changes in training."""

    step: Int[Array, ""]
    """Steps taken, int32."""
    params: nnx.State
    """What gradients change (`nnx.Param`)."""
    rest: nnx.State
    """What the forward pass changes, e.g. codebook statistics."""
    optimizer: Any
    """Moments."""
    ema: nnx.State | None
    """Running mean of the parameters."""


def make_state(task: Task, config: OptimizerConfig, steps: int, seed: int) -> tuple[nnx.GraphDef, TrainState]:
    """The structure of the net and the state before the first step; pure, so that it can be compiled and sharded."""
    graphdef, params, rest = nnx.split(task.build(nnx.Rngs(seed)), nnx.Param, ...)
    optimizer = make_optimizer(config, steps).init(params)
    ema = params if config.ema_decay else None
    return graphdef, TrainState(jnp.zeros((), jnp.int32), params, rest, optimizer, ema)


def make_train_step(
    graphdef: nnx.GraphDef, task: Task, config: OptimizerConfig, steps: int, seed: int
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The function of one step, to be compiled: (state, batch) -> (state, metrics).

    The random key of a step depends on the seed and its number alone. Metrics are the task's, `loss`, `gradient_norm`
    (before clipping) and `learning_rate`.
    """
    optimizer, schedule = make_optimizer(config, steps), make_schedule(config, steps)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        gradient, rest, metrics = accumulate(graphdef, task, config.accumulation, state, batch, key)
        norm = optax.global_norm(gradient)
        if config.clip_norm:
            shrink = jnp.minimum(1, config.clip_norm / jnp.maximum(norm, 1e-12))
            gradient = jax.tree.map(lambda g: g * shrink, gradient)
        updates, moments = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema and running_mean(state.ema, params, config.ema_decay, state.step)
        metrics |= {"gradient_norm": (norm, jnp.ones(())), "learning_rate": (schedule(state.step), jnp.ones(()))}
        return TrainState(state.step + 1, params, rest, moments, ema), metrics

    return train_step


def accumulate(
    graphdef: nnx.GraphDef, task: Task, microbatches: int, state: TrainState, batch: Batch, key: Array
) -> tuple[nnx.State, nnx.State, Metrics]:
    """(gradient, rest, metrics) of a batch: sums over microbatches, the gradient divided by the summed weights.

    Row r belongs to microbatch r % microbatches, so that every device keeps its own rows.
    """

    def total(params: nnx.State, rest: nnx.State, batch: Batch, key: Array):
        model = nnx.merge(graphdef, params, rest, copy=True)  # variables of this trace, to be changed in it
        total, weight, metrics = task.loss(model, batch, key, training=True)
        rest = nnx.state(model, nnx.Not(nnx.Param))
        return total, (rest, {**metrics, "loss": (total, weight)})

    def microbatch(rest: nnx.State, batch: Batch, key: Array):
        gradient, (rest, metrics) = jax.grad(total, has_aux=True)(state.params, rest, batch, key)
        return rest, (gradient, jax.tree.map(jnp.float32, metrics))

    if microbatches == 1:
        rest, sums = microbatch(state.rest, batch, key)
    else:

        def body(carry, xs):
            rest, sums = carry
            rest, more = microbatch(rest, *xs)
            return (rest, jax.tree.map(jnp.add, sums, more)), None

        split = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)
        keys = jax.random.split(key, microbatches)
        first = jax.tree.map(lambda x: x[0], (split, keys))
        zeros = jax.tree.map(
            lambda shape: jnp.zeros(shape.shape, shape.dtype), jax.eval_shape(microbatch, state.rest, *first)[1]
        )
        (rest, sums), _ = jax.lax.scan(body, (state.rest, zeros), (split, keys))
    gradient, metrics = sums
    weight = metrics["loss"][1]
    scale = jnp.where(weight > 0, 1 / weight, 0)  # a batch without a weighted token moves nothing
    return jax.tree.map(lambda g: g * scale, gradient), rest, metrics


def running_mean(ema: nnx.State, params: nnx.State, decay: float, step: Int[Array, ""]) -> nnx.State:
    """The exponential mean after a step; early on it forgets faster, so that it does not remember the start."""
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda mean, value: mean + (1 - decay) * (value - mean), ema, params)


def make_validation_step(graphdef: nnx.GraphDef, task: Task) -> Callable[[TrainState, Batch], Metrics]:
    """The function that measures a batch with the averaged parameters, where there are some; nothing changes."""

    def validation_step(state: TrainState, batch: Batch) -> Metrics:
        model = nnx.merge(graphdef, state.ema or state.params, state.rest, copy=True)
        total, weight, metrics = task.loss(model, batch, jax.random.key(0), training=False)
        return {**metrics, "loss": (total, weight)}

    return validation_step
