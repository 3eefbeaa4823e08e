"""EnCodec as transformers keeps it, and the names of SEANet's tensors there, which Mimi shares."""

from __future__ import annotations

from typing import Any

import numpy as np

from omni_tokenizers.checkpoints.family import Family, Settings
from omni_tokenizers.checkpoints.interop import Layout, Pair, unfold_weight_norms
from omni_tokenizers.encodec import EncodecConfig, EncodecTokenizer
from omni_tokenizers.errors import OmniError
from omni_tokenizers.seanet import SEANetConfig

# transformers' name -> ours, of what is the same in both.
_SEANET = {
    "audio_channels": "channels",
    "num_filters": "filters",
    "hidden_size": "dim",
    "num_residual_layers": "residual_layers",
    "kernel_size": "width",
    "last_kernel_size": "last_width",
    "residual_kernel_size": "residual_width",
    "dilation_growth_rate": "dilation_growth",
    "compress": "compress",
    "use_conv_shortcut": "conv_shortcut",
    "use_causal_conv": "causal",
    "pad_mode": "padding",
}


def read_seanet(settings: Settings, defaults: SEANetConfig) -> dict[str, Any]:
    """The settings of SEANet from a config.json; `defaults` are transformers' own."""
    settings.require("trim_right_ratio", 1.0)
    values = {ours: settings.get(theirs, getattr(defaults, ours)) for theirs, ours in _SEANET.items()}
    return values | {"strides": settings.get("upsampling_ratios", defaults.strides[::-1])[::-1]}


def write_seanet(config: SEANetConfig) -> dict[str, Any]:
    """The inverse of `read_seanet`."""
    values = {theirs: getattr(config, ours) for theirs, ours in _SEANET.items()}
    return values | {"upsampling_ratios": list(config.strides[::-1]), "trim_right_ratio": 1.0}


def seanet_pairs(config: SEANetConfig, encoder: str, decoder: str) -> list[Pair]:
    """The tensors of encoder and decoder, of which the arguments are the names of their lists of layers there."""
    return _encoder_pairs(config, encoder) + _decoder_pairs(config, decoder)


def convolution_pairs(ours: str, theirs: str, layout: Layout = "conv1d", *, group_norm: bool = False) -> list[Pair]:
    """A convolution's kernel and bias, and its normalisation's."""
    pairs = [Pair(f"{ours}.kernel", f"{theirs}.conv.weight", layout), Pair(f"{ours}.bias", f"{theirs}.conv.bias")]
    if group_norm:
        pairs += [Pair(f"{ours}.norm.scale", f"{theirs}.norm.weight"), Pair(f"{ours}.norm.bias", f"{theirs}.norm.bias")]
    return pairs


def _encoder_pairs(config: SEANetConfig, theirs: str) -> list[Pair]:
    # Activations are layers of their list too, and so use up a number.
    pairs, norm = convolution_pairs("encoder.enter", f"{theirs}.0", group_norm=config.group_norm), config.group_norm
    number = 1
    for stage in range(len(config.strides)):
        for unit in range(config.residual_layers):
            pairs += _unit_pairs(config, f"encoder.stages.{stage}.units.{unit}", f"{theirs}.{number}")
            number += 1
        pairs += convolution_pairs(f"encoder.stages.{stage}.down", f"{theirs}.{number + 1}", group_norm=norm)
        number += 2
    if config.lstm_layers:
        pairs += _lstm_pairs(config, "encoder.memory", f"{theirs}.{number}")
        number += 1
    return pairs + convolution_pairs("encoder.leave", f"{theirs}.{number + 1}", group_norm=norm)


def _decoder_pairs(config: SEANetConfig, theirs: str) -> list[Pair]:
    pairs, norm = convolution_pairs("decoder.enter", f"{theirs}.0", group_norm=config.group_norm), config.group_norm
    number = 1
    if config.lstm_layers:
        pairs += _lstm_pairs(config, "decoder.memory", f"{theirs}.{number}")
        number += 1
    for stage in range(len(config.strides)):
        up = f"decoder.stages.{stage}.up"
        pairs += convolution_pairs(up, f"{theirs}.{number + 1}", "conv_transpose1d", group_norm=norm)
        number += 2
        for unit in range(config.residual_layers):
            pairs += _unit_pairs(config, f"decoder.stages.{stage}.units.{unit}", f"{theirs}.{number}")
            number += 1
    return pairs + convolution_pairs("decoder.leave", f"{theirs}.{number + 1}", group_norm=norm)


