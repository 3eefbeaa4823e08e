"""The interface of every tokenizer, and its directory: tokenizer.json and weights.safetensors."""

from __future__ import annotations

import abc
import dataclasses
import difflib
import hashlib
import importlib
import json
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Self

import jax
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Float

from omni_tokenizers import weights
from omni_tokenizers.codes import Codes
from omni_tokenizers.errors import OmniError

DESCRIPTION = "tokenizer.json"
WEIGHTS = "weights.safetensors"
CHECKPOINT_CONFIG = "config.json"
"""What a public checkpoint of transformers has; its tokenizer.json, if any, is of another kind."""
LARGEST_CHECKPOINT_CONFIG = 1 << 24  # Chameleon's config.json holds its vocabulary: 2 MB
_CHUNK = 256  # rows that go through a net together

# "type" in tokenizer.json -> where its class is; imported when a directory names it.
TYPES = {
    "image_vq": "omni_tokenizers.image:ImageTokenizer",
    "vqgan": "omni_tokenizers.vqgan:VQGANTokenizer",
    "audio_spectral": "omni_tokenizers.audio:AudioTokenizer",
    "dac": "omni_tokenizers.dac:DacTokenizer",
    "emu3": "omni_tokenizers.emu3:Emu3Tokenizer",
    "encodec": "omni_tokenizers.encodec:EncodecTokenizer",
    "mimi": "omni_tokenizers.mimi:MimiTokenizer",
    "video": "omni_tokenizers.video:VideoTokenizer",
    "text_json": "omni_tokenizers.text_json:JsonTextTokenizer",
    "text_pieces": "omni_tokenizers.text_pieces:PieceTextTokenizer",
    "text_sentencepiece": "omni_tokenizers.text:TextTokenizer",
}


class Tokenizer(abc.ABC):
    """Turns data of one modality into integer codes and back."""

    type: ClassVar[str]
    """Name in tokenizer.json, a key of `TYPES`."""
    modality: ClassVar[str]
    """"text", "image", "audio" or "video"."""
    codebook_sizes: tuple[int, ...]
    """Number of codes of each codebook."""
    hash: str
    """First 16 hex digits of SHA-256 over configuration and weights: codes of another hash mean something else."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({' + '.join(map(str, self.codebook_sizes))} codes, hash {self.hash})"

    @property
    def modalities(self) -> tuple[str, ...]:
        """All that it takes, its own modality first."""
        return (self.modality,)

    @abc.abstractmethod
    def encode(self, x) -> Any:
        """Codes of `x`."""

    @abc.abstractmethod
    def decode(self, codes) -> Any:
        """Data of codes (Codes or a bare integer array)."""

    def stream(self, rows: int = 1, **settings) -> Any:
        """What encodes and decodes by pieces, as `omni_tokenizers.streaming` describes it.

        Raises:
            OmniError: where codes do not follow the data in time.
        """
        raise OmniError(f"a tokenizer of type {self.type} cannot stream; causal tokenizers of sound and of video can")

    @abc.abstractmethod
    def save(self, directory: epath.PathLike) -> None:
        """Writes the tokenizer's directory."""

    @classmethod
    @abc.abstractmethod
    def from_directory(cls, directory: epath.Path, description: dict) -> Self:
        """Reads what `save` wrote; `description` is the content of tokenizer.json."""


