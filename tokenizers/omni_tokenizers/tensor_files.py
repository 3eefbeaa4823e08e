"""Tensors of large checkpoints, each read when it is asked for: one safetensors file, or several with an index."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from omni_tokenizers import weights
from omni_tokenizers.base import read_object
from omni_tokenizers.errors import OmniError

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 2_000_000_000
"""Of a file of a checkpoint in several, unless one tensor is larger."""
_LONGEST_HEADER = 100_000_000  # as the format's own reader has it
_LARGEST_INDEX = 1 << 24


@dataclass(frozen=True)
class _Entry:
    """Where a tensor's bytes lie."""

    path: epath.Path
    begin: int
    size: int
    header: Mapping[str, Any]


class TensorFiles(Mapping[str, np.ndarray]):
    """Tensors by name; floating point ones as float32. Only what is asked for is read, and nothing of it is kept."""

    def __init__(self, entries: Mapping[str, _Entry], source: str):
        self._entries, self.source = entries, source

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        try:
            with entry.path.open("rb") as file:
                file.seek(entry.begin)
                return weights.as_array(entry.path, name, {**entry.header, "data": file.read(entry.size)})
        except OSError:
            raise OmniError(f"{entry.path}: there is no such file of weights") from None
        except ValueError as error:
            raise OmniError(f"{entry.path}: not a whole safetensors file ({error})") from None

    def __contains__(self, name: object) -> bool:  # a Mapping's own would read the tensor
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, which is known without reading it."""
        return tuple(self._entries[name].header["shape"])


def open_file(path: epath.PathLike) -> TensorFiles:
    """The tensors of one safetensors file, of which the header is read.

    Raises:
        OmniError: no such file, or not a whole safetensors file.
    """
    path = epath.Path(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, _LONGEST_HEADER)))
        header.pop("__metadata__", None)
        size = path.stat().length - 8 - length
        entries = {name: _entry(path, 8 + length, size, name, found) for name, found in header.items()}
    except OSError:
        raise OmniError(f"{path}: there is no such file of weights") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise OmniError(f"{path}: not a whole safetensors file ({error})") from None
    return TensorFiles(entries, str(path))


def _entry(path: epath.Path, start: int, size: int, name: str, header: Mapping[str, Any]) -> _Entry:
    begin, end = header["data_offsets"]
    shape = header["shape"]
    if not all(type(number) is int for number in (begin, end, *shape)) or min(shape, default=0) < 0:
        raise ValueError(f"tensor {name!r} has a shape or a place that is not made of whole numbers")
    if not isinstance(header["dtype"], str):
        raise ValueError(f"tensor {name!r} has the type {header['dtype']!r}")
    if not 0 <= begin <= end <= size:
        raise ValueError(f"tensor {name!r} lies at bytes {begin} to {end} of {size}")
    return _Entry(path, start + begin, end - begin, header)


def open_directory(directory: epath.PathLike, wanted: Callable[[str], bool] = lambda name: True) -> TensorFiles:
    """The tensors of a checkpoint's directory: model.safetensors, or the files that its index names.

    Args:
        wanted: says by its name whether a tensor is needed; files without any such are not opened.
    Raises:
        OmniError: no weights there, a file that the index names is missing or lies elsewhere, or a damaged file.
    """
    directory = epath.Path(directory)
    index = directory / INDEX
    if not index.exists():
        return _only(open_file(directory / MODEL), wanted, str(directory))
    places = read_object(index, _LARGEST_INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(_is_file_name(file) for file in places.values()):
        raise OmniError(f"{index}: 'weight_map' must give the name of a file beside it for each tensor")
    files = sorted({file for name, file in places.items() if wanted(name)})
    if missing := [file for file in files if not (directory / file).exists()]:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise OmniError(f"{directory / missing[0]}: there is no such file of weights, which {INDEX} names{more}")
    opened = {file: open_file(directory / file) for file in files}
    for name, file in places.items():
        if file in opened and name not in opened[file]:
            raise OmniError(f"{directory / file}: has no tensor {name!r}, which {INDEX} says it has")
    entries = {name: entry for file in opened.values() for name, entry in file._entries.items()}
    entries |= {name: opened[file]._entries[name] for name, file in places.items() if file in opened}
    return _only(TensorFiles(entries, str(directory)), wanted, str(directory))


def _only(tensors: TensorFiles, wanted: Callable[[str], bool], source: str) -> TensorFiles:
    return TensorFiles({name: entry for name, entry in tensors._entries.items() if wanted(name)}, source)


def _is_file_name(value) -> bool:
    return isinstance(value, str) and value not in ("", ".", "..") and "/" not in value and "\\" not in value


def write_file(
    path: epath.PathLike, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[tuple[str, np.ndarray]], dtype: str
) -> None:
    """Writes floating point tensors as one safetensors file, of which one is in memory at a time.

    Args:
        shapes: the shape of each tensor, in the order in which `tensors` gives them.
        dtype: type in which they are stored: float32, float16 or bfloat16.
    Raises:
        OmniError: another type, or a value that does not fit it.
    """
    weights.rounded({}, dtype)  # before anything is written
    width, kind = {"float32": (4, "F32"), "float16": (2, "F16"), "bfloat16": (2, "BF16")}[dtype]
    ends = list(itertools.accumulate(math.prod(shape) * width for shape in shapes.values()))
    places = zip([0, *ends[:-1]], ends, strict=True)
    header = {
        name: {"dtype": kind, "shape": list(shape), "data_offsets": place}
        for (name, shape), place in zip(shapes.items(), places, strict=True)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that tensors begin at a multiple of 8 bytes
    path = epath.Path(path)
    partial = path.with_name(f"{path.name}.partial")  # what was there before stays until all of this is written
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, shape), (given, value) in zip(shapes.items(), tensors, strict=True):
            if (given, value.shape) != (name, shape):
                raise ValueError(f"{given!r} {value.shape} comes where {name!r} {shape} was said to")
            stored = weights.rounded({name: value}, dtype)[name]
            file.write(np.ascontiguousarray(stored).reshape(-1).view(np.uint8).data)
    partial.replace(path)


def write_directory(
    directory: epath.PathLike,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, np.ndarray]],
    dtype: str,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes named tensors as `open_directory` reads them; of these only one file's are in memory at a time.

    Args:
        shapes: the shape of each tensor, in the order in which `tensors` gives them.
        dtype: type in which they are stored: float32, float16 or bfloat16.
    Raises:
        OmniError: a value that does not fit the type.
    """
    directory, tensors = epath.Path(directory), iter(tensors)
    directory.mkdir(parents=True, exist_ok=True)
    groups = _groups(shapes, 4 if dtype == "float32" else 2, shard_bytes)
    for name in (INDEX, MODEL):  # of what was there before; transformers reads the second first
        (directory / name).unlink(missing_ok=True)
    names = [f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    for name, group in zip([MODEL] if len(groups) == 1 else names, groups, strict=True):
        held = dict(itertools.islice(tensors, len(group)))
        weights.write(directory / name, weights.rounded(held, dtype), {"format": "pt"})
    if len(groups) > 1:
        places = {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group}
        size = sum(math.prod(shape) for shape in shapes.values()) * (4 if dtype == "float32" else 2)
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _groups(shapes: Mapping[str, tuple[int, ...]], width: int, most: int) -> list[list[str]]:
    """Names in order, divided into groups of at most `most` bytes of `width` bytes a number."""
    groups, room = [[]], most
    for name, shape in shapes.items():
        size = math.prod(shape) * width
        if groups[-1] and size > room:
            groups.append([])
            room = most
        groups[-1].append(name)
        room -= size
    return groups
