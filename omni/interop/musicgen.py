"""MusicGen as transformers keeps it: the whole model, or its decoder alone. Checked against transformers 5.23.0."""

from __future__ import annotations

import json
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from etils import epath

import omni_tokenizers
from omni.music import MusicConfig, MusicDecoder
from omni_tokenizers import weights
from omni_tokenizers.base import CHECKPOINT_CONFIG, LARGEST_CHECKPOINT_CONFIG, NetTokenizer, read_object
from omni_tokenizers.checkpoints.family import Settings
from omni_tokenizers.errors import OmniError
from omni_tokenizers.tensor_files import open_directory, write_directory

WHOLE, DECODER = "musicgen", "musicgen_decoder"
_CODEC, _TEXT = "audio_encoder.", "text_encoder."
_SIZES = {
    "vocab_size": "codes",
    "num_codebooks": "codebooks",
    "audio_channels": "channels",
    "num_hidden_layers": "depth",
    "hidden_size": "dim",
    "num_attention_heads": "heads",
    "ffn_dim": "mlp_dim",
}
_LAYER = {
    "query": "self_attn.q_proj.weight",
    "key": "self_attn.k_proj.weight",
    "value": "self_attn.v_proj.weight",
    "output": "self_attn.out_proj.weight",
    "norm": "self_attn_layer_norm.weight",
    "norm_bias": "self_attn_layer_norm.bias",
    "source_query": "encoder_attn.q_proj.weight",
    "source_key": "encoder_attn.k_proj.weight",
    "source_value": "encoder_attn.v_proj.weight",
    "source_output": "encoder_attn.out_proj.weight",
    "source_norm": "encoder_attn_layer_norm.weight",
    "source_norm_bias": "encoder_attn_layer_norm.bias",
    "up": "fc1.weight",
    "down": "fc2.weight",
    "mlp_norm": "final_layer_norm.weight",
    "mlp_norm_bias": "final_layer_norm.bias",
}
_PROJECTION = {"projection": "enc_to_dec_proj.weight", "projection_bias": "enc_to_dec_proj.bias"}


def load(directory: epath.PathLike) -> tuple[MusicDecoder, NetTokenizer | None]:
    """The decoder in a directory, float32, and the codec that lies with it.

    Raises:
      OmniError: another model, settings that are not supported, or files that are missing or damaged.
    """
    path = epath.Path(directory) / CHECKPOINT_CONFIG
    if not path.exists():
        raise OmniError(f"{directory}: no {CHECKPOINT_CONFIG} there, so this is not a directory of transformers")
    settings = Settings(read_object(path, LARGEST_CHECKPOINT_CONFIG), str(path))
    kind = settings.values.get("model_type")
    if kind not in (WHOLE, DECODER):
        raise OmniError(f"{path}: a model of type {kind!r} is no MusicGen, which has {WHOLE!r} or {DECODER!r}")
    whole = kind == WHOLE
    config = read_config(settings.section("decoder") if whole else settings)
    prefix = "decoder." if whole else ""
    tensors = open_directory(directory, lambda name: not name.startswith((_CODEC, _TEXT)))
    width = tensors.shape(_PROJECTION["projection"])[-1] if _PROJECTION["projection"] in tensors else None
    if config.depth * config.codebooks > len(tensors) ** 2:  # before as many names are made as config.json may ask for
        raise OmniError(f"{directory}: {len(tensors)} tensors are too few for what config.json has: {config}")
    wanted = their_shapes(config, prefix, width)
    ignored = {name for name in tensors if name.endswith("embed_positions.weights")}
    weights.require_names(set(tensors) - ignored, wanted.keys(), str(directory))

    def read(name: str) -> np.ndarray:
        if tensors.shape(name) != wanted[name]:
            shapes = f"{list(tensors.shape(name))}, config.json needs {list(wanted[name])}"
            raise OmniError(f"{directory}: tensor {name!r} has the shape {shapes}")
        value = tensors[name]
        if not np.isfinite(value).all():
            raise OmniError(f"{directory}: tensor {name!r} holds values that are not finite; the file is damaged")
        return value

    codec = omni_tokenizers.load(directory) if whole else None
    return _decoder(config, {name: read(name) for name in wanted}, prefix), codec


