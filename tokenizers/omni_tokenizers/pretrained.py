"""Directories as transformers writes them (config.json and model.safetensors), read and written.

Of each family of models it is known, for one configuration, which of its tensors is which of ours (`interop.Pair`).
Checked against transformers 5.23.0.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath
from flax import nnx

from omni_tokenizers import interop, weights
from omni_tokenizers.base import PRETRAINED, NetTokenizer, read_object
from omni_tokenizers.errors import OmniError

TENSORS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# "model_type" in config.json, which is the type of our tokenizer too -> the family.
FAMILIES = {
    "dac": "omni_tokenizers.pretrained_dac:DAC",
    "encodec": "omni_tokenizers.pretrained_encodec:ENCODEC",
    "mimi": "omni_tokenizers.pretrained_mimi:MIMI",
}


class Settings:
    """The values of a config.json, read with the defaults of transformers where it leaves them out."""

    def __init__(self, values: Mapping[str, Any], source: str):
        self.values, self.source = values, source

    def get(self, key: str, default: Any) -> Any:
        """The value of a key, of its default's type; lists become tuples, and null is the default.

        Raises:
            OmniError: of another type.
        """
        value = self.values.get(key)
        if value is None:
            return default
        items = value if isinstance(value, list | tuple) else [value]
        kind = type(default[0] if isinstance(default, tuple) else default)
        accepted = (int, float) if kind is float else (kind,)
        if isinstance(default, tuple) != isinstance(value, list | tuple) or any(type(x) not in accepted for x in items):
            raise OmniError(f"{self.source}: {key} = {value!r} is not of the type of {default!r}")
        return tuple(map(kind, items)) if isinstance(default, tuple) else kind(value)

    def require(self, key: str, value: Any, default: Any = None) -> None:
        """An OmniError if a key has a value (or, where it is missing, a default) other than the one that is known."""
        found = self.get(key, value if default is None else default)
        if found != value:
            raise OmniError(f"{self.source}: {key} = {found!r} is not supported here, only {value!r}")


@dataclasses.dataclass(frozen=True)
class Family:
    """How the directories of one model_type relate to a tokenizer here."""

    tokenizer: type[NetTokenizer]
    """The class of tokenizer."""
    read: Callable[[Settings], Any]
    """The tokenizer's configuration from a config.json."""
    write: Callable[[Any], dict[str, Any]]
    """The content of a config.json from the tokenizer's configuration, model_type included."""
    pairs: Callable[[Any], list[interop.Pair]]
    """Which tensor is which, for a configuration."""
    ignored: tuple[str, ...] = ()
    """Ends of the names of tensors that carry nothing: constants and training statistics."""
    complete: Callable[[Any, dict[str, np.ndarray]], dict[str, np.ndarray]] = lambda config, tensors: tensors
    """The tensors to write, from those of `pairs`: weight norms split, and what is ignored added."""

    def state(self, config, tensors: Mapping[str, np.ndarray], source: str) -> nnx.State:
        """The net's state for a configuration, filled with a checkpoint's tensors; errors as in `interop.to_state`."""
        ignored = [name for name in tensors if name.endswith(self.ignored)]
        return interop.to_state(self.abstract_net(config), tensors, self.pairs(config), source, ignored=ignored)

    def abstract_net(self, config) -> nnx.Module:
        """The net with shapes in place of arrays: a description that asks for a huge one fails on a tensor first."""
        return nnx.eval_shape(lambda: self.tokenizer.net_class(config, rngs=nnx.Rngs(0)))


def load(directory: epath.Path) -> NetTokenizer:
    """The tokenizer of a directory that transformers wrote.

    Raises:
        OmniError: an unknown model_type, a setting that is not supported, or tensors that do not fit it.
    """
    directory = epath.Path(directory)
    path = directory / PRETRAINED
    values = read_object(path)
    family = find_family(values.get("model_type"), str(path))
    try:
        config = family.read(Settings(values, str(path)))
    except OmniError as error:
        raise OmniError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None
    state = family.state(config, *_read_tensors(directory))
    return family.tokenizer(config, nnx.merge(nnx.graphdef(family.abstract_net(config)), state))


def export_transformers(tokenizer: NetTokenizer, directory: epath.PathLike) -> None:
    """Writes config.json and model.safetensors, from which transformers' from_pretrained makes the same model.

    Raises:
        OmniError: transformers has no such model.
    """
    if tokenizer.type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise OmniError(f"transformers has no model like a tokenizer of type {tokenizer.type!r}; it has {known}")
    family = find_family(tokenizer.type, str(directory))
    tensors = interop.from_state(tokenizer.state, family.pairs(tokenizer.config))
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # transformers refuses files that do not name their framework.
    weights.write(directory / TENSORS, family.complete(tokenizer.config, tensors), {"format": "pt"})
    (directory / PRETRAINED).write_text(json.dumps(family.write(tokenizer.config), indent=2) + "\n")


def find_family(name: Any, source: str) -> Family:
    """The family of a model_type, or an OmniError that lists the known ones."""
    if not isinstance(name, str) or name not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise OmniError(f"{source}: unknown model_type {name!r}; known ones are {known}")
    module, _, family = FAMILIES[name].partition(":")
    return getattr(importlib.import_module(module), family)


def _read_tensors(directory: epath.Path) -> tuple[dict[str, np.ndarray], str]:
    """All tensors of a directory, from one file or from the shards that an index names, and what to call them."""
    index = directory / INDEX
    if (directory / TENSORS).exists() or not index.exists():
        return weights.read(directory / TENSORS), str(directory / TENSORS)
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(_is_file_name(place) for place in places.values()):
        raise OmniError(f"{index}: 'weight_map' must give a file in the same directory for each tensor")
    tensors = {}
    for name in sorted(set(places.values())):
        tensors |= weights.read(directory / name)
    return tensors, str(index)


def _is_file_name(place: Any) -> bool:
    return isinstance(place, str) and place.endswith(".safetensors") and not {"/", "\\"} & set(place)
