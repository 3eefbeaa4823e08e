"""AdamW, Adafactor or Muon, with warm-up and one of three decays; what decays and what is frozen, by name."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from omni_tokenizers.errors import UsageError

OptimizerName = Literal["adamw", "adafactor", "muon"]
ScheduleName = Literal["cosine", "wsd", "constant"]
_ADAM_UPDATE = 0.2  # root mean square of AdamW's updates, to which Muon's are scaled (arXiv:2502.16982, section 2.2)


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, and what happens to gradients and parameters around it."""

    name: OptimizerName = "adamw"
    """adamw (Loshchilov and Hutter 2019, arXiv:1711.05101); adafactor (Shazeer and Stern 2018, arXiv:1804.04235), whose
    squared gradients are sums over rows and columns, with beta1's mean; muon (Jordan et al. 2024), which moves matrices
    along the orthogonalised mean gradient, scaled to AdamW's size (Liu et al. 2025, arXiv:2502.16982), and the rest by
    AdamW."""
    learning_rate: float = 1e-3
    """Learning rate at the end of the warm-up."""
    final_learning_rate: float = 0.1
    """Learning rate of the last step, as a part of the highest."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly; `schedule` follows."""
    schedule: ScheduleName = "cosine"
    """cosine: to the last step; wsd: stays until the last `decay_share` of the steps, in which it falls linearly (Hu et
    al. 2024, arXiv:2404.06395); constant: stays."""
    decay_share: float = 0.1
    """Share of the steps in which wsd falls."""
    beta1: float = 0.9
    """Decay of the gradient's running mean."""
    beta2: float = 0.95
    """Decay of the squared gradient's running mean, in AdamW."""
    epsilon: float = 1e-8
    """Added to the root of the squared gradient's mean."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices and kernels, times the learning rate; scales and biases do not decay."""
    no_decay: tuple[str, ...] = ()
    """Patterns (`*`, `?`) of the names of parameters that do not decay either, as `embedding` or `blocks.*`."""
    frozen: tuple[str, ...] = ()
    """Patterns of the names of parameters that never change; they have neither gradients nor moments."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient; 0 leaves it as it is."""
    ema_decay: float = 0.0
    """Decay of the running mean of the parameters, which is what is saved in the end; 0 keeps none."""
    accumulation: int = 1
    """Microbatches into which a batch is split to save memory."""

    def __post_init__(self) -> None:
        if self.name not in get_args(OptimizerName):
            raise UsageError(f"optimizer name is {self.name!r}; choose one of {', '.join(get_args(OptimizerName))}")
        if self.schedule not in get_args(ScheduleName):
            raise UsageError(f"schedule is {self.schedule!r}; choose one of {', '.join(get_args(ScheduleName))}")
        if not 0 < self.decay_share <= 1:
            raise UsageError(f"optimizer decay_share is {self.decay_share}; it must be above 0 and at most 1")
        if self.accumulation < 1:
            raise UsageError(f"optimizer accumulation is {self.accumulation}; it must be at least 1")
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"optimizer {name} is {getattr(self, name)}; it must be at least 0 and below 1")


def make_schedule(config: OptimizerConfig, steps: int, begin: int = 0) -> optax.Schedule:
    """Step (from 0) -> learning rate, float32; the first step has one already, the last has the final one.

    Args:
      steps: over which it runs.
      begin: the first of them.
    """

    floor = config.final_learning_rate

    def schedule(step):
        step = jnp.maximum(step - begin, 0)  # the optimizer does not count skipped steps, so it may come later
        warmup = (step + 1) / max(config.warmup_steps, 1)
        return config.learning_rate * jnp.minimum(warmup, decayed(step))

    def decayed(step):
        if config.schedule == "constant":
            return 1.0
        if config.schedule == "wsd":
            last = max(round(config.decay_share * steps), 1)
            return 1 - (1 - floor) * jnp.clip((step - (steps - 1 - last)) / last, 0, 1)
        progress = (step - config.warmup_steps) / max(steps - 1 - config.warmup_steps, 1)
        cosine = (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1))) / 2
        return floor + (1 - floor) * cosine

    return schedule


