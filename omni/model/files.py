"""The transformer's files: model.json (its configuration) and weights.safetensors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from omni.model.config import TransformerConfig
from omni.model.transformer import Transformer
from omni.sharding import ShardingRules, named_sharding, placed
from omni_tokenizers import weights
from omni_tokenizers.base import config_from_dict
from omni_tokenizers.errors import OmniError
from omni_tokenizers.tensor_files import open_file, write_file

DESCRIPTION, WEIGHTS = "model.json", "weights.safetensors"
FORMAT = 1
HOW_COMPUTED = ("attention", "attention_blocks", "remat", "saved", "offloaded")
"""Settings of a training that are no property of the model: they are not written, and not read from older files."""


def save_transformer(
    directory: epath.PathLike,
    model: Transformer,
    *,
    context_length: int,
    belongs_to: Mapping[str, str],
    dtype: str = "float32",
) -> None:
    """Writes a transformer.

    Args:
      context_length: most tokens that the model was made to read.
      belongs_to: hashes of the vocabulary, the grammar and the tokenizers that its ids come from, by name.
      dtype: type in which weights are stored: float32, float16 or bfloat16.
    """
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    parameters = {".".join(map(str, path)): each for path, each in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    shapes = {name: parameters[name].get_value().shape for name in sorted(parameters)}
    write_file(directory / WEIGHTS, shapes, ((name, np.asarray(parameters[name][...])) for name in shapes), dtype)
    description = {
        "format": FORMAT,
        "context_length": context_length,
        "belongs_to": dict(belongs_to),
        "transformer": settings_of_the_model(model.config),
    }
    (directory / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")


def settings_of_the_model(config: TransformerConfig) -> dict[str, Any]:
    """What a model is, as JSON: neither how its training was computed, nor settings of what it does not have."""
    left_out = [*HOW_COMPUTED, *(() if config.experts else ("experts", "experts_per_token"))]
    optional = ("expert_groups", "rope_scaling", "qk_norm_per_head", "code_nets", "vision")
    left_out += [name for name in optional if not getattr(config, name)]
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in left_out}


def load_transformer(directory: epath.PathLike, mesh: Mesh | None = None) -> tuple[Transformer, int, dict[str, str]]:
    """A transformer, its context length, and the hashes of what it belongs to (see `save_transformer`).

    Args:
      mesh: the devices over which its parameters are laid out by `ShardingRules`; None for one.

    Raises:
      OmniError: if a file is missing or damaged, or weights and configuration do not belong together.
    """
    directory = epath.Path(directory)
    config, context_length, belongs_to = _read_description(directory / DESCRIPTION)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    tensors, source = open_file(directory / WEIGHTS), str(directory / WEIGHTS)
    place = {} if mesh is None else {"place": partial(_on_mesh, mesh)}
    transformer = nnx.merge(graphdef, weights.unflatten(state, tensors, source, **place))
    return transformer, context_length, belongs_to


def read_config(directory: epath.PathLike) -> TransformerConfig:
    """The configuration of the transformer in a model's directory; `OmniError` if it describes none."""
    return _read_description(epath.Path(directory) / DESCRIPTION)[0]


def _on_mesh(mesh: Mesh, value: np.ndarray, parameter: nnx.Variable) -> jax.Array:
    """A parameter's value, of which every device is given its part alone."""
    axes = parameter.get_metadata()["axes"]
    return placed(value, named_sharding(axes, ShardingRules(), mesh, value.shape))


def _read_description(path: epath.Path) -> tuple[TransformerConfig, int, dict[str, str]]:
    try:
        description = json.loads(path.read_text())
        if description["format"] != FORMAT:
            raise OmniError(f"{path}: format {description['format']!r}; this version reads {FORMAT}")
        found = {name: value for name, value in description["transformer"].items() if name not in HOW_COMPUTED}
        config = config_from_dict(TransformerConfig, found, str(path))
        return config, int(description["context_length"]), dict(description["belongs_to"])
    except FileNotFoundError:
        raise OmniError(f"{path}: no such file, so {path.parent} holds no model") from None
    except (ValueError, KeyError, TypeError) as error:
        raise OmniError(f"{path} does not describe a model: {type(error).__name__}: {error}") from None
