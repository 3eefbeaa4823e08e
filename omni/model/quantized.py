"""Arrays held in int8: whole numbers, and a float32 scale for each group of them (by the package qwix)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from omni_tokenizers.errors import OmniError, UsageError

if TYPE_CHECKING:  # it is needed where something is held in int8, and nowhere else
    from qwix import QArray

Held: TypeAlias = "Array | QArray"
DTYPES = ("float32", "bfloat16", "int8")
"""Types in which a decoder's matrices, and a cache, may be held."""
_LARGEST_IS_127 = f"absmax,{127.5 / 127}"
"""Alone, qwix's "absmax" makes the largest number of each group 127.5, between two whole ones: the last bit of what was
computed, which another batch may change, would decide between them."""


def check_dtype(name: str, dtype: str | None) -> None:
    """That something, `name`, can be held so; None stands for the compute type.

    Raises:
      UsageError: it is none of `DTYPES`.
      OmniError: it is int8, and qwix is not installed.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"{name} is {dtype!r}; choose one of {', '.join(DTYPES)}")
    if dtype == "int8":
        _qwix()


def quantized(x: Float[Array, ...], shared: Sequence[int]) -> QArray:
    """An array in int8: numbers that stand apart along the axes `shared` alone have one scale, their largest magnitude
    over 127 (`scale` has length 1 along these axes). No number moves by more than half its scale."""
    axes = tuple(axis for axis in range(x.ndim) if axis - x.ndim not in shared and axis not in shared)
    x = x.astype(jnp.float32)
    return _qwix().quantize(x, jnp.int8, channelwise_axes=axes, calibration_method=_LARGEST_IS_127)


def dequantized(x: Held) -> Array:
    """What `quantized` made as float32; any other array as it is."""
    return x if isinstance(x, jax.Array | np.ndarray) else _qwix().dequantize(x)


def _qwix():
    try:
        import qwix
    except ImportError:
        raise OmniError("int8 needs the package qwix: pip install 'omni-any-to-any[int8]'") from None
    return qwix