def make_optimizer(config: OptimizerConfig, steps: int, begin: int = 0) -> optax.GradientTransformation:
    """The optimizer, by the schedule of `make_schedule`, over an `nnx.State` of the parameters that move; clipping is
    the step's."""
    schedule = make_schedule(config, steps, begin)

    def decays(params: nnx.State) -> nnx.State:
        return decay_mask(params, config.no_decay)

    if config.name == "muon":
        return optax.contrib.muon(
            schedule,
            weight_decay=config.weight_decay,
            weight_decay_mask=decays if config.no_decay else None,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            eps=config.epsilon,
            consistent_rms=_ADAM_UPDATE,
            muon_weight_dimension_numbers=matrix_axes,
        )
    if config.name == "adafactor":
        moments = optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.ema(config.beta1, debias=False) if config.beta1 else optax.identity(),
        )
    else:
        moments = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    return optax.chain(
        moments,
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.scale_by_learning_rate(schedule),
    )


def partition(params: nnx.State, trained: Sequence[str], frozen: Sequence[str]) -> tuple[nnx.State, nnx.State]:
    """The parameters that move, those whose dotted names fit a pattern of `trained` and none of `frozen`, and the
    others."""

    def moves(path: tuple, _: nnx.Param) -> bool:
        return fits(path, trained) and not fits(path, frozen)

    return nnx.split_state(params, moves, ...)


def fits(path: tuple, patterns: Sequence[str]) -> bool:
    """Whether the dotted name of a parameter fits a pattern."""
    return any(fnmatch.fnmatchcase(".".join(map(str, path)), pattern) for pattern in patterns)


def check_patterns(params: nnx.State, patterns: Sequence[str], setting: str) -> None:
    """Raises `UsageError` for a pattern that fits the name of no parameter."""
    for pattern in patterns:
        if not any(fits(path, (pattern,)) for path, _ in nnx.to_flat_state(params)):
            raise UsageError(f"{setting}: no parameter is named {pattern!r}")


def decay_mask(params: nnx.State, no_decay: Sequence[str] = ()) -> nnx.State:
    """True for parameters with two axes or more, not counting the axis over which layers are stacked, whose names fit
    no pattern of `no_decay`."""

    def decays(path: tuple, variable: nnx.Param) -> nnx.Param:
        if not jax.tree.leaves(variable):  # masked out: optax asks again about what Muon leaves to AdamW
            return variable
        axes = variable.get_metadata().get("axes", ())
        rank = variable.get_value().ndim - ("layers" in axes)
        decaying = rank >= 2 and not fits([getattr(key, "key", key) for key in path], no_decay)
        return jax.tree.map(lambda _: decaying, variable)

    return jax.tree_util.tree_map_with_path(decays, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def matrix_axes(params: nnx.State) -> nnx.State:
    """Which axes make up the two sides of each parameter that Muon takes as a matrix; None leaves one to AdamW.

    A parameter with named axes is a matrix between "embed" and all its other axes, one for each layer and expert where
    these are stacked; a side of an adapter that has no "embed", between "rank" and its others. Embeddings and heads,
    whose rows are seldom and unevenly used, stay with AdamW; so do vectors.
    """

    def sides(variable: nnx.Param) -> nnx.Param:
        if not jax.tree.leaves(variable):  # masked out, as optax asks again about what is left to Muon
            return variable
        names = variable.get_metadata().get("axes") or ("input", "output")[: variable.get_value().ndim]
        first = ("embed", "input") if {"embed", "input"} & set(names) else ("rank",)
        others = tuple(axis for axis, name in enumerate(names) if name not in ("layers", "experts", *first))
        inner = tuple(axis for axis, name in enumerate(names) if name in first)
        is_matrix = variable.get_value().ndim == len(names) and inner and others and "vocabulary" not in names
        numbers = MuonDimensionNumbers(inner, others) if is_matrix else None
        return jax.tree.map(lambda _: numbers, variable)

    return jax.tree.map(sides, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
