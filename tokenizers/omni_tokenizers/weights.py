"""Weights as safetensors: named arrays in and out of nnx states, with errors that name the tensor. Never pickle."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Set
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from flax import nnx
from jaxtyping import Array

from omni_tokenizers.errors import OmniError

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "U32": np.uint32,
    "BOOL": np.bool_,
}


def flatten(state: nnx.State) -> dict[str, np.ndarray]:
    """The arrays of an nnx state on the host, under dotted names such as ``encoder.blocks.0.kernel``, sorted."""
    named = {_name(path): np.asarray(variable[...]) for path, variable in nnx.to_flat_state(state)}
    return dict(sorted(named.items()))


def shapes(state: nnx.State) -> dict[str, tuple[int, ...]]:
    """The shape of each array (or abstract array) of an nnx state by dotted name."""
    return {_name(path): tuple(variable.get_value().shape) for path, variable in nnx.to_flat_state(state)}


def unflatten(
    state: nnx.State,
    tensors: Mapping[str, np.ndarray],
    source: str = "the weights",
    place: Callable[[np.ndarray, nnx.Variable], Array] = lambda value, _: jnp.asarray(value),
) -> nnx.State:
    """A state like `state` (arrays or shapes) that holds `tensors`, each asked for once and cast to its place's dtype.

    `place` puts a variable's value onto the device or the devices where it belongs.

    Raises:
        OmniError: a tensor is missing, unknown, of another shape or not finite; the message names it and `source`.
    """
    flat = {_name(path): (path, variable) for path, variable in nnx.to_flat_state(state)}
    require_names(tensors.keys(), flat.keys(), source)
    filled = []
    for name, (path, variable) in flat.items():
        value, wanted = np.asarray(tensors[name]), variable.get_value()
        if value.shape != wanted.shape:
            raise OmniError(f"{source}: tensor {name!r} has the shape {list(value.shape)}, not {list(wanted.shape)}")
        if not np.isfinite(value.astype(np.float32)).all():
            raise OmniError(f"{source}: tensor {name!r} holds values that are not finite; the file is damaged")
        filled.append((path, variable.replace(place(value.astype(wanted.dtype, copy=False), variable))))
    return nnx.from_flat_state(filled)


def require_names(found: Set[str], wanted: Set[str], source: str) -> None:
    """An `OmniError` that names a tensor which is missing among those found, or belongs to no parameter."""
    if missing := sorted(wanted - found):
        raise OmniError(f"{source}: tensor {missing[0]!r} is missing{_more(missing)}")
    if extra := sorted(found - wanted):
        raise OmniError(f"{source}: tensor {extra[0]!r} belongs to no parameter of this net{_more(extra)}")


def sha256(path: epath.PathLike) -> str:
    """SHA-256 of a file, in hexadecimal; `OmniError` where there is none."""
    try:
        return hashlib.sha256(epath.Path(path).read_bytes()).hexdigest()
    except OSError:
        raise OmniError(f"{path}: there is no such file of weights") from None


def rounded(tensors: Mapping[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """`tensors` with floating point ones stored as `dtype` ("float32", "float16" or "bfloat16").

    Raises:
        OmniError: another dtype, or a value too large for it.
    """
    if dtype not in ("float32", "float16", "bfloat16"):
        raise OmniError(f"weights can be stored as float32, float16 or bfloat16, not {dtype!r}")
    result = {}
    for name, value in tensors.items():
        if value.dtype.kind == "f" or value.dtype == ml_dtypes.bfloat16:
            with np.errstate(over="ignore"):
                value = value.astype(jnp.dtype(dtype))
            if not np.isfinite(value.astype(np.float32)).all():
                raise OmniError(f"tensor {name!r} does not fit {dtype}; store the weights as float32")
        result[name] = value
    return result


def write(path: epath.PathLike, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes arrays, and strings about them, as one safetensors file, at a local path or in a bucket."""
    arrays = {name: np.ascontiguousarray(value).reshape(value.shape) for name, value in tensors.items()}
    epath.Path(path).write_bytes(safetensors.numpy.save(arrays, None if metadata is None else dict(metadata)))


def read(path: epath.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file; floating point ones come back as float32.

    Raises:
        OmniError: no such file, or not a whole safetensors file.
    """
    path = epath.Path(path)
    try:
        entries = safetensors.deserialize(path.read_bytes())
    except OSError:
        raise OmniError(f"{path}: there is no such file of weights") from None
    except safetensors.SafetensorError as error:
        raise OmniError(f"{path}: not a whole safetensors file ({error})") from None
    return {name: as_array(path, name, entry) for name, entry in entries}


def as_array(path: epath.Path, name: str, entry: Mapping[str, Any]) -> np.ndarray:
    """An array of safetensors' dtype, shape and data; floating point ones as float32."""
    if entry["dtype"] not in _DTYPES:
        raise OmniError(f"{path}: tensor {name!r} has the type {entry['dtype']}, which cannot be read")
    value = np.frombuffer(bytes(entry["data"]), _DTYPES[entry["dtype"]]).reshape(entry["shape"])
    floating = value.dtype.kind == "f" or value.dtype == ml_dtypes.bfloat16
    return value.astype(np.float32) if floating else value


def _name(path: tuple) -> str:
    return ".".join(str(part) for part in path)


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
