"""The public tokenizers that `omni bench tokenizers` times, in the sizes in which they were released."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

Verb = Literal["encode", "decode"]


@dataclasses.dataclass(frozen=True)
class Family:
    """One tokenizer of transformers and the same one here."""

    title: str
    """What it is called in the table."""
    model: str
    """Class of transformers, whose default configuration is the released one."""
    tokenizer: str
    """module:class here."""
    verbs: tuple[Verb, ...] = ("encode", "decode")
    """What both sides can do."""
    theirs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of transformers' configuration besides its defaults."""
    ours: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings that make our configuration the same one, for when there is no transformers to export it."""


FAMILIES = {
    "encodec": Family("EnCodec 24 kHz", "EncodecModel", "omni_tokenizers.encodec:EncodecTokenizer"),
    "mimi": Family("Mimi 24 kHz", "MimiModel", "omni_tokenizers.mimi:MimiTokenizer"),
    "dac": Family("DAC 16 kHz", "DacModel", "omni_tokenizers.dac:DacTokenizer", ours={"sample_rate": 16000}),
    # transformers has Chameleon's encoder alone, and of Janus's encoder a form that Janus was not trained with. Both
    # decoders are one net, but for attention at the lowest resolution, which Janus's has besides.
    "chameleon": Family(
        "Chameleon VQ",
        "ChameleonVQVAE",
        "omni_tokenizers.vqgan:VQGANTokenizer",
        ("encode",),
        ours={"has_decoder": False},
    ),
    "janus": Family(
        "Janus VQ",
        "JanusVQVAE",
        "omni_tokenizers.vqgan:VQGANTokenizer",
        ("decode",),
        ours={"code_dim": 8, "codebook_size": 16384, "normalized_codes": True, "attention_stages": (4,)},
    ),
}
