"""Mimi as transformers keeps it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from omni_tokenizers.checkpoints.encodec import read_seanet, seanet_pairs, write_seanet
from omni_tokenizers.checkpoints.family import Family, Settings
from omni_tokenizers.checkpoints.interop import Pair
from omni_tokenizers.errors import OmniError
from omni_tokenizers.mimi import MimiConfig, MimiTokenizer

# transformers' name -> ours, of what is the same in both.
_KEYS = {
    "sampling_rate": "sample_rate",
    "num_hidden_layers": "transformer_layers",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_dim",
    "sliding_window": "window",
    "norm_eps": "norm_epsilon",
    "num_quantizers": "codebooks",
    "num_semantic_quantizers": "semantic_codebooks",
    "codebook_size": "codebook_size",
    "codebook_dim": "code_dim",
}
_BRANCHES = ("semantic", "acoustic")


def _read(settings: Settings) -> MimiConfig:
    defaults = MimiConfig()
    seanet = read_seanet(settings, defaults)
    values = {ours: settings.get(theirs, getattr(defaults, ours)) for theirs, ours in _KEYS.items()}
    settings.require("num_key_value_heads", values["heads"], default=8)
    settings.require("attention_bias", False)
    settings.require("hidden_act", "gelu")
    settings.require("upsample_groups", seanet["dim"], default=512)
    settings.require("vector_quantization_hidden_dimension", values["code_dim"], default=256)
    if values["code_dim"] == seanet["dim"]:
        raise OmniError(f"{settings.source}: codebooks as wide as latents, so without projections, are not supported")
    return MimiConfig(
        **seanet,
        **values,
        head_dim=settings.get("head_dim", seanet["dim"] // max(values["heads"], 1)),
        rope_theta=_rope_theta(settings),
        downsampling=_downsampling(settings, values["sample_rate"], math.prod(seanet["strides"])),
    )


def _rope_theta(settings: Settings) -> float:
    """The base of rotary positions: a key of its own before version 5."""
    rope = settings.values.get("rope_parameters")
    rope = Settings(rope if isinstance(rope, dict) else settings.values, settings.source)
    rope.require("rope_type", "default")
    return rope.get("rope_theta", 10000.0)


def _downsampling(settings: Settings, sample_rate: int, hop: int) -> int:
    """Latents in one frame of codes, which transformers takes from both rates, the latents' rounded up."""
    frame_rate = settings.get("frame_rate", settings.get("_frame_rate", sample_rate / (2 * max(hop, 1))))
    if not 0 < frame_rate <= sample_rate:
        raise OmniError(f"{settings.source}: frame_rate = {frame_rate} is not a rate of {sample_rate} samples a second")
    return int(math.ceil(sample_rate / max(hop, 1)) / frame_rate)


def _write(config: MimiConfig) -> dict[str, Any]:
    return {
        "model_type": "mimi",
        "architectures": ["MimiModel"],
        **write_seanet(config),
        **{theirs: getattr(config, ours) for theirs, ours in _KEYS.items()},
        "num_key_value_heads": config.heads,
        "head_dim": config.head_dim,
        "attention_bias": False,
        "hidden_act": "gelu",
        "upsample_groups": config.dim,
        "vector_quantization_hidden_dimension": config.code_dim,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "frame_rate": math.ceil(config.sample_rate / config.hop) / config.downsampling,
    }


def _pairs(config: MimiConfig) -> list[Pair]:
    pairs = seanet_pairs(config, "encoder.layers", "decoder.layers")
    pairs += _transformer_pairs(config, "encoder_transformer") + _transformer_pairs(config, "decoder_transformer")
    # A transposed convolution of each channel alone lies as a convolution does: its inputs are its groups.
    pairs += [
        Pair("down.kernel", "downsample.conv.weight", "conv1d"),
        Pair("up.kernel", "upsample.conv.weight", "conv1d"),
    ]
    numbers = (config.semantic_codebooks, config.codebooks - config.semantic_codebooks)
    for branch, number in zip(_BRANCHES, numbers, strict=True):
        theirs = f"quantizer.{branch}_residual_vector_quantizer"
        pairs += [
            Pair(f"{branch}.enter.kernel", f"{theirs}.input_proj.weight", "conv1d"),
            Pair(f"{branch}.leave.kernel", f"{theirs}.output_proj.weight", "conv1d"),
        ]
        for level in range(number):
            codebook = f"{theirs}.layers.{level}.codebook"
            pairs += [
                Pair(f"{branch}.levels.{level}.sum", f"{codebook}.embed_sum"),
                Pair(f"{branch}.levels.{level}.count", f"{codebook}.cluster_usage"),
            ]
    return pairs


def _transformer_pairs(config: MimiConfig, name: str) -> list[Pair]:
    linear = {f"self_attn.{part[0]}_proj": part for part in ("query", "key", "value", "output")}
    linear |= {"mlp.fc1": "mlp_in", "mlp.fc2": "mlp_out"}
    norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    scales = {"self_attn_layer_scale": "attention_scale", "mlp_layer_scale": "mlp_scale"}
    pairs = []
    for layer in range(config.transformer_layers):
        prefix = f"{name}.layers.{layer}."
        pairs += [Pair(f"{prefix}{o}.kernel", f"{prefix}{theirs}.weight", "linear") for theirs, o in linear.items()]
        pairs += [Pair(f"{prefix}{o}.scale", f"{prefix}{theirs}.weight") for theirs, o in norms.items()]
        pairs += [Pair(f"{prefix}{o}.bias", f"{prefix}{theirs}.bias") for theirs, o in norms.items()]
        pairs += [Pair(f"{prefix}{o}", f"{prefix}{theirs}.scale") for theirs, o in scales.items()]
    return pairs


def _complete(config: MimiConfig, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each codebook with its note that it has been started."""
    started = {
        name.replace(".embed_sum", ".initialized"): np.ones(1, np.float32)
        for name in tensors
        if name.endswith(".embed_sum")
    }
    return tensors | started


MIMI = Family(MimiTokenizer, _read, _write, _pairs, ignored=(".codebook.initialized",), complete=_complete)

from_transformers, to_transformers = MIMI.from_transformers, MIMI.to_transformers