def _unit_pairs(config: SEANetConfig, ours: str, theirs: str) -> list[Pair]:
    names = {"mix": "block.1", "out": "block.3"} | ({"shortcut": "shortcut"} if config.conv_shortcut else {})
    return [
        pair
        for name, other in names.items()
        for pair in convolution_pairs(f"{ours}.{name}", f"{theirs}.{other}", group_norm=config.group_norm)
    ]


def _lstm_pairs(config: SEANetConfig, ours: str, theirs: str) -> list[Pair]:
    names = {
        "input_kernel": "weight_ih",
        "hidden_kernel": "weight_hh",
        "input_bias": "bias_ih",
        "hidden_bias": "bias_hh",
    }
    return [
        Pair(
            f"{ours}.layers.{layer}.{name}", f"{theirs}.lstm.{other}_l{layer}", "linear" if "kernel" in name else "same"
        )
        for layer in range(config.lstm_layers)
        for name, other in names.items()
    ]


def _read(settings: Settings) -> EncodecConfig:
    defaults = EncodecConfig()
    seanet = read_seanet(settings, defaults)
    norm = settings.get("norm_type", "weight_norm")
    if norm not in ("weight_norm", "time_group_norm"):
        raise OmniError(f"{settings.source}: norm_type = {norm!r} is neither 'weight_norm' nor 'time_group_norm'")
    settings.require("codebook_dim", seanet["dim"])
    return EncodecConfig(
        **seanet,
        lstm_layers=settings.get("num_lstm_layers", defaults.lstm_layers),
        group_norm=norm == "time_group_norm",
        sample_rate=settings.get("sampling_rate", defaults.sample_rate),
        codebook_size=settings.get("codebook_size", defaults.codebook_size),
        bandwidths=settings.get("target_bandwidths", defaults.bandwidths),
        normalize=settings.get("normalize", defaults.normalize),
        chunk_seconds=settings.get("chunk_length_s", 0.0),
        overlap=settings.get("overlap", 0.0),
    )


def _write(config: EncodecConfig) -> dict[str, Any]:
    return {
        "model_type": "encodec",
        "architectures": ["EncodecModel"],
        **write_seanet(config),
        "num_lstm_layers": config.lstm_layers,
        "norm_type": "time_group_norm" if config.group_norm else "weight_norm",
        "sampling_rate": config.sample_rate,
        "codebook_size": config.codebook_size,
        "codebook_dim": config.dim,
        "target_bandwidths": list(config.bandwidths),
        "normalize": config.normalize,
        "chunk_length_s": config.chunk_seconds or None,
        "overlap": config.overlap if config.chunk_seconds else None,
    }


def _pairs(config: EncodecConfig) -> list[Pair]:
    codebooks = [
        Pair(f"quantizer.levels.{level}.vectors", f"quantizer.layers.{level}.codebook.embed")
        for level in range(config.codebooks)
    ]
    return seanet_pairs(config, "encoder.layers", "decoder.layers") + codebooks


def _complete(config: EncodecConfig, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weight norms split, and statistics that agree with each codebook: every code chosen once."""
    if not config.group_norm:
        tensors = unfold_weight_norms(tensors, [name for name in tensors if name.endswith(".conv.weight")])
    for level in range(config.codebooks):
        codebook = f"quantizer.layers.{level}.codebook"
        tensors[f"{codebook}.embed_avg"] = tensors[f"{codebook}.embed"]
        tensors[f"{codebook}.cluster_size"] = np.ones(config.codebook_size, np.float32)
        tensors[f"{codebook}.inited"] = np.ones(1, np.float32)
    return tensors


ENCODEC = Family(
    EncodecTokenizer,
    _read,
    _write,
    _pairs,
    ignored=(".codebook.inited", ".codebook.cluster_size", ".codebook.embed_avg"),
    complete=_complete,
)

from_transformers, to_transformers = ENCODEC.from_transformers, ENCODEC.to_transformers
