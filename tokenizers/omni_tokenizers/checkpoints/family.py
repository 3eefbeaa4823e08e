"""Families of codecs whose tensors transformers names one by one.

Of each family of models it is known, for one configuration, which of its tensors is which of ours (`interop.Pair`).
Checked against transformers 5.23.0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from omni_tokenizers.base import NetTokenizer
from omni_tokenizers.checkpoints import interop
from omni_tokenizers.errors import OmniError


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
        try:
            return tuple(map(kind, items)) if isinstance(default, tuple) else kind(value)
        except OverflowError:
            raise OmniError(f"{self.source}: {key} is larger than any number of its kind") from None

    def section(self, key: str) -> Settings:
        """The object under a key; empty where it is missing or null.

        Raises:
            OmniError: it is no object.
        """
        values = self.values.get(key)
        if not isinstance(values, dict | None):
            raise OmniError(f"{self.source}: {key} must be a JSON object, found {type(values).__name__}")
        return Settings(values or {}, f"{self.source}: {key}")

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

    def from_transformers(
        self, values: Mapping[str, Any], tensors: Mapping[str, np.ndarray], source: str
    ) -> NetTokenizer:
        """The tokenizer of a config.json and the tensors beside it.

        Raises:
            OmniError: a setting that is not supported, or tensors that do not fit it.
        """
        try:
            config = self.read(Settings(values, source))
        except OmniError as error:
            raise OmniError(str(error) if str(error).startswith(source) else f"{source}: {error}") from None
        # Shapes in place of arrays: a description that asks for a huge net fails on a tensor first.
        net = nnx.eval_shape(lambda: self.tokenizer.net_class(config, rngs=nnx.Rngs(0)))
        ignored = [name for name in tensors if name.endswith(self.ignored)]
        state = interop.to_state(net, tensors, self.pairs(config), source, ignored=ignored)
        return self.tokenizer(config, nnx.merge(nnx.graphdef(net), state))

    def to_transformers(self, tokenizer: NetTokenizer) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The content of config.json, and the tensors, from which transformers makes the same model."""
        tensors = interop.from_state(tokenizer.state, self.pairs(tokenizer.config))
        return self.write(tokenizer.config), self.complete(tokenizer.config, tensors)
