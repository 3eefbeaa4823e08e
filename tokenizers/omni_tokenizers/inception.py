"""Fréchet distance of pictures by the features of Inception v3, whose weights are the user's own.

Sources: FID (Heusel et al. 2017, arXiv:1706.08500, equation 6); the net of Szegedy et al. 2015 (arXiv:1512.00567) as
TensorFlow's release of 2015-12-05 has it, which all published figures are made with. Unlike torchvision's, its means of
3 x 3 leave out what lies beyond the edge, and its last block takes maxima in their place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from etils import epath
from jaxtyping import Array, Float, UInt8

from omni_tokenizers import weights
from omni_tokenizers.errors import OmniError, UsageError

_SIDE = 299
_EPSILON = 1e-3
_TOGETHER = 16  # pictures that go through the net in one call
PREPROCESSING = f"bilinear to {_SIDE} x {_SIDE} without antialiasing, within [-1, 1]"

_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", None, "Conv2d_3b_1x1", "Conv2d_4a_3x3", None)
"""The layers before the blocks; None is a maximum of 3 x 3 at every second place."""
_UNPADDED = frozenset({"Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_4a_3x3"})

# Each branch of a block is a chain of convolutions, after a pooling if it begins with one; a tuple at a chain's end is
# a fork whose results stand side by side. Sizes of kernels and numbers of channels are those of the weights.
_Branch = tuple[str | tuple[str, ...], ...]
_WIDE = (("branch1x1",), ("branch5x5_1", "branch5x5_2"), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"))
_LONG = (
    ("branch1x1",),
    ("branch7x7_1", "branch7x7_2", "branch7x7_3"),
    ("branch7x7dbl_1", "branch7x7dbl_2", "branch7x7dbl_3", "branch7x7dbl_4", "branch7x7dbl_5"),
)
_FORKED = (
    ("branch1x1",),
    ("branch3x3_1", ("branch3x3_2a", "branch3x3_2b")),
    ("branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")),
)
_MEAN, _MAXIMUM = ("mean", "branch_pool"), ("maximum", "branch_pool")
_BLOCKS: dict[str, tuple[_Branch, ...]] = {
    **{f"Mixed_{name}": (*_WIDE, _MEAN) for name in ("5b", "5c", "5d")},
    "Mixed_6a": (("branch3x3",), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"), ("halve",)),
    **{f"Mixed_{name}": (*_LONG, _MEAN) for name in ("6b", "6c", "6d", "6e")},
    "Mixed_7a": (
        ("branch3x3_1", "branch3x3_2"),
        ("branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4"),
        ("halve",),
    ),
    "Mixed_7b": (*_FORKED, _MEAN),
    "Mixed_7c": (*_FORKED, _MAXIMUM),
}
_HALVING = frozenset(
    {
        "Conv2d_1a_3x3",
        "Mixed_6a.branch3x3",
        "Mixed_6a.branch3x3dbl_3",
        "Mixed_7a.branch3x3_2",
        "Mixed_7a.branch7x7x3_4",
    }
)
"""Convolutions at every second place, without padding."""


class InceptionFeatures:
    """2048 features (in the published net) of each picture.

    Args:
        tensors: `NAME.conv.weight` [out, in, height, width], `NAME.bn.weight`, `.bias`, `.running_mean` and
            `.running_var` [out] of every convolution, named as in torchvision, of any width. Others are ignored.
        source: where they are from, for messages.
        sha256: of the file that they are from.
    Raises:
        OmniError: a tensor is missing, has another shape than its place wants, or holds no numbers.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray], source: str, sha256: str | None = None):
        self.sha256 = sha256
        names = [name for name in _STEM if name] + [
            f"{block}.{name}"
            for block, branches in _BLOCKS.items()
            for branch in branches
            for name in _convolutions(branch)
        ]
        self.layers = {name: _folded(tensors, name, source) for name in names}
        try:
            jax.eval_shape(self._forward, self.layers, jax.ShapeDtypeStruct((1, _SIDE, _SIDE, 3), np.float32))
        except (TypeError, ValueError) as error:
            raise OmniError(f"{source}: the layers' channels do not fit those of Inception v3 ({error})") from None
        self._jitted = jax.jit(self._forward)

    @classmethod
    def read(cls, path: epath.PathLike) -> InceptionFeatures:
        """The net of the weights in a safetensors file; an `OmniError` if they are not as described above."""
        return cls(weights.read(path), str(path), weights.sha256(path))

    def __call__(self, pictures: UInt8[np.ndarray, "n height width 3"]) -> Float[np.ndarray, "n features"]:
        """Features of all pictures, a few at a time."""
        pieces = []
        for start in range(0, len(pictures), _TOGETHER):
            piece = pictures[start : start + _TOGETHER]
            padded = np.pad(piece, ((0, min(_TOGETHER, len(pictures)) - len(piece)), (0, 0), (0, 0), (0, 0)))
            pieces.append(np.asarray(self._jitted(self.layers, padded))[: len(piece)])
        return np.concatenate(pieces)

    def _forward(self, layers: dict, pictures: Array) -> Float[Array, "n features"]:
        x = pictures.astype(jnp.float32) / 255 * 2 - 1
        x = jax.image.resize(x, (len(x), _SIDE, _SIDE, 3), "linear", antialias=False)
        for name in _STEM:
            x = _maximum(x, 2, "VALID") if name is None else _convolved(layers, name, x)
        for block, branches in _BLOCKS.items():
            x = jnp.concatenate([_run(layers, block, branch, x) for branch in branches], -1)
        return x.mean((1, 2))


