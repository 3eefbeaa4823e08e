"""Public checkpoints as tokenizers: which family a directory or a file holds, and where in it the tokenizer lies."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pickle
import re
import zipfile
from typing import Any

import numpy as np
from etils import epath

from omni_tokenizers import weights
from omni_tokenizers.base import CHECKPOINT_CONFIG, LARGEST_CHECKPOINT_CONFIG, NetTokenizer, read_object
from omni_tokenizers.errors import OmniError, UsageError
from omni_tokenizers.tensor_files import MODEL, open_directory


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tokenizer lies in a checkpoint of transformers."""

    reader: str
    """module:function that makes a tokenizer of a configuration, tensors without prefix, and their source's name."""
    section: str | None = None
    """Key in config.json of the tokenizer's configuration; None where config.json is it."""
    prefixes: tuple[str, ...] = ("",)
    """What the tokenizer's tensors may all begin with; the first that occurs counts."""


_CHAMELEON = "omni_tokenizers.checkpoints.vqgan:from_chameleon"
_JANUS = "omni_tokenizers.checkpoints.vqgan:from_janus"
_EMU3 = "omni_tokenizers.checkpoints.emu3:from_transformers"
# "model_type" in config.json -> where its tokenizer is.
PLACES = {
    "encodec": Place(f"{__name__}.encodec:from_transformers"),
    "musicgen": Place(f"{__name__}.encodec:from_transformers", "audio_encoder", ("audio_encoder.",)),
    "dac": Place(f"{__name__}.dac:from_transformers"),
    "mimi": Place(f"{__name__}.mimi:from_transformers"),
    "chameleon": Place(_CHAMELEON, "vq_config", ("model.vqmodel.",)),
    "chameleon_vqgan": Place(_CHAMELEON),
    "janus": Place(_JANUS, "vq_config", ("model.vqmodel.",)),
    "janus_vqgan": Place(_JANUS),
    "emu3": Place(_EMU3, "vq_config", ("vqmodel.", "model.vqmodel.")),
    "emu3_vqgan": Place(_EMU3),
    "Emu3VisionVQ": Place(f"{__name__}.emu3:from_original"),
}


def load_checkpoint(directory: epath.PathLike) -> NetTokenizer:
    """The tokenizer in a directory that transformers wrote: a tokenizer alone or a whole model with one inside.

    Of the weights only the tokenizer's are read.

    Raises:
        OmniError: an unknown kind of model, or files that are damaged or do not belong together.
    """
    directory = epath.Path(directory)
    path = directory / CHECKPOINT_CONFIG
    if not path.exists():
        raise OmniError(f"{directory}: no {CHECKPOINT_CONFIG} there, so this is not a directory of transformers")
    values = read_object(path, LARGEST_CHECKPOINT_CONFIG)
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in PLACES:
        raise OmniError(f"{path}: no tokenizer is known in a model of type {kind!r}, but in {', '.join(PLACES)}")
    place = PLACES[kind]
    if place.section is not None:
        values = values.get(place.section) or {}
        if not isinstance(values, dict):
            raise OmniError(f"{path}: {place.section} must be a JSON object, found {type(values).__name__}")
    tensors = next(filter(None, (read_prefixed(directory, prefix) for prefix in place.prefixes)), None)
    if tensors is None:
        known = " or ".join(map(repr, place.prefixes))
        raise OmniError(f"{directory}: no tensor's name begins with {known}, so there is no tokenizer inside")
    return _imported(place.reader)(values, tensors, str(directory))


def import_checkpoint(
    path: epath.PathLike, *, image_size: int | None = None, torch_reader: bool = False
) -> NetTokenizer:
    """The tokenizer in a public checkpoint; `save` writes it in this package's own format.

    Args:
        path: a directory that transformers wrote, or a file of weights as taming-transformers (such as Chameleon's
            vqgan.ckpt) or LlamaGen wrote it: PyTorch's format or safetensors.
        image_size: height and width that a net from a file is meant for, which no file says (default 256).
        torch_reader: whether to read a file in PyTorch's format, which is a pickle, with torch's weights_only reader.
    Raises:
        OmniError: not a checkpoint of a known family, damaged, or a pickle whose reader was not asked for.
    """
    path = epath.Path(path)
    if path.is_dir():
        if image_size is not None:
            raise UsageError(f"{path}: image_size is for single files; here {CHECKPOINT_CONFIG} says it")
        return load_checkpoint(path)
    if not path.exists():
        raise OmniError(f"{path}: there is no such file or directory")
    if path.suffix == ".safetensors":
        tensors = weights.read(path)
    elif torch_reader:
        tensors = read_torch(path)
    else:
        raise OmniError(
            f"{path}: no safetensors file; if it is one of PyTorch, which is a pickle, ask for torch's weights_only "
            "reader, which takes tensors alone: omni import --torch-reader, or torch_reader=True"
        )
    reader = _imported("omni_tokenizers.checkpoints.vqgan:from_original")
    return reader(tensors, 256 if image_size is None else image_size, str(path))


