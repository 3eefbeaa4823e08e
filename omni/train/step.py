"""The training step: state in, state out, one compiled function for every mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from omni.train.optimizer import OptimizerConfig, check_patterns, make_optimizer, make_schedule, partition
from omni.train.task import LARGEST, Batch, Gallery, Task
from omni_tokenizers.errors import UsageError
from omni_tokenizers.losses.terms import Sum

Metrics = dict[str, Sum]
USUAL_LOSS_DECAY = 0.98
"""Of the running mean of the loss beside which a spike is seen."""


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

    def __repr__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return f"{type(self).__name__}(step {self.step}, {count / 1e6:.1f} million parameters)"


@partial(jax.tree_util.register_dataclass, data_fields=["params", "rest", "optimizer"], meta_fields=[])
@dataclass
class CriticState:
    """All that changes in a critic, as in `TrainState`."""

    params: nnx.State
    rest: nnx.State
    optimizer: Any


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "rest", "optimizer", "ema", "critic"],
    meta_fields=[],
)
@dataclass(repr=False)
class AdversarialState(TrainState):
    """The state of a task with an adversary; others keep the tree that their checkpoints have always had."""

    critic: CriticState


def make_state(task: Task, config: OptimizerConfig, steps: int, seed: int) -> tuple[nnx.GraphDef, TrainState]:
    """The structure of the net and the state before the first step; pure, so that it can be compiled and sharded.

    Raises:
      UsageError: a pattern of the task or the optimizer names no parameter.
    """
    graphdef, params, rest = nnx.split(task.build(nnx.Rngs(seed)), nnx.Param, ...)
    check_patterns(params, task.trained(), "trained")
    optimizer = initial_moments(config, steps, params, task.trained())
    ema = params if config.ema_decay else None
    state = (jnp.zeros((), jnp.int32), params, rest, optimizer, ema)
    if task.adversary is None:
        return graphdef, TrainState(*state)
    return graphdef, AdversarialState(*state, make_critic(task, steps, seed)[1])


def make_critic(task: Task, steps: int, seed: int) -> tuple[nnx.GraphDef, CriticState]:
    """The structure of the task's critic and its state before its first step."""
    key = jax.random.fold_in(jax.random.key(seed), 0xFFFFFFFF)  # a number that no step has
    graphdef, params, rest = nnx.split(task.build_critic(nnx.Rngs(key)), nnx.Param, ...)
    return graphdef, CriticState(params, rest, initial_moments(task.adversary.optimizer, steps, params))


def initial_moments(
    config: OptimizerConfig, steps: int, params: nnx.State, trained: Sequence[str] = ("*",), begin: int = 0
) -> Any:
    """The optimizer's state before its first step, of the parameters that move; `UsageError` if there are none, and for
    a pattern that names none."""
    for setting in ("frozen", "no_decay"):
        check_patterns(params, getattr(config, setting), f"optimizer {setting}")
    moving, _ = partition(params, trained, config.frozen)
    if not moving:
        raise UsageError("optimizer frozen: no parameter is left to train")
    return make_optimizer(config, steps, begin).init(moving)


