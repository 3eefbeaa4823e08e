"""Janus and Janus-Pro (arXiv:2410.13848, arXiv:2501.17811): text, pictures that are drawn and pictures that are seen.

Codes of pictures are no ids of the published vocabulary: they have vectors, a perceptron and a head of their own
(`omni.model.code_nets`), and here the last ids. Pictures of a prompt go through a tower (`omni.model.vision`), whose
features stand in the places of `<image_placeholder>`. The tokenizer of pictures is whole in the weights. Checked
against transformers 5.23.0.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath
from PIL.Image import Resampling

import omni_tokenizers
from omni.image_processor import ImageProcessor
from omni.interop.family import (
    ADDED_TOKENS,
    Family,
    Place,
    Preset,
    control_ids,
    llama_lacks,
    llama_places,
    read_config,
    text_ids,
    with_new_ids,
    write_config,
)
from omni.model import CodeNetsConfig, TransformerConfig, VisionConfig
from omni.vocabulary import Vocabulary
from omni_tokenizers.checkpoints.family import Settings
from omni_tokenizers.checkpoints.vqgan import to_transformers
from omni_tokenizers.errors import OmniError
from omni_tokenizers.text_public import PublicTextTokenizer
from omni_tokenizers.vqgan import VQGANTokenizer

if TYPE_CHECKING:
    from omni.bundle import Model

DEFAULTS = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
"""Of transformers' Llama, which the language model is."""
CONTEXT_LENGTH = 2048
PLACEHOLDER_ID = 100_581
"""Of the token in whose places features of pictures stand, where config.json leaves it out."""
BEGIN, END, PLACEHOLDER = "<begin_of_image>", "<end_of_image>", "<image_placeholder>"
"""Names of the tokens around a picture, and in it where it is seen."""
SCALING = {
    "resample": int(Resampling.BICUBIC),
    "rescale_factor": 1 / 255,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
}
"""Of pictures as Janus was trained; where a file says nothing, transformers takes the mean and deviation of CLIP."""
MIN_SIZE = 14
"""Fewest pixels of a picture's shorter edge."""
GENERATION = {"guidance": {"image": 5.0}}
"""Of the release's tools."""
_TOWER = {"num_channels": 3, "hidden_act": "gelu", "attention_bias": True, "use_qk_norm": False}
_HEAD = "lm_head.weight"
_PREFIX, _VQMODEL = "model.language_model.", "model.vqmodel."
_VISION, _ALIGNER = "model.vision_model.", "model.aligner."
_LAYER = {
    "attention_norm": "layer_norm1",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.projection_layer",
    "mlp_norm": "layer_norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}


# config.json


def section(settings: Settings) -> Settings:
    """What config.json says of the language model."""
    return settings.section("text_config")


def read(settings: Settings) -> TransformerConfig:
    """The transformer's configuration, with the nets of codes and the tower."""
    base, vision, pictures = section(settings), settings.section("vision_config"), settings.section("vq_config")
    text = read_config(base, DEFAULTS, qk_norm="none", vision=_tower(vision))
    pictures.require("hidden_act", "gelu")
    for config, key in ((vision, "projection_dim"), (pictures, "projection_dim"), (pictures, "image_token_embed_dim")):
        if (width := config.get(key, 2048)) != text.dim:
            raise OmniError(f"{config.source}: {key} is {width}; it must be that of the language model, {text.dim}")
    codes, width = pictures.get("num_embeddings", 16_384), pictures.get("embed_dim", 8)
    nets = CodeNetsConfig(codes, width, pictures.get("num_hidden_layers", 2))
    return dataclasses.replace(text, vocabulary_size=text.vocabulary_size + codes, code_nets=nets)


def _tower(settings: Settings) -> VisionConfig:
    """The tower's configuration."""
    for key, value in _TOWER.items():
        settings.require(key, value)
    usual = VisionConfig()
    config = VisionConfig(
        image_size=settings.get("image_size", usual.image_size),
        patch=settings.get("patch_size", usual.patch),
        depth=settings.get("num_hidden_layers", usual.depth),
        dim=settings.get("hidden_size", usual.dim),
        heads=settings.get("num_attention_heads", usual.heads),
        mlp_ratio=settings.get("mlp_ratio", usual.mlp_ratio),
        norm_epsilon=settings.get("layer_norm_eps", usual.norm_epsilon),
        aligner_depth=settings.get("depth", usual.aligner_depth),
    )
    if (count := settings.get("num_image_tokens", 576)) != config.tokens:
        raise OmniError(f"{settings.source}: num_image_tokens is {count}; pictures have {config.tokens} patches")
    return config


def tied(settings: Settings, tensors: Collection[str]) -> bool:
    """Whether the head is the embedding: config.json of the release does not say, and its files have a head."""
    return settings.get("tie_word_embeddings", _HEAD not in tensors)


def write(model: Model) -> dict[str, Any]:
    """The content of config.json."""
    config, vision = model.config, model.config.vision
    text = write_config(model, "llama", "LlamaForCausalLM")
    pictures, _ = to_transformers(model.tokenizers["image"])
    del text["architectures"], pictures["architectures"]
    pictures |= {
        "num_hidden_layers": config.code_nets.depth,
        "projection_dim": config.dim,
        "image_token_embed_dim": config.dim,
        "hidden_act": "gelu",
    }
    tower = _TOWER | {
        "model_type": "janus_vision_model",
        "image_size": vision.image_size,
        "patch_size": vision.patch,
        "num_hidden_layers": vision.depth,
        "hidden_size": vision.dim,
        "num_attention_heads": vision.heads,
        "mlp_ratio": vision.mlp_ratio,
        "layer_norm_eps": vision.norm_epsilon,
        "depth": vision.aligner_depth,
        "projection_dim": config.dim,
        "num_image_tokens": vision.tokens,
    }
    return {
        "model_type": "janus",
        "architectures": ["JanusForConditionalGeneration"],
        "tie_word_embeddings": text["tie_word_embeddings"],
        "image_token_id": model.vocabulary.token(PLACEHOLDER),
        "text_config": text,
        "vision_config": tower,
        "vq_config": pictures,
    }


def lacks(model: Model) -> str | None:
    """What this family lacks of a model."""
    config, tokenizer = model.config, model.tokenizers.get("image")
    if config.vision is None or config.code_nets is None:
        return "model without a tower of pictures and nets of codes"
    if not isinstance(tokenizer, VQGANTokenizer) or not tokenizer.config.normalized_codes:
        return "model without its image tokenizer, a VQGAN with normalized_codes"
    fixed = {"qk_norm": "none", "code_nets": config.code_nets, "vision": config.vision}
    return llama_lacks(config, **fixed)


# Documents


def preset(settings: Settings, config: TransformerConfig, text: PublicTextTokenizer | None) -> Preset:
    """Text and pictures of one size; the turn, and what else is missing, has new ids between the published and codes.

    Raises:
      OmniError: a placeholder that is no published id.
    """
    own, published = section(settings), config.embedded
    names, ids = settings.values.get(ADDED_TOKENS, {}), control_ids(own, published)
    placeholder = settings.get("image_token_id", PLACEHOLDER_ID)
    if not 0 <= placeholder < published:
        raise OmniError(f"{settings.source}: image_token_id = {placeholder} is no id below {published}")
    around = {"begin": BEGIN, "end": END}
    ids |= {role: names[name] for role, name in around.items() if names.get(name, published) < published}
    first = with_new_ids(ids, published, ("bos", "turn", "eos", "pad", "begin", "end"))
    special = {around.get(role, f"<{role}>"): token for role, token in ids.items()}
    special[PLACEHOLDER] = placeholder
    codes = first + np.arange(config.code_nets.codes, dtype=np.int32)
    blocks = {"text": text_ids(published, text, list(special.values())), "image": codes}
    edge = config.vision.image_size
    scaling = ImageProcessor(**SCALING, side=edge, min_size=min(MIN_SIZE, edge)).to_json()
    features = {"token": PLACEHOLDER, "count": config.vision.tokens}
    declaration = grammar(edge // config.vision.patch, preprocessing=scaling, features=features)
    return Preset(Vocabulary(first + len(codes), blocks, special), declaration, GENERATION)


def grammar(side: int, **more: Any) -> dict[str, Any]:
    """The declaration: pictures of side x side codes between begin and end; `more` is of pictures, too."""
    shapes = [{"rows": side, "columns": side}]
    image = {"codebooks": ["image"], "open": [BEGIN], "close": [END], "shapes": shapes, **more}
    return {
        "format": 1,
        "control": {role: f"<{role}>" for role in ("bos", "turn", "eos", "pad")},
        "unconditional": "padded",
        "modalities": {"text": {"block": "text"}, "image": image},
    }


# Tensors


def places(config: TransformerConfig, prefix: str) -> Iterator[Place]:
    """The tensors of the language model, the nets of codes, and the tower."""
    return itertools.chain(llama_places(config, prefix, _HEAD), _places_of_codes(config), _places_of_tower(config))


def _places_of_codes(config: TransformerConfig) -> Iterator[Place]:
    head = "model.generation_head."
    yield Place("codes.vectors", "model.generation_embeddings.weight")
    yield from _aligner("codes.aligner.", "model.generation_aligner.", config.code_nets.depth)
    yield Place("codes.hidden", f"{head}proj_out.weight")
    yield Place("codes.hidden_bias", f"{head}proj_out.bias")
    yield Place("codes.head", f"{head}vision_head.weight")
    yield Place("codes.head_bias", f"{head}vision_head.bias")


def _places_of_tower(config: TransformerConfig) -> Iterator[Place]:
    yield Place("vision.patch", f"{_VISION}embeddings.patch_embedding.weight")
    yield Place("vision.patch_bias", f"{_VISION}embeddings.patch_embedding.bias")
    yield Place("vision.position", f"{_VISION}embeddings.position_embedding.weight")
    for layer in range(config.vision.depth):
        for ours, theirs in _LAYER.items():
            yield Place(f"vision.layers.{ours}", f"{_VISION}encoder.layers.{layer}.{theirs}.weight", layer)
            yield Place(f"vision.layers.{ours}_bias", f"{_VISION}encoder.layers.{layer}.{theirs}.bias", layer)
    yield Place("vision.norm", f"{_VISION}post_layernorm.weight")
    yield Place("vision.norm_bias", f"{_VISION}post_layernorm.bias")
    yield from _aligner("vision.aligner.", _ALIGNER, config.vision.aligner_depth)


def _aligner(ours: str, theirs: str, depth: int) -> Iterator[Place]:
    yield Place(f"{ours}enter", f"{theirs}fc1.weight")
    yield Place(f"{ours}enter_bias", f"{theirs}fc1.bias")
    for layer in range(depth - 1):
        yield Place(f"{ours}layers", f"{theirs}hidden_layers.{layer}.weight", layer)
        yield Place(f"{ours}layers_bias", f"{theirs}hidden_layers.{layer}.bias", layer)


def tokenizers(directory: epath.Path) -> dict[str, omni_tokenizers.Tokenizer]:
    """The tokenizer of pictures in the weights."""
    return {"image": omni_tokenizers.load(directory)}


def more_tensors(model: Model) -> dict[str, np.ndarray]:
    """The tokenizer of pictures, under its names."""
    return {f"{_VQMODEL}{name}": value for name, value in to_transformers(model.tokenizers["image"])[1].items()}


FAMILY = Family(
    name="janus",
    model_type="janus",
    context_length=CONTEXT_LENGTH,
    read=read,
    write=write,
    lacks=lacks,
    preset=preset,
    image_processor_type="JanusImageProcessor",
    places=places,
    prefix=_PREFIX,
    others=(_VQMODEL,),
    tokenizers=tokenizers,
    more_tensors=more_tensors,
    carries=lambda model: ("image",),
    section=section,
    tied=tied,
    frame=("bos_token", ""),
)
