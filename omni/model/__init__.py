"""The transformer: parameters and training forward (`Transformer`), cached decoding (`decode`)."""

from omni.model.config import TransformerConfig
from omni.model.decode import Decoder, apply_decoder, init_cache, make_decoder
from omni.model.transformer import Transformer

__all__ = ["Decoder", "Transformer", "TransformerConfig", "apply_decoder", "init_cache", "make_decoder"]