def make_train_step(
    graphdef: nnx.GraphDef,
    task: Task,
    config: OptimizerConfig,
    steps: int,
    seed: int,
    *,
    adversarial: bool = False,
    spike: float | None = None,
    begin: int = 0,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The function of one step, to be compiled: (state, batch) -> (state, metrics).

    The random key of a step depends on the seed and its number alone. Metrics are the task's, `loss`, `gradient_norm`
    (before clipping), `learning_rate` and `update_to_weight` (the norm of the parameters' move over theirs, of those
    that are not frozen); of a critic the same, as `critic/loss` and so on.

    A step whose loss or gradient is not finite is skipped: `skipped` is 1, and of the state only the number changes.
    The optimizer does not count it, so its schedule comes later by as many steps.

    Args:
      adversarial: whether the critic takes part; net and critic then move at once, from one forward pass of the net
        that both judge as it was. Otherwise the critic stays as it is.
      spike: skips, too, steps whose loss is above this multiple of the running mean of the loss. The function then
        takes that mean as a third argument, NaN where there is none yet, and `usual_loss` is the mean after the step.
      begin: where the schedule of `steps` steps begins.
    """
    if adversarial:
        critic_graphdef = jax.eval_shape(lambda: make_critic(task, steps, seed))[0]
        critic_steps = steps - task.adversary.start

    def train_step(
        state: TrainState, batch: Batch, usual: Float[Array, ""] | None = None
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        changed = {"step": state.step + 1}
        if adversarial:
            gradient, changed["rest"], critic_gradient, critic_rest, metrics = accumulate_both(
                graphdef, critic_graphdef, task, config.accumulation, state, batch, key, config.frozen
            )
            own, critic, step = task.adversary.optimizer, state.critic, state.step - task.adversary.start
            params, moments, more = descend(own, critic_steps, step, critic_gradient, critic.optimizer, critic.params)
            changed["critic"] = CriticState(params, critic_rest, moments)
            metrics |= {f"critic/{name}": value for name, value in more.items()}
        else:
            gradient, changed["rest"], metrics = accumulate(
                graphdef, task, config.accumulation, state, batch, key, config.frozen
            )
        params, moments, more = descend(config, steps, state.step, gradient, state.optimizer, state.params, begin=begin)
        changed |= {"params": params, "optimizer": moments}
        changed["ema"] = state.ema and running_mean(state.ema, params, config.ema_decay, state.step)
        metrics |= more
        taken = is_finite(metrics)
        if spike is not None:
            total, weight = metrics["loss"]
            loss = jnp.where(weight > 0, total / weight, usual)
            taken &= ~((usual > 0) & (loss > spike * usual))
            mean = jnp.where(jnp.isnan(usual), loss, usual + (1 - USUAL_LOSS_DECAY) * (loss - usual))
            metrics["usual_loss"] = (jnp.where(taken, mean, usual), jnp.ones(()))
        metrics["skipped"] = (1 - taken.astype(jnp.float32), jnp.ones(()))
        after = dataclasses.replace(state, **changed)
        return dataclasses.replace(either(taken, after, state), step=after.step), metrics

    return train_step


def is_finite(metrics: Metrics) -> Bool[Array, ""]:
    """Whether losses and gradients, of the critic too where it takes part, are numbers."""
    names = ("loss", "gradient_norm", "critic/loss", "critic/gradient_norm")
    return jnp.isfinite(jnp.stack([metrics[name][0] for name in names if name in metrics])).all()


def either(first: Bool[Array, ""], one: TrainState, other: TrainState) -> TrainState:
    """One of two states.

    Accelerators choose number by number, within what computes them and in place. On a CPU the choice would change how
    the numbers themselves are rounded, since it comes between products and sums that are else one operation; there the
    states are chosen whole, so that runs keep the bits that they had before steps could be skipped.
    """

    def whole(one: TrainState, other: TrainState) -> TrainState:
        return jax.lax.cond(first, lambda one, _: one, lambda _, other: other, one, other)

    def by_number(one: TrainState, other: TrainState) -> TrainState:
        return jax.tree.map(lambda new, old: jnp.where(first, new, old), one, other)

    return jax.lax.platform_dependent(one, other, cpu=whole, default=by_number)


def descend(
    config: OptimizerConfig,
    steps: int,
    step: Int[Array, ""],
    gradient: nnx.State,
    moments: Any,
    params: nnx.State,
    *,
    begin: int = 0,
) -> tuple[nnx.State, Any, Metrics]:
    """(parameters, moments, metrics) after one step of the optimizer; see `make_schedule` of `steps` and `begin`.

    Parameters without a gradient are frozen.
    """
    moved = {path for path, _ in nnx.to_flat_state(gradient)}
    moving, frozen = nnx.split_state(params, lambda path, _: path in moved, ...)
    norm = optax.global_norm(gradient)
    if config.clip_norm:
        shrink = jnp.minimum(1, config.clip_norm / jnp.maximum(norm, 1e-12))
        gradient = jax.tree.map(lambda g: g * shrink, gradient)
    updates, moments = make_optimizer(config, steps, begin).update(gradient, moments, moving)
    metrics = {"gradient_norm": norm, "learning_rate": make_schedule(config, steps, begin)(step)}
    metrics["update_to_weight"] = optax.global_norm(updates) / jnp.maximum(optax.global_norm(moving), 1e-12)
    params = nnx.merge_state(optax.apply_updates(moving, updates), frozen)
    return params, moments, {name: (x, jnp.ones(())) for name, x in metrics.items()}


def accumulate(
    graphdef: nnx.GraphDef,
    task: Task,
    microbatches: int,
    state: TrainState,
    batch: Batch,
    key: Array,
    frozen: Sequence[str] = (),
) -> tuple[nnx.State, nnx.State, Metrics]:
    """(gradient, rest, metrics) of a batch: sums over microbatches, the gradient divided by the summed weights.

    The gradient is that of the parameters that move; see `partition`.
    """
    moving, still = partition(state.params, task.trained(), frozen)

    def total(moving: nnx.State, rest: nnx.State, batch: Batch, key: Array):
        model = nnx.merge(graphdef, moving, still, rest, copy=True)  # variables of this trace, to be changed in it
        total, weight, metrics = task.loss(model, batch, key, training=True)
        rest = nnx.state(model, nnx.Not(nnx.Param))
        return total, (rest, {**metrics, "loss": (total, weight)})

    def microbatch(rest: nnx.State, batch: Batch, key: Array):
        gradient, (rest, metrics) = jax.grad(total, has_aux=True)(moving, rest, batch, key)
        return rest, (gradient, jax.tree.map(jnp.float32, metrics))

    rest, (gradient, metrics) = over_microbatches(microbatch, microbatches, state.rest, batch, key)
    return divided(gradient, metrics["loss"][1]), rest, metrics


def accumulate_both(
    graphdef: nnx.GraphDef,
    critic_graphdef: nnx.GraphDef,
    task: Task,
    microbatches: int,
    state: TrainState,
    batch: Batch,
    key: Array,
    frozen: Sequence[str] = (),
) -> tuple[nnx.State, nnx.State, nnx.State, nnx.State, Metrics]:
    """As `accumulate` for a net and its critic: (gradient, rest, critic's gradient, critic's rest, metrics)."""
    moving, still = partition(state.params, task.trained(), frozen)
    critic_moving, critic_still = partition(state.critic.params, ("*",), task.adversary.optimizer.frozen)

    def total(moving: nnx.State, rest: nnx.State, critic_rest: nnx.State, batch: Batch, key: Array):
        model = nnx.merge(graphdef, moving, still, rest, copy=True)
        critic = nnx.merge(critic_graphdef, state.critic.params, critic_rest, copy=True)
        (total, weight, metrics), shown = task.adversarial_loss(model, critic, batch, key)
        rest = nnx.state(model, nnx.Not(nnx.Param))
        return total, (rest, {**metrics, "loss": (total, weight)}, shown)

    def critic_total(moving: nnx.State, rest: nnx.State, shown: Any):
        critic = nnx.merge(critic_graphdef, moving, critic_still, rest, copy=True)
        total, weight, metrics = task.critic_loss(critic, shown)
        return total, (nnx.state(critic, nnx.Not(nnx.Param)), {**metrics, "critic/loss": (total, weight)})

    def microbatch(rests: tuple[nnx.State, nnx.State], batch: Batch, key: Array):
        rest, critic_rest = rests
        gradient, (rest, metrics, shown) = jax.grad(total, has_aux=True)(moving, rest, critic_rest, batch, key)
        learn = jax.grad(critic_total, has_aux=True)
        critic_gradient, (critic_rest, more) = learn(critic_moving, critic_rest, shown)
        return (rest, critic_rest), (gradient, critic_gradient, jax.tree.map(jnp.float32, metrics | more))

    start = (state.rest, state.critic.rest)
    (rest, critic_rest), sums = over_microbatches(microbatch, microbatches, start, batch, key)
    gradient, critic_gradient, metrics = sums
    gradient = divided(gradient, metrics["loss"][1])
    critic_gradient = divided(critic_gradient, metrics["critic/loss"][1])
    return gradient, rest, critic_gradient, critic_rest, metrics


def over_microbatches(microbatch: Callable, number: int, carry: Any, batch: Batch, key: Array) -> tuple[Any, Any]:
    """The last carry of, and the sum of all that is returned by `microbatch(carry, rows, key) -> (carry, sums)`; see
    `joined`.

    Row r belongs to microbatch r % number, so that every device keeps its own rows.
    """
    if number == 1:
        return microbatch(carry, batch, key)

    def body(state, xs):
        carry, sums = state
        carry, more = microbatch(carry, *xs)
        return (carry, jax.tree.map_with_path(joined, sums, more)), None

    split = jax.tree.map(lambda x: x.reshape(-1, number, *x.shape[1:]).swapaxes(0, 1), batch)
    keys = jax.random.split(key, number)
    first = jax.tree.map(lambda x: x[0], (split, keys))
    none = jax.tree.map_with_path(
        lambda path, shape: jnp.full(shape.shape, -jnp.inf if is_largest(path) else 0, shape.dtype),
        jax.eval_shape(microbatch, carry, *first)[1],
    )
    return jax.lax.scan(body, (carry, none), (split, keys))[0]


def joined(path: tuple, one: Array, other: Array) -> Array:
    """What two microbatches have together: the sum, or the larger number."""
    return jnp.maximum(one, other) if is_largest(path) else one + other


def is_largest(path: tuple) -> bool:
    """Whether a leaf belongs to a metric of which the largest counts."""
    return any(str(getattr(key, "key", "")).startswith(LARGEST) for key in path)


def divided(gradient: nnx.State, weight: Float[Array, ""]) -> nnx.State:
    """The gradient of the mean; a batch in which nothing has weight moves nothing."""
    scale = jnp.where(weight > 0, 1 / weight, 0)
    return jax.tree.map(lambda g: g * scale, gradient)


def running_mean(ema: nnx.State, params: nnx.State, decay: float, step: Int[Array, ""]) -> nnx.State:
    """The exponential mean after a step; early on it forgets faster, so that it does not remember the start."""
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda mean, value: mean + (1 - decay) * (value - mean), ema, params)


def make_validation_step(graphdef: nnx.GraphDef, task: Task) -> Callable[[TrainState, Batch], Metrics]:
    """The function that measures a batch with the averaged parameters, where there are some; nothing changes."""

    def validation_step(state: TrainState, batch: Batch) -> Metrics:
        model = averaged(graphdef, state)
        total, weight, metrics = task.loss(model, batch, jax.random.key(0), training=False)
        return {**metrics, "loss": (total, weight)}

    return validation_step


def make_gallery_step(graphdef: nnx.GraphDef, gallery: Gallery) -> Callable[[TrainState, Batch], Array]:
    """The function that makes what the run's page shows, with the averaged parameters too; nothing changes."""
    return lambda state, batch: gallery.make(averaged(graphdef, state), batch)


def averaged(graphdef: nnx.GraphDef, state: TrainState) -> nnx.Module:
    """The net with averaged parameters, where there are some."""
    return nnx.merge(graphdef, state.ema or state.params, state.rest, copy=True)