def frechet_distance(first: Float[np.ndarray, "n features"], second: Float[np.ndarray, "m features"]) -> float:
    """|m1 - m2|^2 + trace(C1 + C2 - 2 (C1 C2)^(1/2)) of the means and covariances of two sets of features.

    Raises:
        UsageError: a set has fewer than two members.
    """
    if min(len(first), len(second)) < 2:
        raise UsageError(f"the Fréchet distance needs two pictures at least, got {min(len(first), len(second))}")
    (mean1, root1), (mean2, root2) = map(_mean_and_root, (first, second))
    # C = R R^T, and the trace of the root of C1 C2 is the sum of the singular values of R1^T R2.
    trace = scipy.linalg.svdvals(root1.T @ root2).sum()
    return float(np.square(mean1 - mean2).sum() + np.square(root1).sum() + np.square(root2).sum() - 2 * trace)


def _mean_and_root(features: Float[np.ndarray, "n features"]) -> tuple[np.ndarray, np.ndarray]:
    """The mean, and a matrix whose product with its transpose is the covariance (with n - 1)."""
    features = features.astype(np.float64)
    mean = features.mean(0)
    root = (features - mean).T / np.sqrt(len(features) - 1)
    if root.shape[1] > root.shape[0]:  # many pictures: one column for each feature is enough
        root = scipy.linalg.qr(root.T, mode="r")[0][: root.shape[0]].T
    return mean, root


def _convolutions(branch: _Branch) -> list[str]:
    flat = [name for step in branch for name in ((step,) if isinstance(step, str) else step)]
    return [name for name in flat if name not in ("mean", "maximum", "halve")]


def _run(layers: dict, block: str, branch: Sequence, x: Array) -> Array:
    for step in branch:
        if step == "mean":
            x = _mean(x)
        elif step == "maximum":
            x = _maximum(x, 1, "SAME")
        elif step == "halve":
            x = _maximum(x, 2, "VALID")
        elif isinstance(step, str):
            x = _convolved(layers, f"{block}.{step}", x)
        else:
            x = jnp.concatenate([_convolved(layers, f"{block}.{name}", x) for name in step], -1)
    return x


def _convolved(layers: dict, name: str, x: Array) -> Array:
    kernel, bias = layers[name]
    stride = 2 if name in _HALVING else 1
    padding = "VALID" if name in _HALVING | _UNPADDED else "SAME"
    y = jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )
    return jax.nn.relu(y + bias)


def _maximum(x: Array, stride: int, padding: str) -> Array:
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def _mean(x: Array) -> Array:
    """Means of 3 x 3, of what lies within the picture."""

    def total(y: Array) -> Array:
        return jax.lax.reduce_window(y, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")

    return total(x) / total(jnp.ones_like(x[:1, ..., :1]))


def _folded(tensors: Mapping[str, np.ndarray], name: str, source: str) -> tuple[np.ndarray, np.ndarray]:
    """Kernel [height, width, in, out] and bias [out] of a convolution and the batch norm after it."""
    kernel = _tensor(tensors, f"{name}.conv.weight", source)
    if kernel.ndim != 4:
        raise OmniError(f"{source}: tensor '{name}.conv.weight' has the shape {list(kernel.shape)}, not four axes")
    scale, bias, mean, variance = (
        _tensor(tensors, f"{name}.bn.{part}", source, (len(kernel),))
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    factor = scale / np.sqrt(variance + _EPSILON)
    kernel = kernel.transpose(2, 3, 1, 0) * factor
    return kernel.astype(np.float32), (bias - mean * factor).astype(np.float32)


def _tensor(tensors: Mapping[str, np.ndarray], name: str, source: str, shape: tuple[int, ...] | None = None):
    if name not in tensors:
        raise OmniError(f"{source}: tensor {name!r} of Inception v3 is missing")
    value = np.asarray(tensors[name], np.float64)
    if (shape is not None and value.shape != shape) or not np.isfinite(value).all():
        raise OmniError(
            f"{source}: tensor {name!r} has the shape {list(value.shape)} or holds no numbers; expected {shape}"
        )
    return value
