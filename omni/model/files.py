"""The transformer's files: model.json (its configuration) and weights.safetensors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

from etils import epath
from flax import nnx

from omni.model.config import TransformerConfig
from omni.model.transformer import Transformer
from omni_tokenizers import weights
from omni_tokenizers.base import config_from_dict
from omni_tokenizers.errors import OmniError

DESCRIPTION, WEIGHTS = "model.json", "weights.safetensors"
FORMAT = 1


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
    weights.write(directory / WEIGHTS, weights.rounded(weights.flatten(nnx.state(model, nnx.Param)), dtype))
    description = {
        "format": FORMAT,
        "context_length": context_length,
        "belongs_to": dict(belongs_to),
        "transformer": dataclasses.asdict(model.config),
    }
    (directory / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")


def load_transformer(directory: epath.PathLike) -> tuple[Transformer, int, dict[str, str]]:
    """A transformer, its context length, and the hashes of what it belongs to (see `save_transformer`).

    Raises:
      OmniError: if a file is missing or damaged, or weights and configuration do not belong together.
    """
    directory = epath.Path(directory)
    config, context_length, belongs_to = _read_description(directory / DESCRIPTION)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    tensors = weights.read(directory / WEIGHTS)
    transformer = nnx.merge(graphdef, weights.unflatten(state, tensors, str(directory / WEIGHTS)))
    return transformer, context_length, belongs_to


def _read_description(path: epath.Path) -> tuple[TransformerConfig, int, dict[str, str]]:
    try:
        description = json.loads(path.read_text())
        if description["format"] != FORMAT:
            raise OmniError(f"{path}: format {description['format']!r}; this version reads {FORMAT}")
        config = config_from_dict(TransformerConfig, description["transformer"], str(path))
        return config, int(description["context_length"]), dict(description["belongs_to"])
    except FileNotFoundError:
        raise OmniError(f"{path}: no such file, so {path.parent} holds no model") from None
    except (ValueError, KeyError, TypeError) as error:
        raise OmniError(f"{path} does not describe a model: {type(error).__name__}: {error}") from None
