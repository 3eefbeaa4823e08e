"""A user's documents as an evaluation takes them: sorted by direction, as tokens.

A document's direction is `context:target`: the modalities of its context parts and of its target parts, each once, in
alphabetical order (`audio+text:image`). So each document has one direction at most, and is measured once.
"""

from __future__ import annotations

import collections
import difflib
import hashlib
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from omni.bundle import Model
from omni.data.reading import read_ahead
from omni.data.sources import Samples, Source
from omni.evaluate.data import content, seed_of
from omni.evaluate.settings import DocumentSettings
from omni.grammar import Tokens
from omni.parts import Part
from omni_tokenizers.errors import OmniError, UsageError

THREADS, TOGETHER = 8, 64  # samples that are read at once, and documents that are tokenized at once
NO_CONTEXT, NOT_ASKED, NO_OTHER = "no context", "no asked direction", "no other context in the direction"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Document:
    """A document as tokens: what is given, `turn` included, and what follows, `eos` included."""

    index: int
    """Its number among the samples."""
    context: Tokens
    target: Tokens


@dataclass(frozen=True, eq=False)
class Direction:
    """The documents of one direction, and for each of them contexts of others that do not belong to it."""

    name: str
    documents: list[Document]
    wrong: Int[np.ndarray, "documents contexts"]
    """Places of documents, from `wrong_contexts`; at least one for each."""

    @property
    def contexts(self) -> list[bytes]:
        """What stands for each document's context; documents that have one in common are not independent."""
        return [document.context.ids.tobytes() for document in self.documents]


@dataclass(frozen=True, eq=False)
class Documents:
    """What is measured of a source, and what is not."""

    samples: Samples
    directions: list[Direction]
    left_out: dict[str, int]
    """Why -> number of documents that are not measured."""
    hash: str
    """First 16 hex digits of the SHA-256 over the parts of all documents, measured or not."""


def parse_directions(text: str) -> list[str]:
    """`image:text,text+audio:image` as directions, in that order; `UsageError` for what is written otherwise."""
    directions = []
    for asked in text.split(","):
        sides = [[name.strip() for name in side.split("+")] for side in asked.split(":")]
        if len(sides) != 2 or not all(itertools.chain(*sides)):
            raise UsageError(f"direction {asked!r}: write context:target, such as image:text or audio+text:image")
        directions.append(":".join("+".join(sorted(set(side))) for side in sides))
    return list(dict.fromkeys(directions))


def direction_of(parts: Sequence[Part]) -> str | None:
    """The direction of a document; None without context."""
    sides = ({part.modality for part in parts if part.context == context} for context in (True, False))
    context, target = ("+".join(sorted(side)) for side in sides)
    return f"{context}:{target}" if context else None


def read_documents(
    model: Model, source: Source, settings: DocumentSettings, asked: Sequence[str] | None = None
) -> Documents:
    """Reads all documents, and tokenizes those that are asked for.

    Args:
      settings: how many contexts are wanted beside each document's own, and the seed of their choice.
      asked: directions; None takes all in which contexts can be shuffled.

    Raises:
      UsageError: a direction is asked for that no document has.
      OmniError: a document cannot be read, has a modality that the model does not know, or is longer than the model's
        context; contexts of a direction that is asked for, or of every one, cannot be shuffled.
    """
    samples = source.open()
    digest, found = hashlib.sha256(), collections.Counter()
    chosen: dict[str, list[Document]] = {}
    waiting: list[tuple[int, str, list[Part]]] = []

    def tokenize() -> None:
        spans = model.processor.spans([parts for *_, parts in waiting])
        for (index, direction, _), own in zip(waiting, spans, strict=True):
            chosen.setdefault(direction, []).append(_checked(model, samples, index, model.grammar.pack(own)))
        waiting.clear()

    order = range(len(samples))
    for read in tqdm(read_ahead(samples, order, THREADS), "read documents", len(order), unit="document", delay=2):
        if read.mistake is not None:
            raise OmniError(f"{samples.name(read.index)}: {read.mistake}")
        for part in read.parts:
            digest.update(f"{part.modality} {part.context} {hashlib.sha256(content(part)).hexdigest()}\n".encode())
        digest.update(b"\n")
        direction = direction_of(read.parts)
        found[direction] += 1
        if direction is not None and (asked is None or direction in asked):
            waiting.append((read.index, direction, _prepared(model, samples, read.index, read.parts)))
        if len(waiting) == TOGETHER:
            tokenize()
    tokenize()
    _check_asked(asked, found)
    directions = _directions(model, chosen, settings, asked)
    measured = {direction.name for direction in directions}
    left_out = {
        NO_CONTEXT: found.pop(None, 0),
        NOT_ASKED: sum(count for name, count in found.items() if name not in chosen),
        NO_OTHER: sum(count for name, count in found.items() if name in chosen and name not in measured),
    }
    for why, count in left_out.items():
        if count:
            logger.warning("%d of %d documents are not measured: %s", count, len(samples), why)
    return Documents(samples, directions, left_out, digest.hexdigest()[:16])


