"""What an evaluation measures on: labelled examples of every modality, filled in by a recipe."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from jaxtyping import Int

from omni.parts import Part
from omni_tokenizers.errors import OmniError


@dataclass(frozen=True, eq=False)
class Examples:
    """Parts of one modality with the class of each."""

    parts: Sequence[Part]
    labels: Int[np.ndarray, " n"]
    """Index into `EvaluationData.words`."""

    def __post_init__(self) -> None:
        if len(self.parts) != len(self.labels) or not len(self.parts):
            raise OmniError(f"evaluation data: {len(self.parts)} examples with {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.parts)

    def __repr__(self) -> str:
        return f"Examples({len(self)} of {self.parts[0].modality})"


@dataclass(frozen=True)
class WordRequest:
    """Something asked for in words, without saying to the engine what is wanted."""

    text: str
    label: int
    """The class that every part of the reply should show."""
    order: tuple[str, ...]
    """Modalities of the reply, in order."""


@dataclass(frozen=True, eq=False)
class EvaluationData:
    """Labelled training and held-out examples."""

    version: str
    """Name and version of the data, part of the results' signature."""
    words: tuple[str, ...]
    """The word of each class; the right text reply."""
    train: Mapping[str, Examples]
    """By modality (all but text): what judges learn from and what copies are searched in."""
    test: Mapping[str, Examples]
    """By modality: held out of everything trained. Text: the words and phrasings, which have no held-out part."""
    requests: Sequence[WordRequest] = ()
    """Held-out requests in words."""
    pool: Mapping[str, Sequence[Int[np.ndarray, "codebooks rows columns"]]] = field(default_factory=dict)
    """By modality: codes of training documents besides those of `train`, such as augmented ones, for finding copies."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those that there are held-out examples of."""
        return tuple(self.test)

    @cached_property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 over all examples and requests."""
        digest = hashlib.sha256(repr((self.version, self.words, tuple(self.requests))).encode())
        for examples in (*self.train.values(), *self.test.values()):
            digest.update(np.asarray(examples.labels, np.int64).tobytes())
            for part in examples.parts:
                digest.update(content(part))
        for codes in self.pool.values():
            for item in codes:
                digest.update(np.asarray(item, np.int32).tobytes())
        return digest.hexdigest()[:16]


def seed_of(*names: object) -> int:
    """A seed for something named, 31 bits: the same names, the same seed."""
    return zlib.crc32("/".join(map(str, names)).encode()) & 0x7FFFFFFF


def draw_inputs(
    data: EvaluationData, modality: str, count: int, seed: int
) -> tuple[list[Part], Int[np.ndarray, " count"]]:
    """`count` held-out examples and their labels.

    Pictures and sounds: pass after pass over all examples, each in an order of its own. Text: classes in turn, for each
    of them its phrasings in turn, so that `count` is spread evenly over classes.
    """
    examples = data.test[modality]
    if modality == "text":
        by_class = [np.flatnonzero(examples.labels == label) for label in range(len(data.words))]
        classes = [places for places in by_class if len(places)]
        places = [classes[i % len(classes)] for i in range(count)]
        chosen = np.array([own[i // len(classes) % len(own)] for i, own in enumerate(places)])
    else:
        rng = np.random.default_rng(seed_of(seed, modality))
        passes = [rng.permutation(len(examples)) for _ in range(-(-count // len(examples)))]
        chosen = np.concatenate(passes)[:count]
    return [examples.parts[i] for i in chosen], np.asarray(examples.labels)[chosen]


def content(part: Part) -> bytes:
    """What stands for a part in a hash."""
    match part.modality:
        case "text":
            return part.text.encode()
        case "image":
            return repr(part.pixels.shape).encode() + part.pixels.tobytes()
        case "video":
            return repr(part.frames.shape).encode() + part.timestamps.tobytes() + part.frames.tobytes()
    return repr((part.samples.shape, part.sample_rate)).encode() + part.samples.tobytes()
