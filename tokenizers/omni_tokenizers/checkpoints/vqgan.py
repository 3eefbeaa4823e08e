"""VQGANs of public checkpoints: taming-transformers' layout, LlamaGen's, and transformers' Chameleon and Janus.

The three layouts name the same tensors differently, and count the decoder's stages from either end: taming-transformers
from full resolution, the others from the lowest.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from flax import nnx

from omni_tokenizers import weights
from omni_tokenizers.base import config_from_dict
from omni_tokenizers.checkpoints.interop import Pair, from_state, to_state
from omni_tokenizers.errors import OmniError
from omni_tokenizers.vqgan import VQGAN, VQGANConfig, VQGANTokenizer

Layout = Literal["taming", "llamagen", "transformers"]
Rules = list[tuple[str, str | Callable[[re.Match], str]]]
"""Patterns in our names and what stands for them in theirs; each is applied to what the ones before made of a name."""

# Within residual and attention blocks all checkpoints agree.
BLOCK_RULES: Rules = [
    (r"\bfirst_norm\b", "norm1"),
    (r"\bsecond_norm\b", "norm2"),
    (r"\bfirst\b", "conv1"),
    (r"\bsecond\b", "conv2"),
    (r"\bshortcut\b", "nin_shortcut"),
    (r"\bquery\b", "q"),
    (r"\bkey\b", "k"),
    (r"\bvalue\b", "v"),
    (r"\boutput\b", "proj_out"),
]
ENDS_RULES: Rules = [
    (r"^codebook$", "quantize.embedding.weight"),
    (r"^to_code\b", "quant_conv"),
    (r"^from_code\b", "post_quant_conv"),
    (r"^(encoder|decoder)\.enter\b", r"\1.conv_in"),
    (r"^(encoder|decoder)\.norm\b", r"\1.norm_out"),
    (r"^(encoder|decoder)\.leave\b", r"\1.conv_out"),
    (r"(encoder.*)\bresample\b", r"\1downsample.conv"),
    (r"(decoder.*)\bresample\b", r"\1upsample.conv"),
    (r"\b(kernel|scale)$", "weight"),
]
_CHAMELEON = {
    "embed_dim": 256,
    "num_embeddings": 8192,
    "double_latent": False,
    "latent_channels": 256,
    "resolution": 512,
    "in_channels": 3,
    "base_channels": 128,
    "channel_multiplier": [1, 1, 2, 2, 4],
    "num_res_blocks": 2,
    "attn_resolutions": None,
    "attn_type": "vanilla",
}
_JANUS = {
    "embed_dim": 8,
    "num_embeddings": 16384,
    "double_latent": False,
    "latent_channels": 256,
    "num_patches": 32,
    "in_channels": 3,
    "out_channels": 3,
    "base_channels": 128,
    "channel_multiplier": [1, 1, 2, 2, 4],
    "num_res_blocks": 2,
}


def from_chameleon(values: Mapping[str, Any], tensors: Mapping[str, np.ndarray], source: str) -> VQGANTokenizer:
    """The encoder and codebook of transformers' ChameleonVQVAE.

    Args:
        values: its configuration; what is left out has transformers' default.
        tensors: its weights, without a prefix.
        source: what both were read from, for messages.
    Raises:
        OmniError: settings that this net does not have, or tensors that are not those of the configuration.
    """
    values = _CHAMELEON | dict(values)
    refuse_others(values, {"in_channels": 3, "double_latent": False, "attn_type": "vanilla"}, source)
    config = _config(values, {"resolution": "image_size"}, source, has_decoder=False)
    resolutions = values["attn_resolutions"] or []
    if not isinstance(resolutions, list):
        raise OmniError(f"{source}: attn_resolutions must be a list, found {resolutions!r}")
    stages = [stage for stage in range(len(config.multipliers)) if config.image_size >> stage in resolutions]
    return _tokenizer(dataclasses.replace(config, attention_stages=tuple(stages)), "transformers", tensors, source)


def from_janus(values: Mapping[str, Any], tensors: Mapping[str, np.ndarray], source: str) -> VQGANTokenizer:
    """transformers' JanusVQVAE, as Janus was trained: unlike transformers' own, encoding scales to unit length too.

    Arguments and errors are those of `from_chameleon`.
    """
    values = _JANUS | dict(values)
    refuse_others(values, {"in_channels": 3, "out_channels": 3, "double_latent": False}, source)
    config = _config(values, {"num_patches": "image_size"}, source, normalized_codes=True)
    config = dataclasses.replace(
        config,
        attention_stages=(len(config.multipliers) - 1,),
        image_size=config.image_size * config.downsampling,
    )
    return _tokenizer(config, "transformers", tensors, source)


def from_original(tensors: Mapping[str, np.ndarray], image_size: int, source: str) -> VQGANTokenizer:
    """A VQGAN in taming-transformers' layout or LlamaGen's, its configuration read off the tensors' shapes.

    Tensors of the training loss (`loss.`) are left out, and where all names of the net share a prefix, as inside a
    whole Janus, whatever does not have it.

    Raises:
        OmniError: not a VQGAN, or a tensor missing, unknown, of another shape or not finite.
    """
    entries = [name for name in tensors if re.search(r"(^|\.)encoder\.conv_in\.weight$", name)]
    if len(entries) != 1:
        raise OmniError(f"{source}: expected one tensor 'encoder.conv_in.weight' of a VQGAN, found {len(entries)}")
    prefix = entries[0].removesuffix("encoder.conv_in.weight")
    own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    own = {name: value for name, value in own.items() if not name.startswith("loss.")}
    layout: Layout = "llamagen" if any(name.startswith("encoder.conv_blocks.") for name in own) else "taming"
    config = _inferred(own, layout, image_size, source)
    return _tokenizer(config, layout, own, source)


def to_transformers(tokenizer: VQGANTokenizer) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Configuration and tensors as transformers' ChameleonVQVAE or JanusVQVAE has them.

    Raises:
        OmniError: neither of the two is this net.
    """
    config = tokenizer.config
    values = {
        "base_channels": config.channels,
        "channel_multiplier": list(config.multipliers),
        "num_res_blocks": config.residual_blocks,
        "latent_channels": config.latent_channels,
        "num_embeddings": config.codebook_size,
        "embed_dim": config.code_dim,
    }
    if not config.normalized_codes and not config.has_decoder:
        resolutions = [config.image_size >> stage for stage in config.attention_stages]
        values |= {"resolution": config.image_size, "attn_resolutions": resolutions or None}
        values |= {"model_type": "chameleon_vqgan", "architectures": ["ChameleonVQVAE"]}
    elif (
        config.normalized_codes
        and config.has_decoder
        and config.attention_stages == (len(config.multipliers) - 1,)
        and config.image_size % config.downsampling == 0
    ):
        values |= {"num_patches": config.image_size // config.downsampling}
        values |= {"model_type": "janus_vqgan", "architectures": ["JanusVQVAE"]}
    else:
        raise OmniError(
            "transformers has no such VQGAN: its Chameleon has no decoder and no normalized_codes, its Janus has both, "
            "with attention in the last stage alone and an image_size in whole codes"
        )
    return values, from_state(tokenizer.state, pairs(tokenizer.net, layout_rules("transformers", config)))


def without_decoder(tokenizer: VQGANTokenizer) -> VQGANTokenizer:
    """Its encoder and codebook alone, which give the same codes; the tokenizer itself if it has no decoder."""
    if not tokenizer.config.has_decoder:
        return tokenizer
    config = dataclasses.replace(tokenizer.config, has_decoder=False)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: VQGAN(config, rngs=nnx.Rngs(0))))
    tensors = weights.flatten(tokenizer.state)
    kept = {name: tensors[name] for name in weights.shapes(state)}
    return VQGANTokenizer(config, nnx.merge(graphdef, weights.unflatten(state, kept)))


