"""Public checkpoints: tensors under others' names and layouts into our nets, and back.

A family of models says, for one configuration, which of its tensors is which of ours and in what layout (`Pair`); the
rest is common: weight norms are folded, every tensor must find its place, and each error names the tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Literal

import numpy as np
from flax import nnx
from jaxtyping import Float

from omni_tokenizers import weights
from omni_tokenizers.errors import OmniError

Layout = Literal["same", "linear", "conv1d", "conv_transpose1d", "conv2d", "conv3d"]

# Which axis of a PyTorch tensor each axis of ours is: kernels are [*space, inputs, outputs] here.
_AXES: dict[str, tuple[int, ...] | None] = {
    "same": None,
    "linear": (1, 0),
    "conv1d": (2, 1, 0),
    "conv_transpose1d": (2, 0, 1),
    "conv2d": (2, 3, 1, 0),
    "conv3d": (2, 3, 4, 1, 0),
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """One tensor here and there."""

    ours: str
    """Dotted name in the nnx state."""
    theirs: str
    """Name in the checkpoint, after weight norms are folded."""
    layout: Layout = "same"
    """How the axes of theirs lie; ours may have axes of length 1 in front, as a 1 x 1 convolution for a linear map."""


def to_state(
    net: nnx.Module,
    tensors: Mapping[str, np.ndarray],
    pairs: Iterable[Pair],
    source: str,
    *,
    ignored: Collection[str] = (),
) -> nnx.State:
    """The state of `net` (which may be abstract) filled from a checkpoint's tensors.

    Args:
        pairs: one for each tensor of the net.
        source: what the tensors were read from, for messages.
        ignored: names that may be there and carry nothing (constants, training statistics).
    Raises:
        OmniError: a tensor is missing, unknown, of another shape (as a transposed one is) or not finite.
    """
    tensors, pairs = fold_weight_norms(tensors, source), list(pairs)
    if missing := [pair.theirs for pair in pairs if pair.theirs not in tensors]:
        raise OmniError(f"{source}: tensor {missing[0]!r} is missing{_more(missing)}")
    if extra := sorted(tensors.keys() - {pair.theirs for pair in pairs} - set(ignored)):
        raise OmniError(f"{source}: tensor {extra[0]!r} belongs to no part of this model{_more(extra)}")
    _, state = nnx.split(net)
    wanted = weights.shapes(state)
    ours = {}
    for pair in pairs:
        value, shape = np.asarray(tensors[pair.theirs]), wanted[pair.ours]
        axes = _AXES[pair.layout]
        expected = shape if axes is None else tuple(shape[axes.index(axis) - len(axes)] for axis in range(len(axes)))
        if value.shape != expected:
            raise OmniError(f"{source}: tensor {pair.theirs!r} has the shape {list(value.shape)}, not {list(expected)}")
        if not np.isfinite(value.astype(np.float32)).all():
            raise OmniError(f"{source}: tensor {pair.theirs!r} holds values that are not finite; the file is damaged")
        ours[pair.ours] = value if axes is None else value.transpose(axes).reshape(shape)
    return weights.unflatten(state, ours, source)


def from_state(state: nnx.State, pairs: Iterable[Pair]) -> dict[str, np.ndarray]:
    """A net's tensors under the checkpoint's names and in its layouts; what `to_state` reads back unchanged."""
    ours, theirs = weights.flatten(state), {}
    for pair in pairs:
        axes = _AXES[pair.layout]
        value = ours[pair.ours]
        if axes is not None:
            value = value.reshape(value.shape[-len(axes) :]).transpose(np.argsort(axes))
        theirs[pair.theirs] = value
    return theirs


def fold_weight_norms(tensors: Mapping[str, np.ndarray], source: str) -> dict[str, np.ndarray]:
    """Tensors with w = g v / |v| in place of each g and v, the norm over all axes but the first.

    Both of PyTorch's spellings are known: `parametrizations.weight.original0` and `original1`, `weight_g` and
    `weight_v`. (For a transposed convolution the first axis is the inputs': PyTorch's default of dim=0.)

    Raises:
        OmniError: a g without its v, or of another length.
    """
    folded = dict(tensors)
    for name in tensors:
        for size, direction in (
            ("parametrizations.weight.original0", "parametrizations.weight.original1"),
            ("weight_g", "weight_v"),
        ):
            if not name.endswith(f".{size}") and name != size:
                continue
            prefix = name.removesuffix(size)
            if prefix + direction not in tensors:
                raise OmniError(f"{source}: tensor {prefix + direction!r} is missing, the direction of {name!r}")
            g, v = folded.pop(name), folded.pop(prefix + direction)
            if g.size != len(v):
                raise OmniError(
                    f"{source}: tensor {name!r} has {g.size} values for {len(v)} rows of {prefix + direction!r}"
                )
            folded[f"{prefix}weight"] = weight_norm(g, v)
    return folded


def weight_norm(g: np.ndarray, v: np.ndarray) -> Float[np.ndarray, "*shape"]:
    """g v / |v| in float32, the norm over all axes but the first."""
    v = np.asarray(v, np.float32)
    rows = (len(v), *[1] * (v.ndim - 1))
    norm = np.sqrt(np.square(v.astype(np.float64)).sum(tuple(range(1, v.ndim)), keepdims=True))
    return (np.asarray(g, np.float64).reshape(rows) * v / norm).astype(np.float32)


def unfold_weight_norms(tensors: Mapping[str, np.ndarray], names: Collection[str]) -> dict[str, np.ndarray]:
    """The inverse of `fold_weight_norms` for the weights in `names`, newer spelling: v is the weight, g its norm."""
    unfolded = dict(tensors)
    for name in names:
        value = unfolded.pop(name)
        prefix = name.removesuffix("weight")
        norm = np.sqrt(np.square(value.astype(np.float64)).sum(tuple(range(1, value.ndim)), keepdims=True))
        unfolded[f"{prefix}parametrizations.weight.original0"] = norm.astype(np.float32)
        unfolded[f"{prefix}parametrizations.weight.original1"] = value
    return unfolded


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
