"""The quantisers by configuration: what a command line or a JSON file can name, told apart by `kind`."""

from __future__ import annotations

import dataclasses

from flax import nnx

from omni_tokenizers.errors import UsageError
from omni_tokenizers.quantizers.ema import VectorQuantizerConfig
from omni_tokenizers.quantizers.fsq import FSQConfig
from omni_tokenizers.quantizers.ibq import IBQConfig
from omni_tokenizers.quantizers.learned import LearnedQuantizerConfig
from omni_tokenizers.quantizers.lfq import LFQConfig
from omni_tokenizers.quantizers.residual import ResidualQuantizerConfig
from omni_tokenizers.quantizers.simvq import SimVQConfig
from omni_tokenizers.quantizers.split import SplitQuantizerConfig

SingleQuantizerConfig = VectorQuantizerConfig | LearnedQuantizerConfig | SimVQConfig | IBQConfig | FSQConfig | LFQConfig
"""One code for each latent: `codebook_size` codes for latents of width `dim`."""
LevelledQuantizerConfig = ResidualQuantizerConfig | SplitQuantizerConfig
"""Several codes for each latent: `codebook_sizes` of the levels, for latents of width `dim`."""
QuantizerConfig = SingleQuantizerConfig | LevelledQuantizerConfig
"""Any of them."""


def make_quantizer(config: QuantizerConfig, *, rngs: nnx.Rngs) -> nnx.Module:
    """The quantiser of a configuration."""
    return config.make(rngs=rngs)


def check_replaced(config, names: tuple[str, ...]) -> None:
    """A UsageError if a tokenizer's configuration has a `quantizer` and beside it changes what that replaces.

    Args:
        config: a dataclass; saved ones hold the defaults of these settings, which therefore never change.
        names: the settings that a `quantizer` replaces.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if config.quantizer is not None and field.name in names and value != field.default:
            raise UsageError(
                f"{field.name} {value} would do nothing beside a quantizer; set the quantizer's own settings"
            )