def pairs(net: nnx.Module, rules: Rules) -> list[Pair]:
    """A pair for each tensor of `net`: its name by `rules`, its layout by its axes."""
    result = []
    for ours, shape in weights.shapes(nnx.split(net)[1]).items():
        theirs = ours
        for pattern, replacement in rules:
            theirs = re.sub(pattern, replacement, theirs)
        layout = {4: "conv2d", 5: "conv3d"}[len(shape)] if ours.endswith(".kernel") else "same"
        result.append(Pair(ours, theirs, layout))
    return result


def layout_rules(layout: Layout, config: VQGANConfig) -> Rules:
    """How one layout names our tensors."""
    last = len(config.multipliers) - 1
    if layout == "llamagen":
        down, up, block, middle = "conv_blocks", "conv_blocks", "res", ("mid.0", "mid.1", "mid.2")
    else:
        down, up, block, middle = "down", "up", "block", ("mid.block_1", "mid.attn_1", "mid.block_2")

    def upward(match: re.Match) -> str:
        stage = int(match[1])
        return f"decoder.{up}.{stage if layout == 'taming' else last - stage}."

    return [
        (r"^encoder\.stages\b", f"encoder.{down}"),
        (r"^decoder\.stages\.(\d+)\.", upward),
        (r"\bmiddle\.first\b", middle[0]),
        (r"\bmiddle\.attention\b", middle[1]),
        (r"\bmiddle\.second\b", middle[2]),
        (r"\bblocks\b", block),
        (r"\battention\b", "attn"),
        *BLOCK_RULES,
        *ENDS_RULES,
    ]


