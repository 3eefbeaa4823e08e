"""Quantisers: continuous latents to codes of finite codebooks, and codes back to vectors.

Every one is called as ``quantizer(z, key, training=..., weights=...)`` and returns `Quantized`; `lookup` gives the
vectors of codes, `codebook` (where there are several levels, `codebooks`) those of all codes. `make_quantizer` makes
any of them from its configuration.
"""

from omni_tokenizers.quantizers.base import Gradient, Quantized, nearest
from omni_tokenizers.quantizers.choice import (
    LevelledQuantizerConfig,
    QuantizerConfig,
    SingleQuantizerConfig,
    check_replaced,
    make_quantizer,
)
from omni_tokenizers.quantizers.clusters import draw, k_means
from omni_tokenizers.quantizers.ema import CodebookState, EMAVectorQuantizer, VectorQuantizerConfig
from omni_tokenizers.quantizers.fsq import FiniteScalarQuantizer, FSQConfig
from omni_tokenizers.quantizers.ibq import IBQConfig, IndexBackpropagationQuantizer
from omni_tokenizers.quantizers.learned import LearnedQuantizerConfig, LearnedVectorQuantizer
from omni_tokenizers.quantizers.lfq import LFQConfig, LookupFreeQuantizer
from omni_tokenizers.quantizers.residual import LevelConfig, ResidualQuantizer, ResidualQuantizerConfig
from omni_tokenizers.quantizers.simvq import FrozenCodes, SimVQ, SimVQConfig
from omni_tokenizers.quantizers.split import SplitQuantizerConfig, SplitResidualQuantizer

__all__ = [
    "CodebookState",
    "EMAVectorQuantizer",
    "FSQConfig",
    "FiniteScalarQuantizer",
    "FrozenCodes",
    "Gradient",
    "IBQConfig",
    "IndexBackpropagationQuantizer",
    "LFQConfig",
    "LearnedQuantizerConfig",
    "LearnedVectorQuantizer",
    "LevelConfig",
    "LevelledQuantizerConfig",
    "LookupFreeQuantizer",
    "Quantized",
    "QuantizerConfig",
    "ResidualQuantizer",
    "ResidualQuantizerConfig",
    "SimVQ",
    "SimVQConfig",
    "SingleQuantizerConfig",
    "SplitQuantizerConfig",
    "SplitResidualQuantizer",
    "VectorQuantizerConfig",
    "check_replaced",
    "draw",
    "k_means",
    "make_quantizer",
    "nearest",
]
