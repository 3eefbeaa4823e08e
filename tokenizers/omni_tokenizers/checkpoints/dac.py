"""DAC as transformers keeps it."""

from __future__ import annotations

from typing import Any

from omni_tokenizers.checkpoints.family import Family, Settings
from omni_tokenizers.checkpoints.interop import Layout, Pair
from omni_tokenizers.dac import DacConfig, DacTokenizer

# transformers' name -> ours, of what is the same in both.
_KEYS = {
    "encoder_hidden_size": "filters",
    "decoder_hidden_size": "decoder_filters",
    "downsampling_ratios": "strides",
    "n_codebooks": "codebooks",
    "codebook_size": "codebook_size",
    "codebook_dim": "code_dim",
}


def _read(settings: Settings) -> DacConfig:
    values = {ours: settings.get(theirs, getattr(DacConfig(), ours)) for theirs, ours in _KEYS.items()}
    return DacConfig(**values, sample_rate=settings.get("sampling_rate", 16000))


def _write(config: DacConfig) -> dict[str, Any]:
    values = {theirs: getattr(config, ours) for theirs, ours in _KEYS.items()}
    return {
        "model_type": "dac",
        "architectures": ["DacModel"],
        **values,
        "downsampling_ratios": list(config.strides),
        "sampling_rate": config.sample_rate,
    }


def _pairs(config: DacConfig) -> list[Pair]:
    pairs = _convolution("enter", "encoder.conv1")
    for stage in range(len(config.strides)):
        ours, theirs = f"encoder.{stage}", f"encoder.block.{stage}"
        pairs += [*_units(ours, theirs), _snake(f"{ours}.snake", f"{theirs}.snake1")]
        pairs += _convolution(f"{ours}.down", f"{theirs}.conv1")
    pairs += [_snake("encoder_snake", "encoder.snake1"), *_convolution("to_latent", "encoder.conv2")]
    for level in range(config.codebooks):
        ours, theirs = f"quantizer.levels.{level}", f"quantizer.quantizers.{level}"
        pairs += _convolution(f"{ours}.enter", f"{theirs}.in_proj") + _convolution(
            f"{ours}.leave", f"{theirs}.out_proj"
        )
        pairs.append(Pair(f"{ours}.vectors", f"{theirs}.codebook.weight"))
    pairs += _convolution("from_latent", "decoder.conv1")
    for stage in range(len(config.strides)):
        ours, theirs = f"decoder.{stage}", f"decoder.block.{stage}"
        pairs += [_snake(f"{ours}.snake", f"{theirs}.snake1")]
        pairs += _convolution(f"{ours}.up", f"{theirs}.conv_t1", "conv_transpose1d") + _units(ours, theirs)
    return [*pairs, _snake("decoder_snake", "decoder.snake1"), *_convolution("leave", "decoder.conv2")]


def _units(ours: str, theirs: str) -> list[Pair]:
    pairs = []
    for unit in range(3):
        inner, other = f"{ours}.units.{unit}", f"{theirs}.res_unit{unit + 1}"
        pairs += [_snake(f"{inner}.enter", f"{other}.snake1"), *_convolution(f"{inner}.mix", f"{other}.conv1")]
        pairs += [_snake(f"{inner}.within", f"{other}.snake2"), *_convolution(f"{inner}.out", f"{other}.conv2")]
    return pairs


def _snake(ours: str, theirs: str) -> Pair:
    return Pair(f"{ours}.frequency", f"{theirs}.alpha", "channels")


def _convolution(ours: str, theirs: str, layout: Layout = "conv1d") -> list[Pair]:
    return [Pair(f"{ours}.kernel", f"{theirs}.weight", layout), Pair(f"{ours}.bias", f"{theirs}.bias")]


DAC = Family(DacTokenizer, _read, _write, _pairs)

from_transformers, to_transformers = DAC.from_transformers, DAC.to_transformers