def read_config(settings: Settings) -> MusicConfig:
    """The decoder's shape from its configuration; `OmniError` for what is not computed here."""
    settings.require("activation_function", "gelu")
    settings.require("scale_embedding", False)
    defaults = MusicConfig()
    config = {ours: settings.get(theirs, getattr(defaults, ours)) for theirs, ours in _SIZES.items()}
    for name in ("pad_token_id", "bos_token_id"):
        if settings.get(name, config["codes"]) != config["codes"]:
            raise OmniError(f"{settings.source}: {name} must be {config['codes']}, the id behind all codes")
    try:
        return MusicConfig(**config)
    except OmniError as error:
        raise OmniError(f"{settings.source}: {error}") from None


def their_shapes(config: MusicConfig, prefix: str, width: int | None = None) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor; `width` is that of states which are projected."""
    dim, within = config.dim, f"{prefix}model.decoder."
    shapes = {"up": (config.mlp_dim, dim), "down": (dim, config.mlp_dim)}
    names = {f"{within}layer_norm.{name}": (dim,) for name in ("weight", "bias")}
    for book in range(config.codebooks):
        names[f"{within}embed_tokens.{book}.weight"] = (config.codes + 1, dim)
        names[f"{prefix}lm_heads.{book}.weight"] = (config.codes, dim)
    for layer in range(config.depth):
        for ours, theirs in _LAYER.items():
            shape = shapes.get(ours, (dim,) if "norm" in ours else (dim, dim))
            names[f"{within}layers.{layer}.{theirs}"] = shape
    if width is not None:
        names |= {_PROJECTION["projection"]: (dim, width), _PROJECTION["projection_bias"]: (dim,)}
    return names


def _decoder(config: MusicConfig, tensors: Mapping[str, np.ndarray], prefix: str) -> MusicDecoder:
    within, books = f"{prefix}model.decoder.", range(config.codebooks)

    def ours(name: str) -> jnp.ndarray:
        return jnp.asarray(tensors[name].T)  # vectors are their own

    layers = [
        {name: ours(f"{within}layers.{layer}.{theirs}") for name, theirs in _LAYER.items()}
        for layer in range(config.depth)
    ]
    return MusicDecoder(
        config,
        jnp.stack([tensors[f"{within}embed_tokens.{book}.weight"] for book in books]),
        layers,
        ours(f"{within}layer_norm.weight"),
        ours(f"{within}layer_norm.bias"),
        jnp.stack([ours(f"{prefix}lm_heads.{book}.weight") for book in books]),
        **{name: ours(theirs) if theirs in tensors else None for name, theirs in _PROJECTION.items()},
    )


def export(decoder: MusicDecoder, directory: epath.PathLike) -> None:
    """Writes what transformers loads as `MusicgenForCausalLM`; `OmniError` for a decoder that projects its states."""
    if decoder.projection is not None:
        raise OmniError("this decoder projects the states that it is given, and MusicgenForCausalLM does not")
    config, directory = decoder.config, epath.Path(directory)
    shapes = their_shapes(config, "")
    tensors = {"model.decoder.layer_norm.weight": decoder.norm, "model.decoder.layer_norm.bias": decoder.norm_bias}
    for book in range(config.codebooks):
        tensors[f"model.decoder.embed_tokens.{book}.weight"] = decoder.embedding[book]
        tensors[f"lm_heads.{book}.weight"] = decoder.heads[book].T
    for number, layer in enumerate(decoder.layers):
        tensors |= {f"model.decoder.layers.{number}.{_LAYER[name]}": value.T for name, value in layer.items()}
    write_directory(directory, shapes, ((name, np.asarray(tensors[name])) for name in shapes), "float32")
    values = {theirs: getattr(config, ours) for theirs, ours in _SIZES.items()}
    ends = dict.fromkeys(("pad_token_id", "bos_token_id"), config.codes)
    values |= {"model_type": DECODER, "architectures": ["MusicgenForCausalLM"], "activation_function": "gelu", **ends}
    (directory / CHECKPOINT_CONFIG).write_text(json.dumps(values | {"dtype": "float32"}, indent=2) + "\n")
