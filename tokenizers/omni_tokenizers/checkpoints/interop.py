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

Layout = Literal["same", "channels", "linear", "conv1d", "conv_transpose1d", "conv2d", "conv3d"]

# Which axis of a PyTorch tensor each axis of ours is: kernels are [*space, inputs, outputs] here.
_AXES: dict[str, tuple[int, ...] | None] = {
    "same": None,
    "channels": (0, 2, 1),  # [1, channels, 1] there
    "linear": (1, 0),
    "conv1d": (2, 1, 0),
    "conv_transpose1d": (2, 0, 1),
    "conv2d": (2, 3, 1, 0),
    "conv3d": (2, 3, 4, 1, 0),
}

# PyTorch's spellings of a weight norm's size g and direction v, the newer first.
_WEIGHT_NORMS = (
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
    ("weight_g", "weight_v"),
)


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
    pairs, ignored = list(pairs), set(ignored)
    tensors = {name: value for name, value in tensors.items() if name not in ignored}
    for name, value in tensors.items():
        _require_finite(name, value, source)
    tensors = fold_weight_norms(tensors, source)
    if missing := [pair.theirs for pair in pairs if pair.theirs not in tensors]:
        raise OmniError(f"{source}: tensor {missing[0]!r} is missing{_more(missing)}")
    if extra := sorted(tensors.keys() - {pair.theirs for pair in pairs}):
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
        OmniError: a g without its v, a v without its g, or a g of another length.
    """
    folded = dict(tensors)
    for size, direction in _WEIGHT_NORMS:
        ends = (size, direction)
        for prefix in sorted({name.removesuffix(end) for name in tensors for end in ends if _is_named(name, end)}):
            for end, other in (ends, ends[::-1]):
                if prefix + end not in tensors:
                    raise OmniError(f"{source}: tensor {prefix + end!r} is missing, the other half of {other!r} there")
            g, v = folded.pop(prefix + size), folded.pop(prefix + direction)
            if g.size != len(v):
                rows = f"{len(v)} rows of {prefix + direction!r}"
                raise OmniError(f"{source}: tensor {prefix + size!r} has {g.size} values for {rows}")
            folded[f"{prefix}weight"] = weight_norm(g, v)
    return folded


def weight_norm(g: np.ndarray, v: np.ndarray) -> Float[np.ndarray, "*shape"]:
    """v (g / |v|) in float32, the norm over all axes but the first.

    The norm is rounded before it divides, so that a norm as `unfold_weight_norms` writes it gives v back bit for bit.
    """
    v = np.asarray(v, np.float32)
    norm = _norm(v)
    with np.errstate(divide="ignore", invalid="ignore"):
        return v * (np.asarray(g, np.float32).reshape(norm.shape) / norm)


def unfold_weight_norms(tensors: Mapping[str, np.ndarray], names: Collection[str]) -> dict[str, np.ndarray]:
    """The inverse of `fold_weight_norms` for the weights in `names`, in the newer spelling: g is the norm, v is w."""
    unfolded = dict(tensors)
    for name in names:
        value = unfolded.pop(name)
        prefix = name.removesuffix("weight")
        size, direction = _WEIGHT_NORMS[0]
        norm = _norm(value)
        unfolded[prefix + size] = norm
        unfolded[prefix + direction] = np.where(norm == 0, np.float32(1), value)  # a row of zeros has no direction
    return unfolded


def _norm(value: np.ndarray) -> Float[np.ndarray, "*rows_and_ones"]:
    """The norm of each row over all its axes, summed in float64 and rounded to float32."""
    squares = np.square(value.astype(np.float64))
    return np.sqrt(squares.sum(tuple(range(1, value.ndim)), keepdims=True)).astype(np.float32)


def _is_named(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _require_finite(name: str, value: np.ndarray, source: str) -> None:
    if not np.isfinite(np.asarray(value, np.float32)).all():
        raise OmniError(f"{source}: tensor {name!r} holds values that are not finite; the file is damaged")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
