"""A perceptual distance of pictures by the features of VGG16, whose weights are the user's own.

Source: LPIPS (Zhang et al. 2018, arXiv:1801.03924, equation 1), the VGG16 variant that VQGAN trains with.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Array, Float

from omni_tokenizers import weights
from omni_tokenizers.errors import OmniError, UsageError

# Convolutions of each stage, by their numbers in torchvision's VGG16; a stage's last one gives its features.
_STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_SMALLEST = 16  # pixels of a side that four halvings leave anything of
PREPROCESSING = f"pixels within [-1, 1], minus {_SHIFT}, over {_SCALE}"


class _Fixed(nnx.Variable):
    """Weights that nothing changes."""


class PerceptualDistance(nnx.Module):
    """For each stage of VGG16: squared difference of features at length 1, weighted by channel, mean over positions.

    Args:
        tensors: `features.N.weight` and `features.N.bias` as torchvision names them, [out, in, 3, 3], of any width; and
            `linI.model.1.weight`, [1, channels, 1, 1], LPIPS's weights of the channels of stage I. Without any of the
            latter all channels weigh 1, which is no LPIPS.
        source: where they are from, for messages.
        sha256: of the file that they are from.
    Raises:
        OmniError: a tensor is missing, or does not fit the others.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray], source: str, sha256: str | None = None):
        self.sha256 = sha256
        channels, self.stages = 3, nnx.List([])
        self.is_lpips = any(name.startswith("lin") for name in tensors)
        self.heads = nnx.List([])
        for stage, numbers in enumerate(_STAGES):
            layers = nnx.List([])
            for number in numbers:
                kernel = _tensor(tensors, f"features.{number}.weight", (None, channels, 3, 3), source)
                channels = len(kernel)
                bias = _tensor(tensors, f"features.{number}.bias", (channels,), source)
                layers.append(nnx.List([_Fixed(jnp.asarray(kernel.transpose(2, 3, 1, 0))), _Fixed(jnp.asarray(bias))]))
            self.stages.append(layers)
            head = np.ones(channels, np.float32)
            if self.is_lpips:
                head = _tensor(tensors, f"lin{stage}.model.1.weight", (1, channels, 1, 1), source).reshape(-1)
            self.heads.append(_Fixed(jnp.asarray(head)))

    @classmethod
    def read(cls, path: epath.PathLike) -> PerceptualDistance:
        """The distance of the weights in a safetensors file; an `OmniError` if they are not as described above."""
        return cls(weights.read(path), str(path), weights.sha256(path))

    def __call__(
        self, estimate: Float[Array, "batch height width 3"], image: Float[Array, "batch height width 3"]
    ) -> Float[Array, " batch"]:
        """The distance of each picture, within [-1, 1], from its original; `UsageError` below 16 x 16 pixels."""
        if min(image.shape[1:3]) < _SMALLEST:
            raise UsageError(f"the perceptual loss needs pictures of {_SMALLEST} x {_SMALLEST}, got {image.shape[1:3]}")
        distance = jnp.zeros(len(image))
        pairs = zip(self._features(estimate), self._features(image), self.heads, strict=True)
        for first, second, head in pairs:
            distance += (jnp.square(_unit(first) - _unit(second)) @ head[...]).mean((1, 2))
        return distance

    def _features(self, image: Array) -> list[Array]:
        x, features = (image - jnp.array(_SHIFT)) / jnp.array(_SCALE), []
        for index, layers in enumerate(self.stages):
            x = nnx.max_pool(x, (2, 2), (2, 2)) if index else x
            for kernel, bias in layers:
                x = nnx.relu(_convolved(x, kernel[...]) + bias[...])
            features.append(x)
        return features


def _convolved(x: Array, kernel: Array) -> Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _unit(x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width channels"]:
    # The root of a positive number: where all features are 0 its gradient would be infinite.
    return x / (jnp.sqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-20)) + 1e-10)


def _tensor(tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int | None, ...], source: str) -> np.ndarray:
    if name not in tensors:
        raise OmniError(f"{source}: tensor {name!r} of the perceptual loss's VGG16 is missing")
    value = np.asarray(tensors[name], np.float32)
    fits = value.ndim == len(shape) and all(
        wanted in (None, found) for wanted, found in zip(shape, value.shape, strict=True)
    )
    if not fits or not np.isfinite(value).all():
        raise OmniError(
            f"{source}: tensor {name!r} has the shape {list(value.shape)} or holds no numbers; expected {shape}"
        )
    return value
