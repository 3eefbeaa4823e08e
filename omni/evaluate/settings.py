"""How much is measured, and how replies are drawn."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from omni_tokenizers.errors import UsageError


@dataclass(frozen=True)
class EvaluationSettings:
    """Size of an evaluation and how replies are drawn."""

    per_direction: int = 1000
    """Generated targets of each direction; every held-out example is an input where there are no more of them."""
    shuffled: int = 256
    """Generated targets of each direction with the inputs shuffled, in whole batches: none is compiled for these."""
    requests: int = 300
    """Requests in words without `want`."""
    unconstrained: int = 1000
    """Free replies without the grammar's constraint."""
    documents: int = 200
    """Held-out documents of each direction for bits per token."""
    heard: int = 200
    """Held-out sounds for the mel distance and STOI of the audio tokenizer."""
    batch: int = 256
    """Requests handed to the model at once."""
    shown: int = 6
    """Examples of each direction kept for the report."""
    seed: int = 0
    """Seed of the choice of inputs and of every reply."""
    temperature: dict[str, float] | None = None
    """By modality; None leaves it, as the next three, to the model's own settings."""
    top_k: dict[str, float] | None = None
    """By modality."""
    top_p: dict[str, float] | None = None
    """By modality."""
    guidance: dict[str, float] | None = None
    """By modality."""

    def __post_init__(self) -> None:
        for name in ("per_direction", "shuffled", "requests", "unconstrained", "documents", "heard", "batch"):
            if getattr(self, name) < 2:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 2")

    @property
    def sampling(self) -> dict[str, dict[str, float]]:
        """The sampling settings that are given here."""
        chosen = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "guidance")}
        return {name: value for name, value in chosen.items() if value is not None}

    def limited(self, limit: int | None) -> EvaluationSettings:
        """The same with every count at most `limit`."""
        if limit is None:
            return self
        counts = ("per_direction", "shuffled", "requests", "unconstrained", "documents", "heard")
        return dataclasses.replace(self, **{name: min(getattr(self, name), limit) for name in counts})


@dataclass(frozen=True)
class DocumentSettings:
    """How much is measured of a model on a user's documents."""

    candidates: int = 8
    """Contexts among which that of a target is to be found, where there are so many."""
    limit: int = 100
    """Documents of each direction that are answered; likelihoods are of all."""
    batch: int = 256
    """Requests handed to the model at once."""
    shown: int = 6
    """Examples of each direction kept for the report."""
    seed: int = 0
    """Seed of the choice of contexts and documents, of intervals and of every reply."""

    def __post_init__(self) -> None:
        for name, least in (("candidates", 2), ("limit", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least {least}")