def _directions(
    model: Model, chosen: Mapping[str, list[Document]], settings: DocumentSettings, asked: Sequence[str] | None
) -> list[Direction]:
    """Those asked for, or all in which contexts can be shuffled; `OmniError` where one asked for, or all, cannot be."""
    directions, mistakes = [], []
    for name in asked or sorted(chosen):
        seed = seed_of(settings.seed, name, "contexts")
        try:
            wrong = wrong_contexts(chosen[name], settings.candidates, model.context_length, seed)
            directions.append(Direction(name, chosen[name], wrong))
        except OmniError as error:
            mistakes.append(f"direction {name}: {error}")
    if mistakes and (asked or not directions):
        raise OmniError(mistakes[0])
    if not directions:
        raise OmniError("no document has a context, so there is nothing that a context could tell")
    return directions


def _prepared(model: Model, samples: Samples, index: int, parts: Sequence[Part]) -> list[Part]:
    """The parts as the model's tokenizers take them; `OmniError` names the document where one does not."""
    try:
        return [model.processor.prepared(part) for part in parts]
    except OmniError as error:
        raise OmniError(f"{samples.name(index)}: {error}") from None


def _checked(model: Model, samples: Samples, index: int, tokens: Tokens) -> Document:
    """The tokens as a document; `OmniError` where the model cannot read so many."""
    given = int(np.argmax(tokens.target))
    context, target = (
        Tokens(tokens.ids[own], tokens.states[own], tokens.target[own]) for own in (slice(given), slice(given, None))
    )
    if len(tokens.ids) > model.context_length:
        raise OmniError(
            f"{samples.name(index)}: {given} tokens of context and {len(target.ids)} that follow are more than the "
            f"{model.context_length} that the model reads"
        )
    return Document(index, context, target)


def _check_asked(asked: Sequence[str] | None, found: collections.Counter) -> None:
    there = sorted(name for name in found if name is not None)
    for direction in asked or ():
        if direction not in found:
            near = difflib.get_close_matches(direction, there, 1, 0)
            hint = f"the nearest of those that there are is {near[0]}" if near else "none of them has a context"
            raise UsageError(f"no document has the direction {direction}; {hint}")


def joined(context: Tokens, target: Tokens) -> Tokens:
    """A context and the target of whichever document, as one document.

    The grammar's state after `turn` is one, whatever came before it, so the target's states stay what they are.
    """
    pairs = ((getattr(context, name), getattr(target, name)) for name in ("ids", "states", "target"))
    return Tokens(*map(np.concatenate, pairs))


def wrong_contexts(
    documents: Sequence[Document], most: int, longest: int, seed: int
) -> Int[np.ndarray, "documents contexts"]:
    """Places of documents whose contexts do not belong to each document's target: as many for each, at most `most`.

    All different contexts stand in a ring, in random order, and a document gets those after its own. So if all contexts
    and targets differ, every column has each context once, and none where it belongs. Passed over are contexts that
    some document has with the same target, which are no wrong ones, and those that are too long for it.

    Args:
      longest: tokens that context and target may have together.

    Raises:
      OmniError: there are fewer than two contexts, or a document has no wrong one.
    """
    contexts, targets = ([getattr(each, side).ids.tobytes() for each in documents] for side in ("context", "target"))
    belonging = set(zip(contexts, targets, strict=True))
    first = {context: place for place, context in reversed(list(enumerate(contexts)))}
    if len(first) < 2:
        one = "one document" if len(documents) == 1 else f"one context in all {len(documents)} documents"
        raise OmniError(f"there is {one}, so contexts cannot be shuffled; at least two are needed")
    ring = np.random.default_rng(seed).permutation(sorted(first.values())).tolist()
    place_in_ring = {contexts[place]: number for number, place in enumerate(ring)}
    rows = []
    for context, target, document in zip(contexts, targets, documents, strict=True):
        start, room = place_in_ring[context] + 1, longest - len(document.target.ids)
        others = itertools.chain(itertools.islice(ring, start, None), itertools.islice(ring, start - 1))
        wrong = (
            place
            for place in others
            if (contexts[place], target) not in belonging and len(documents[place].context.ids) <= room
        )
        rows.append(list(itertools.islice(wrong, most)))
    count = min(map(len, rows))
    if not count:
        raise OmniError(
            "there is a document with whose target every context comes that fits it, so contexts cannot be shuffled"
        )
    return np.array([row[:count] for row in rows], np.int64).reshape(len(rows), count)
