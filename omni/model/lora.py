"""Low-rank adapters of the matrices of blocks (LoRA, Hu et al. 2021, arXiv:2106.09685): attached, and merged again."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omni.model.transformer import ADAPTER, INPUTS, Transformer
from omni_tokenizers.errors import UsageError

ADAPTERS = f"blocks.*{ADAPTER}?"
"""Pattern of the names of adapters' parameters."""


@dataclass(frozen=True)
class Lora:
    """Adapters of some matrices W of each block, which then compute as W + (alpha / rank) A B. A and B are trained, and
    all else stays."""

    rank: int = 8
    """Columns of A, rows of B."""
    alpha: float = 16.0
    """Times 1 / rank, the scale of A B."""
    matrices: tuple[str, ...] = tuple(INPUTS)
    """Those that have an adapter. All by default: with adapters of attention alone, training falls short of one of all
    parameters (Dettmers et al. 2023, arXiv:2305.14314, section 4)."""
    trained: tuple[str, ...] = ()
    """Patterns of the names of other parameters that are trained too, such as `embedding` for tokens that are new."""

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise UsageError(f"lora has rank {self.rank} and alpha {self.alpha}; both must be above 0")
        if not self.matrices:
            raise UsageError(f"lora matrices are none; choose among {', '.join(INPUTS)}")
        for name in self.matrices:
            if name not in INPUTS:
                raise UsageError(f"lora matrices name {name!r}; choose among {', '.join(INPUTS)}")


def attach(model: Transformer, lora: Lora, rngs: nnx.Rngs) -> None:
    """Gives a transformer adapters. B begins with zeros, so that it computes exactly what it did.

    Raises:
      UsageError: an adapter of a matrix that every expert has of its own.
    """
    config, blocks = model.config, model.blocks
    if config.experts and (of_experts := {"gate", "up", "down"} & set(lora.matrices)):
        raise UsageError(
            f"lora matrices name {min(of_experts)!r}, of which each expert has its own, and those have no adapters; "
            "choose among query, key, value, output"
        )
    for name in lora.matrices:
        matrix, inputs = getattr(blocks, name), 1 + INPUTS[name]
        shape, axes = matrix[...].shape, matrix.get_metadata()["axes"]
        draw = jax.nn.initializers.truncated_normal(np.prod(shape[1:inputs]) ** -0.5)
        first = draw(rngs.params(), (*shape[:inputs], lora.rank))
        second = jnp.zeros((shape[0], lora.rank, *shape[inputs:]))
        setattr(blocks, f"{name}{ADAPTER}a", nnx.Param(first, axes=(*axes[:inputs], "rank")))
        setattr(blocks, f"{name}{ADAPTER}b", nnx.Param(second, axes=(axes[0], "rank", *axes[inputs:])))
    blocks.adapter_scale = lora.alpha / lora.rank


def merged(model: Transformer) -> Transformer:
    """The same function without adapters, of whose matrices each is W + (alpha / rank) A B: numpy, on the host."""
    model = nnx.merge(*nnx.split(model), copy=True)  # with variables of its own
    weights = model.blocks.weights()
    for name in INPUTS:
        if (first := name + ADAPTER + "a") in weights:
            matrix, second = getattr(model.blocks, name), name + ADAPTER + "b"
            a, b = np.asarray(weights[first]), np.asarray(weights[second])  # b has the scale
            change = a.reshape(len(a), -1, a.shape[-1]) @ b.reshape(*b.shape[:2], -1)
            matrix.set_value(np.asarray(matrix[...]) + change.reshape(matrix.shape))
            delattr(model.blocks, first)
            delattr(model.blocks, second)
    return model