def refuse_others(values: Mapping[str, Any], known: Mapping[str, Any], source: str) -> None:
    """An OmniError if a setting has another value than the one that this package knows."""
    for key, value in known.items():
        if values[key] != value:
            raise OmniError(f"{source}: {key} = {values[key]!r}, but only {value!r} can be read")


def _config(values: Mapping[str, Any], more: Mapping[str, str], source: str, **fixed: bool) -> VQGANConfig:
    """A configuration from transformers' names of its settings."""
    names = {
        "base_channels": "channels",
        "channel_multiplier": "multipliers",
        "num_res_blocks": "residual_blocks",
        "latent_channels": "latent_channels",
        "num_embeddings": "codebook_size",
        "embed_dim": "code_dim",
    }
    return config_from_dict(
        VQGANConfig, {ours: values[theirs] for theirs, ours in (names | dict(more)).items()} | fixed, source
    )


def _inferred(tensors: Mapping[str, np.ndarray], layout: Layout, image_size: int, source: str) -> VQGANConfig:
    """The configuration that tensors in an original layout have."""
    down, block = ("conv_blocks", "res") if layout == "llamagen" else ("down", "block")

    def size(name: str, axis: int = 0) -> int:
        if name not in tensors:
            raise OmniError(f"{source}: tensor {name!r} is missing")
        shape = np.shape(tensors[name])
        if len(shape) < 2:
            raise OmniError(f"{source}: tensor {name!r} has the shape {list(shape)}, too few axes")
        return shape[axis]

    def count(template: str) -> int:
        number = 0
        while any(name.startswith(template.format(number)) for name in tensors):
            number += 1
        return number

    channels, stages = size("encoder.conv_in.weight"), count(f"encoder.{down}.{{}}.")
    widths = [size(f"encoder.{down}.{stage}.{block}.0.conv1.weight") for stage in range(stages)]
    if any(width % max(channels, 1) for width in widths):
        raise OmniError(f"{source}: stages have {widths} channels, which are no multiples of {channels}, the first's")
    values = {
        "channels": channels,
        "multipliers": [width // max(channels, 1) for width in widths],
        "residual_blocks": count(f"encoder.{down}.0.{block}.{{}}."),
        "attention_stages": [stage for stage in range(stages) if count(f"encoder.{down}.{stage}.attn.{{}}.")],
        "latent_channels": size("encoder.conv_out.weight"),
        "codebook_size": size("quantize.embedding.weight"),
        "code_dim": size("quantize.embedding.weight", 1),
        "image_size": image_size,
        "normalized_codes": layout == "llamagen",
        "has_decoder": any(name.startswith("decoder.") for name in tensors),
    }
    return config_from_dict(VQGANConfig, values, source)


def _tokenizer(config: VQGANConfig, layout: Layout, tensors: Mapping[str, np.ndarray], source: str) -> VQGANTokenizer:
    # Shapes only, as in NetTokenizer.from_directory.
    net = nnx.eval_shape(lambda: VQGAN(config, rngs=nnx.Rngs(0)))
    # How often training used each code: of no use afterwards.
    ignored = ("quantize.codebook_used",) if layout == "llamagen" else ()
    state = to_state(net, tensors, pairs(net, layout_rules(layout, config)), source, ignored=ignored)
    return VQGANTokenizer(config, nnx.merge(nnx.graphdef(net), state))
