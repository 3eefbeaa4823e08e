"""Emu3's tokenizer as transformers keeps it, and as its own release does.

The release ("Emu3VisionVQ") names its settings and its attention otherwise, and keeps attention's linear maps as 1 x 1
convolutions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from omni_tokenizers.checkpoints.family import Family, Settings
from omni_tokenizers.checkpoints.interop import Pair
from omni_tokenizers.checkpoints.vqgan import BLOCK_RULES, ENDS_RULES, Rules, pairs
from omni_tokenizers.emu3 import Emu3Config, Emu3Tokenizer, Emu3VQ
from omni_tokenizers.errors import OmniError

# transformers' name -> ours, of what is the same in both.
_KEYS = {
    "base_channels": "channels",
    "channel_multiplier": "multipliers",
    "num_res_blocks": "residual_blocks",
    "attn_resolutions": "attention_stages",
    "latent_channels": "latent_channels",
    "codebook_size": "codebook_size",
    "temporal_downsample_factor": "temporal_downsampling",
    # Neither of them says it; transformers keeps it where `to_transformers` wrote it.
    "image_size": "image_size",
}
# The release's name -> transformers'.
_ORIGINAL_KEYS = {
    "ch": "base_channels",
    "ch_mult": "channel_multiplier",
    "z_channels": "latent_channels",
    "double_z": "double_latent",
}
_COUNT = "num_batches_tracked"

_TEMPORAL_RULES: Rules = [
    (r"^temporal_(encoder|decoder)\.resamples\.(\d+)\.", r"\1.time_conv.\2.conv.conv."),
    (r"^temporal_(encoder|decoder)\.blocks\.(\d+)\.(first|second)\.", r"\1.time_res_stack.\2.\3.conv."),
    (r"^temporal_(encoder|decoder)\.blocks\b", r"\1.time_res_stack"),
    (r"^(to_code|from_code)\.", r"\1.conv."),
    (r"^codebook\.vectors$", "codebook"),
    (r"\bmean$", "running_mean"),
    (r"\bvar$", "running_var"),
    (r"\bgroup_norm\b", "norm_layer"),
    (r"\bto_scale\b", "conv_y"),
    (r"\bto_bias\b", "conv_b"),
]
_TRANSFORMERS_RULES: Rules = [
    *_TEMPORAL_RULES,
    (r"^encoder\.stages\b", "encoder.down_block.down"),
    (r"^decoder\.stages\b", "decoder.up_block.up"),
    (r"\bmiddle\.first\b", "middle_block.block_1"),
    (r"\bmiddle\.attention\.norm\b", "middle_block.attn_norm"),
    (r"\bmiddle\.attention\b", "middle_block.attn_1"),
    (r"\bmiddle\.second\b", "middle_block.block_2"),
    (r"\battention\.(\d+)\.norm\b", r"attn_norms.\1"),
    (r"\bblocks\b", "block"),
    (r"\battention\b", "attn"),
    (r"\b(q)uery\b|\b(k)ey\b|\b(v)alue\b|\b(out)put\b", lambda match: f"{match[match.lastindex]}_proj"),
    *BLOCK_RULES,
    *ENDS_RULES,
]
_ORIGINAL_RULES: Rules = [
    *_TEMPORAL_RULES,
    (r"^encoder\.stages\b", "encoder.down"),
    (r"^decoder\.stages\b", "decoder.up"),
    (r"\bmiddle\.first\b", "mid.block_1"),
    (r"\bmiddle\.attention\b", "mid.attn_1"),
    (r"\bmiddle\.second\b", "mid.block_2"),
    (r"\bblocks\b", "block"),
    (r"\battention\b", "attn"),
    *BLOCK_RULES,
    *ENDS_RULES,
]


def _read(settings: Settings) -> Emu3Config:
    defaults = Emu3Config()
    config = Emu3Config(**{ours: settings.get(theirs, getattr(defaults, ours)) for theirs, ours in _KEYS.items()})
    for key, value in {"in_channels": 3, "out_channels": 3, "double_latent": False, "num_attention_heads": 1}.items():
        settings.require(key, value)
    settings.require("embed_dim", config.latent_channels, default=4)
    return config


def _read_original(settings: Settings) -> Emu3Config:
    values = {_ORIGINAL_KEYS.get(key, key): value for key, value in settings.values.items()}
    return _read(Settings(values, settings.source))


def _write(config: Emu3Config) -> dict[str, Any]:
    if any(config.widths[stage] != config.widths[-1] for stage in config.attention_stages):
        raise OmniError("transformers' Emu3 has attention only in stages as wide as the last one, so not this net")
    return {
        "model_type": "emu3_vqgan",
        "architectures": ["Emu3VQVAE"],
        **{theirs: getattr(config, ours) for theirs, ours in _KEYS.items()},
        "embed_dim": config.latent_channels,
        "hidden_size": config.widths[-1],
        "num_attention_heads": 1,
        "double_latent": False,
        "in_channels": 3,
        "out_channels": 3,
    }


def _original_pairs(config: Emu3Config) -> list[Pair]:
    return pairs(_abstract(config), _ORIGINAL_RULES)


def _pairs(config: Emu3Config) -> list[Pair]:
    linear = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight")
    return [
        dataclasses.replace(pair, layout="linear") if pair.theirs.endswith(linear) else pair
        for pair in pairs(_abstract(config), _TRANSFORMERS_RULES)
    ]


def _abstract(config: Emu3Config) -> nnx.Module:
    return nnx.eval_shape(lambda: Emu3VQ(config, rngs=nnx.Rngs(0)))


def _complete(config: Emu3Config, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each running statistic with its number of batches, which nothing reads but transformers expects."""
    ends = "running_mean"
    counts = {name.removesuffix(ends) + _COUNT: np.int64(0) for name in tensors if name.endswith(ends)}
    return dict(tensors) | counts


EMU3 = Family(Emu3Tokenizer, _read, _write, _pairs, ignored=(f".{_COUNT}",), complete=_complete)

from_transformers, to_transformers = EMU3.from_transformers, EMU3.to_transformers
from_original = dataclasses.replace(EMU3, read=_read_original, pairs=_original_pairs).from_transformers
