"""The transformer's files: model.json (its configuration) and weights.safetensors."""

from __future__ import annotations

import dataclasses
import json

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
    directory: epath.PathLike, model: Transformer, *, context_length: int, dtype: str = "float32"
) -> None:
    """Writes a transformer.

    Args:
      context_length: most tokens that the model was made to read.
      dtype: type in which weights are stored: float32, float16 or bfloat16.
    """
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights.write(directory / WEIGHTS, weights.rounded(weights.flatten(nnx.state(model, nnx.Param)), dtype))
    description = {
        "format": FORMAT,
        "context_length": context_length,
        "transformer": dataclasses.asdict(model.config),
    }
    (directory / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")


def load_transformer(directory: epath.PathLike) -> tuple[Transformer, int]:
    """A transformer and its context length.

    Raises:
      OmniError: if a file is missing or damaged, or weights and configuration do not belong together.
    """
    directory = epath.Path(directory)
    config, context_length = _read_description(directory / DESCRIPTION)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    tensors = weights.read(directory / WEIGHTS)
    return nnx.merge(graphdef, weights.unflatten(state, tensors, str(directory / WEIGHTS))), context_length


def _read_description(path: epath.Path) -> tuple[TransformerConfig, int]:
    try:
        description = json.loads(path.read_text())
        if description["format"] != FORMAT:
            raise OmniError(f"{path}: format {description['format']!r}; this version reads {FORMAT}")
        return config_from_dict(TransformerConfig, description["transformer"], str(path)), int(
            description["context_length"]
        )
    except FileNotFoundError:
        raise OmniError(f"{path}: no such file, so {path.parent} holds no model") from None
    except (ValueError, KeyError, TypeError) as error:
        raise OmniError(f"{path} does not describe a model: {type(error).__name__}: {error}") from None