class NetTokenizer(Tokenizer):
    """A tokenizer made of a frozen dataclass `config` and an nnx net built from it (image, audio and video).

    Subclasses set `config_class` and `net_class` (built as ``net_class(config, rngs=...)``) and prepare what they need
    after ``super().__init__(config, net)``.
    """

    config_class: ClassVar[type]
    net_class: ClassVar[type]

    def __init__(self, config, net: nnx.Module):
        self.config = config
        self.graphdef, self.state = nnx.split(nnx.clone(net))
        self.hash = fingerprint(config_to_dict(config), weights.flatten(self.state))
        self._rows: jax.sharding.NamedSharding | None = None

    def spread(self, rows: jax.sharding.NamedSharding) -> None:
        """Puts the weights on every device of a mesh, and from now on splits what is encoded and decoded along rows.

        Args:
            rows: the sharding of an array [batch, ...] over the devices, which are all of this process.
        """
        self._rows = rows
        self.state = jax.device_put(self.state, jax.sharding.NamedSharding(rows.mesh, jax.sharding.PartitionSpec()))

    @property
    def net(self) -> nnx.Module:
        """A copy of the net with its present weights."""
        return nnx.merge(self.graphdef, self.state, copy=True)

    @abc.abstractmethod
    def encode(self, x) -> Codes:
        """Codes of `x`."""

    @property
    @abc.abstractmethod
    def code_vectors(self) -> tuple[Float[np.ndarray, "codes code_dim"], ...]:
        """The vectors of each codebook's codes, float32."""

    def _in_chunks(self, function, *arrays: np.ndarray, rows: int = _CHUNK) -> Any:
        """Applies a jitted function of the state and arrays by chunks padded to powers of two: few shapes compile.

        A row must not depend on the other rows. The result is an array or a tuple of arrays, as the function gives it.

        Args:
            rows: the largest chunk of a device, a power of two.
        """
        results = []
        devices = 1 if self._rows is None else self._rows.num_devices
        rows *= devices
        for start in range(0, max(len(arrays[0]), 1), rows):
            chunks = [array[start : start + rows] for array in arrays]
            count = len(chunks[0])
            padding = devices * (1 << max(-(-count // devices) - 1, 0).bit_length()) - count
            padded = [np.pad(chunk, ((0, padding),) + ((0, 0),) * (chunk.ndim - 1)) for chunk in chunks]
            if self._rows is not None:
                padded = jax.device_put(padded, self._rows)
            results.append(jax.tree.map(lambda x, count=count: np.asarray(x)[:count], function(self.state, *padded)))
        return jax.tree.map(lambda *parts: np.concatenate(parts), *results)

    def save(self, directory: epath.PathLike, *, dtype: str = "float32") -> None:
        """Writes tokenizer.json and weights.safetensors; `dtype` is how parameters (not codebooks) are stored."""
        tensors = weights.flatten(self.state)
        parameters = weights.flatten(nnx.filter_state(self.state, nnx.Param))
        tensors |= weights.rounded(parameters, dtype)
        config = config_to_dict(self.config)
        directory = epath.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        weights.write(directory / WEIGHTS, tensors)
        write_description(directory, {"type": self.type, "config": config, "hash": fingerprint(config, tensors)})

    @classmethod
    def from_directory(cls, directory: epath.Path, description: dict) -> Self:
        config = config_from_dict(cls.config_class, description.get("config"), str(directory / DESCRIPTION))
        tensors = weights.read(directory / WEIGHTS)
        # Shapes only: a description asking for a huge net fails on the first tensor, not on memory.
        abstract = nnx.eval_shape(lambda: cls.net_class(config, rngs=nnx.Rngs(0)))
        graphdef, state = nnx.split(abstract)
        state = weights.unflatten(state, tensors, str(directory / WEIGHTS))
        return cls(config, nnx.merge(graphdef, state))


def load(directory: epath.PathLike) -> Tokenizer:
    """Opens the tokenizer saved in `directory`, of whichever type, or the one in a public checkpoint's directory.

    Raises:
        OmniError: no tokenizer there, an unknown type, or files that are damaged or do not belong together.
    """
    directory = epath.Path(directory)
    if is_checkpoint(directory) or (
        not (directory / DESCRIPTION).exists() and (directory / CHECKPOINT_CONFIG).exists()
    ):
        checkpoints = importlib.import_module("omni_tokenizers.checkpoints")
        return checkpoints.load_checkpoint(directory)
    description = read_description(directory)
    kind = description.get("type")
    if not isinstance(kind, str) or kind not in TYPES:
        known = ", ".join(sorted(TYPES))
        raise OmniError(f"{directory / DESCRIPTION}: unknown tokenizer type {kind!r}; known types are {known}")
    module, _, name = TYPES[kind].partition(":")
    tokenizer = getattr(importlib.import_module(module), name).from_directory(directory, description)
    if tokenizer.hash != description.get("hash"):
        raise OmniError(
            f"{directory}: weights and configuration have the hash {tokenizer.hash}, {DESCRIPTION} says "
            f"{description.get('hash')}; the files are damaged or of different tokenizers"
        )
    return tokenizer


def is_checkpoint(directory: epath.PathLike) -> bool:
    """Whether a directory's config.json is that of a public checkpoint; a run of this package has one of its own."""
    path = epath.Path(directory) / CHECKPOINT_CONFIG
    return path.exists() and "model_type" in read_object(path, LARGEST_CHECKPOINT_CONFIG)


def write_description(directory: epath.Path, description: dict) -> None:
    """Writes tokenizer.json."""
    (directory / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")


def read_description(directory: epath.Path) -> dict:
    """The content of tokenizer.json.

    Raises:
        OmniError: missing, too large, or not a JSON object.
    """
    path = directory / DESCRIPTION
    if not path.exists():
        raise OmniError(f"{directory}: no {DESCRIPTION} there, so this is not a saved tokenizer")
    return read_object(path)


def read_object(path: epath.Path, largest: int = 1 << 20) -> dict:
    """The JSON object in a file of at most `largest` bytes.

    Raises:
        OmniError: too large, or not a JSON object.
    """
    if path.stat().length > largest:
        raise OmniError(f"{path}: larger than {largest} bytes, so not the description it should be")
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise OmniError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise OmniError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def fingerprint(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> str:
    """First 16 hex digits of SHA-256 over a configuration and named arrays (floating point ones as float32)."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        value = value if value.dtype.kind in "biu" else value.astype(np.float32)
        digest.update(f"\n{name} {value.dtype.str} {list(value.shape)}\n".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()[:16]


def config_to_dict(config) -> dict[str, Any]:
    """A configuration dataclass as JSON values. Settings that are None are left out: one that comes later, and is None
    by default, changes neither the description nor the hash of what was made without it."""
    return dataclasses.asdict(
        config, dict_factory=lambda items: {key: value for key, value in items if value is not None}
    )


def config_from_dict(cls: type, values: Any, source: str, name: str = "config"):
    """A configuration dataclass from JSON values; lists become tuples, objects the configurations they stand for.

    Args:
        source: where the values are from, for messages.
        name: what they are called there.
    Raises:
        OmniError: not an object, an unknown key or kind (the nearest is named), or a value of another type.
    """
    if not isinstance(values, dict):
        raise OmniError(f"{source}: {name!r} must be a JSON object, found {type(values).__name__}")
    hints, settings = typing.get_type_hints(cls), {}
    for key, value in values.items():
        if key not in hints:
            raise OmniError(f"{source}: unknown key {key!r} in {name!r}{_nearest(key, hints)}")
        if (inner := _inner_class(hints[key], value, source, f"{name}.{key}")) is not None:
            settings[key] = config_from_dict(inner, value, source, f"{name}.{key}")
        elif _fits(value, hints[key]):
            settings[key] = tuple(value) if isinstance(value, list) else value
        else:
            raise OmniError(f"{source}: {name!r} has {key} = {value!r}, which is not of the type {hints[key]}")
    try:
        return cls(**settings)
    except OmniError as error:
        raise OmniError(f"{source}: {error}") from None


def _inner_class(hint: Any, value: Any, source: str, name: str) -> type | None:
    """The dataclass among `hint` that a JSON object stands for: the only one, or the one whose `kind` it names."""
    classes = [each for each in (typing.get_args(hint) or (hint,)) if dataclasses.is_dataclass(each)]
    if not classes or not isinstance(value, dict):
        return None
    if len(classes) == 1:
        return classes[0]
    kinds, kind = {each.kind: each for each in classes}, value.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise OmniError(f"{source}: unknown kind {kind!r} of {name!r}{_nearest(str(kind), kinds)}")
    return kinds[kind]


def _nearest(key: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(key, known, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"


def _fits(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is tuple:
        return isinstance(value, list) and all(_fits(item, typing.get_args(hint)[0]) for item in value)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in typing.get_args(hint))
    if hint is float:
        return type(value) in (int, float)
    if isinstance(hint, type):
        return type(value) is hint
    return True
