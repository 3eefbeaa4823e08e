"""AdamW or Muon, with warm-up and cosine decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from omni_tokenizers.errors import UsageError

OptimizerName = Literal["adamw", "muon"]
_ADAM_UPDATE = 0.2  # root mean square of AdamW's updates, to which Muon's are scaled (arXiv:2502.16982, section 2.2)


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, and what happens to gradients and parameters around it."""

    name: OptimizerName = "adamw"
    """adamw (Loshchilov and Hutter 2019, arXiv:1711.05101); muon (Jordan et al. 2024), which moves matrices along the
    orthogonalised mean gradient, scaled to AdamW's size (Liu et al. 2025, arXiv:2502.16982), and the rest by AdamW."""
    learning_rate: float = 1e-3
    """Learning rate at the end of the warm-up."""
    final_learning_rate: float = 0.1
    """Learning rate of the last step, as a part of the highest."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly; a cosine to the last step follows."""
    beta1: float = 0.9
    """Decay of the gradient's running mean."""
    beta2: float = 0.95
    """Decay of the squared gradient's running mean, in AdamW."""
    epsilon: float = 1e-8
    """Added to the root of the squared gradient's mean."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices and kernels, times the learning rate; scales and biases do not decay."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient; 0 leaves it as it is."""
    ema_decay: float = 0.0
    """Decay of the running mean of the parameters, which is what is saved in the end; 0 keeps none."""
    accumulation: int = 1
    """Microbatches into which a batch is split to save memory."""

    def __post_init__(self) -> None:
        if self.name not in get_args(OptimizerName):
            raise UsageError(f"optimizer name is {self.name!r}; choose one of {', '.join(get_args(OptimizerName))}")
        if self.accumulation < 1:
            raise UsageError(f"optimizer accumulation is {self.accumulation}; it must be at least 1")
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"optimizer {name} is {getattr(self, name)}; it must be at least 0 and below 1")


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step (from 0) -> learning rate, float32; the first step has one already, the last has the final one."""

    def schedule(step):
        warmup = (step + 1) / max(config.warmup_steps, 1)
        progress = (step - config.warmup_steps) / max(steps - 1 - config.warmup_steps, 1)
        cosine = (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1))) / 2
        floor = config.final_learning_rate
        return config.learning_rate * jnp.minimum(warmup, floor + (1 - floor) * cosine)

    return schedule


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of `steps` steps, over an `nnx.State` of parameters; clipping is the step's."""
    if config.name == "muon":
        return optax.contrib.muon(
            make_schedule(config, steps),
            weight_decay=config.weight_decay,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            eps=config.epsilon,
            consistent_rms=_ADAM_UPDATE,
            muon_weight_dimension_numbers=matrix_axes,
        )
    return optax.chain(
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(make_schedule(config, steps)),
    )


def decay_mask(params: nnx.State) -> nnx.State:
    """True for parameters with two axes or more, not counting the axis over which layers are stacked."""

    def decays(variable: nnx.Param) -> nnx.Param:
        axes = variable.get_metadata().get("axes", ())
        rank = variable.get_value().ndim - ("layers" in axes)
        return jax.tree.map(lambda _: rank >= 2, variable)

    return jax.tree.map(decays, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def matrix_axes(params: nnx.State) -> nnx.State:
    """Which axes make up the two sides of each parameter that Muon takes as a matrix; None leaves one to AdamW.

    A parameter with named axes is a matrix between "embed" and all its other axes, one for each layer where layers are
    stacked. Embeddings and heads, whose rows are seldom and unevenly used, stay with AdamW; so do vectors.
    """

    def sides(variable: nnx.Param) -> nnx.Param:
        if not jax.tree.leaves(variable):  # masked out, as optax asks again about what is left to Muon
            return variable
        names = variable.get_metadata().get("axes") or ("input", "output")[: variable.get_value().ndim]
        others = tuple(axis for axis, name in enumerate(names) if name not in ("layers", "embed", "input"))
        inner = tuple(axis for axis, name in enumerate(names) if name in ("embed", "input"))
        is_matrix = variable.get_value().ndim == len(names) and inner and others and "vocabulary" not in names
        numbers = MuonDimensionNumbers(inner, others) if is_matrix else None
        return jax.tree.map(lambda _: numbers, variable)

    return jax.tree.map(sides, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
