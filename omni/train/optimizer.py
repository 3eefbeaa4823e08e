"""AdamW with warm-up and cosine decay."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from omni_tokenizers.errors import UsageError


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) and what happens to gradients and parameters around it."""

    learning_rate: float = 1e-3
    """Learning rate at the end of the warm-up."""
    final_learning_rate: float = 0.1
    """Learning rate of the last step, as a part of the highest."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly; a cosine to the last step follows."""
    beta1: float = 0.9
    """Decay of the gradient's running mean."""
    beta2: float = 0.95
    """Decay of the squared gradient's running mean."""
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
