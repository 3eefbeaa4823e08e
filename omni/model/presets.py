"""Shapes of transformers by size: Chameleon's at 7B and 34B (arXiv:2405.09818), and smaller ones of the same kind.

All have queries and keys normalised, which early fusion needs: modalities compete through the softmax, norms grow, and
bfloat16 breaks. The vocabulary is that of Chameleon; `dataclasses.replace` gives another.
"""

import dataclasses

from omni.model.config import TransformerConfig

_VOCABULARY = 65_536

PRESETS = {
    "0.1b": TransformerConfig(
        vocabulary_size=_VOCABULARY, depth=12, dim=640, heads=5, key_value_heads=5, head_dim=128, mlp_dim=1792
    ),
    "1b": TransformerConfig(
        vocabulary_size=_VOCABULARY, depth=20, dim=2048, heads=16, key_value_heads=16, head_dim=128, mlp_dim=5504
    ),
    "7b": TransformerConfig(
        vocabulary_size=_VOCABULARY,
        depth=32,
        dim=4096,
        heads=32,
        key_value_heads=32,
        head_dim=128,
        mlp_dim=11_008,
        qk_norm="layer",
        dropout=0.1,
        tied_embeddings=False,
    ),
    "34b": TransformerConfig(
        vocabulary_size=_VOCABULARY,
        depth=48,
        dim=8192,
        heads=64,
        key_value_heads=8,
        head_dim=128,
        mlp_dim=22_016,
        qk_norm="layer",
        norm_order="swin",
        tied_embeddings=False,
    ),
}
"""Transformers by size."""


def parameter_count(config: TransformerConfig) -> int:
    """Parameters of all kinds, each expert's too."""
    return _count(config, config.experts)


def active_parameter_count(config: TransformerConfig) -> int:
    """Parameters that work on one token: of its experts alone, and neither the tower of pictures nor the embedding and
    the vectors of codes, of which it reads a row."""
    whole = _count(dataclasses.replace(config, vision=None), config.experts_per_token if config.experts else 0)
    vectors = config.code_nets.codes * config.code_nets.width if config.code_nets else 0
    return whole - vectors - (0 if config.tied_embeddings else config.embedded * config.dim)


def _count(config: TransformerConfig, experts: int) -> int:
    dim, heads = config.dim, config.heads + config.key_value_heads
    attention = 2 * dim * heads * config.head_dim
    normed = {"none": 0, "rms": 1, "layer": 2}[config.qk_norm] * (heads if config.qk_norm_per_head else 2)
    norms = 2 * dim + normed * config.head_dim
    feed = 3 * dim * config.mlp_dim * max(experts, 1) + dim * config.experts
    embeddings = config.embedded * dim * (1 if config.tied_embeddings else 2)
    if nets := config.code_nets:
        embeddings += nets.codes * (nets.width + dim + 1) + dim * (nets.width + 1 + nets.depth * (dim + 1))
    if tower := config.vision:
        layer = tower.dim * (4 * tower.dim + 2 * tower.mlp_dim + 9) + tower.mlp_dim
        embeddings += tower.depth * layer + tower.dim * (3 * tower.patch**2 + tower.tokens + 3)
        embeddings += dim * (tower.dim + 1 + (tower.aligner_depth - 1) * (dim + 1))
    return config.depth * (attention + norms + feed) + embeddings + dim


def training_flops_per_token(config: TransformerConfig, length: int) -> float:
    """Floating-point operations of a token's forward and backward pass: 6 for each parameter at work on it, and causal
    attention over rows of `length` tokens, of which half the scores are needed; nothing that is computed twice.

    The convention of PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), with causal attention.
    """
    attention = 6 * config.depth * config.heads * config.head_dim * length
    return 6.0 * active_parameter_count(config) + attention