def export_checkpoint(tokenizer: NetTokenizer, directory: epath.PathLike) -> None:
    """Writes config.json and model.safetensors that transformers loads; `load` reads back an equal tokenizer.

    Raises:
        OmniError: transformers has no such model.
    """
    exporters = {kind: f"{__name__}.{kind}:to_transformers" for kind in ("vqgan", "emu3", "encodec", "dac", "mimi")}
    if tokenizer.type not in exporters:
        raise OmniError(f"transformers has no tokenizer like {tokenizer.type}; {', '.join(exporters)} can be exported")
    if getattr(tokenizer.config, "quantizer", None) is not None:
        raise OmniError(f"transformers has no {tokenizer.type} with a {tokenizer.config.quantizer.kind} quantizer")
    values, tensors = _imported(exporters[tokenizer.type])(tokenizer)
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights.write(directory / MODEL, tensors, {"format": "pt"})
    (directory / CHECKPOINT_CONFIG).write_text(json.dumps(values | {"dtype": "float32"}, indent=2) + "\n")


def read_prefixed(directory: epath.Path, prefix: str) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint, in one file or several, whose names begin with `prefix`, which is taken off.

    Raises:
        OmniError: no weights there, or damaged files.
    """
    tensors = open_directory(directory, lambda name: name.startswith(prefix))
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


def read_torch(path: epath.PathLike) -> dict[str, np.ndarray]:
    """The weights in a file of PyTorch, floating point ones as float32; nothing in the file is executed.

    Of a training's checkpoint these are the averaged weights ("ema") if there are any, else "model" or "state_dict".

    Raises:
        OmniError: no torch to read with, no such file, a damaged one, or one that holds more than plain weights.
    """
    tensors = open_torch(path).items()
    return {name: (value.float() if value.is_floating_point() else value).numpy() for name, value in tensors}


def open_torch(path: epath.PathLike) -> dict[str, Any]:
    """The tensors of `read_torch` as PyTorch's own; those of a file on a disk are mapped, so read when they are used.

    Raises:
        OmniError: as `read_torch`.
    """
    path = epath.Path(path)
    try:
        import torch
    except ImportError:
        raise OmniError(f"{path}: PyTorch's files need torch: pip install 'omni-any-to-any[torch]'") from None
    try:
        with path.open("rb") as file:
            mapped = zipfile.is_zipfile(file) and "://" not in os.fspath(path)
            file.seek(0)
            source = os.fspath(path) if mapped else file
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError:
        raise OmniError(f"{path}: there is no such file of weights") from None
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"needs {name[1]} to be run" if name else "is not one of plain weights"
        raise OmniError(
            f"{path}: refused, as unpickling this file {what}; where you trust it, load it in torch, and save its "
            "tensors alone (torch.save of the state_dict)"
        ) from None
    except (RuntimeError, ValueError, KeyError, EOFError, TypeError, AttributeError, IndexError) as error:
        raise OmniError(f"{path}: not a whole file of PyTorch ({str(error).splitlines()[0][:200]})") from None
    return _named(content, str(path))


def _named(content, source: str) -> dict[str, Any]:
    """What `torch.load` gave, as named tensors."""
    for key in ("ema", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content:
        raise OmniError(f"{source}: expected named tensors, found {type(content).__name__}")
    for name, value in content.items():
        if not hasattr(value, "is_floating_point"):
            raise OmniError(f"{source}: expected named tensors, but {name!r} is {type(value).__name__}")
    return {str(name): value.detach() for name, value in content.items()}


def _imported(reader: str):
    module, _, name = reader.partition(":")
    return getattr(importlib.import_module(module), name)
