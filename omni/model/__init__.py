"""The transformer: parameters and training forward (`Transformer`), cached decoding (`decode`)."""

from omni.model.config import CodeNetsConfig, RopeScaling, TransformerConfig, VisionConfig
from omni.model.decode import CACHE_AXES, Decoder, apply_decoder, decoder_on, decoder_stream, init_cache, make_decoder
from omni.model.transformer import Transformer

__all__ = [
    "CACHE_AXES",
    "CodeNetsConfig",
    "Decoder",
    "RopeScaling",
    "Transformer",
    "TransformerConfig",
    "VisionConfig",
    "apply_decoder",
    "decoder_on",
    "decoder_stream",
    "init_cache",
    "make_decoder",
]
