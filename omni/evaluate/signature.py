"""What a score depends on, in one line, as sacrebleu has it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

from omni.bundle import Model


def as_line(fields: Mapping[str, Any]) -> str:
    """Named values as a signature."""
    return "|".join(f"{name}:{value}" for name, value in fields.items())


def model_fields(model: Model, sampling: Mapping[str, Mapping[str, float]], weights: str) -> dict[str, Any]:
    """What a model's replies depend on: how they are drawn, and what it is made of.

    Args:
      sampling: setting -> modality -> value.
      weights: the model's hash.
    """
    chosen = ";".join(
        f"{name}:" + ",".join(f"{modality}={value:g}" for modality, value in sorted(by_modality.items()))
        for name, by_modality in sorted(sampling.items())
    )
    return {
        "engine": model.engine.version,
        "sampling": chosen or "plain",
        "model": weights,
        **{f"{modality}_tokenizer": tokenizer.hash for modality, tokenizer in sorted(model.tokenizers.items())},
        "vocabulary": model.vocabulary.hash,
        "grammar": model.grammar.hash,
        "omni": _version(),
    }


def _version() -> str:
    try:
        return importlib.metadata.version("omni-any-to-any")
    except importlib.metadata.PackageNotFoundError:
        return "source"
