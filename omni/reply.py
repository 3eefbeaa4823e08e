"""What a model gives back: ordered parts."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from omni import media
from omni.generate import Generated
from omni.grammar import Grammar, GrammarError, Span
from omni.parts import Audio, Image, Part, Text, Video
from omni.processor import Processor
from omni.stopping import StopStrings
from omni_tokenizers.errors import OmniError

INDEX = "reply.json"


@dataclass(frozen=True, eq=False)
class Reply:
    """An ordered list of typed parts that shows itself in a notebook and saves itself.

    Attributes:
      parts: the reply's parts, in order.
      ids: its tokens, the end included if it came to it.
      spans: the codes of each part.
      well_formed: whether the ids parse to the end; parts before a mistake are kept.
      log_probabilities: of each token, where the request asked for them: under the distribution that it was drawn from,
        after guidance, penalties, the grammar's mask, temperature, top-k, top-p and min-p; 0 at temperature 0.
    """

    parts: list[Part]
    ids: Int[np.ndarray, " tokens"]
    spans: list[Span]
    well_formed: bool
    log_probabilities: Float[np.ndarray, " tokens"] | None = None

    @property
    def text(self) -> str:
        """The text parts, joined by spaces."""
        return " ".join(part.text for part in self.parts if isinstance(part, Text))

    @property
    def images(self) -> list[Image]:
        """The pictures, in order."""
        return [part for part in self.parts if isinstance(part, Image)]

    @property
    def audio(self) -> list[Audio]:
        """The sounds, in order."""
        return [part for part in self.parts if isinstance(part, Audio)]

    @property
    def videos(self) -> list[Video]:
        """The videos, in order."""
        return [part for part in self.parts if isinstance(part, Video)]

    def save(self, directory: str | Path) -> list[Path]:
        """Writes each part to a file numbered by its place (`1.txt`, `2.png`, `3.wav`, `4.mp4`); returns the paths.

        `reply.json` beside them lists the files in order. Those that it lists of a reply saved there before are
        removed, once all of this one is written; no other file is.

        Raises:
          OmniError: if a file cannot be written, or `reply.json` is another program's.
        """
        directory = Path(directory)
        index = directory / INDEX
        endings = {"text": "txt", "image": "png", "audio": "wav", "video": "mp4"}
        names = [f"{place}.{endings[part.modality]}" for place, part in enumerate(self.parts, start=1)]
        try:
            directory.mkdir(parents=True, exist_ok=True)
            before = _listed(index)
            with tempfile.TemporaryDirectory(dir=directory, prefix=".reply-") as partial:
                for name, part in zip(names, self.parts, strict=True):
                    part.save(Path(partial) / name)
                for name in before:
                    (directory / name).unlink(missing_ok=True)
                for name in names:
                    (Path(partial) / name).replace(directory / name)
        except OSError as error:
            raise OmniError(f"{directory}: no reply can be written there ({error.strerror})") from None
        content = {"files": names, "well_formed": self.well_formed}
        media.write_file(index, (json.dumps(content) + "\n").encode())
        return [directory / name for name in names]

    def __repr__(self) -> str:
        note = "" if self.well_formed else ", not well-formed"
        return f"Reply({', '.join(map(repr, self.parts))}{note})"

    def _repr_html_(self) -> str:
        return "".join(f'<div style="margin:6px 0">{_part_html(part)}</div>' for part in self.parts)


def _part_html(part: Part) -> str:
    return html.escape(part.text) if isinstance(part, Text) else part._repr_html_()


def _listed(index: Path) -> list[str]:
    """The files of a reply that was saved before; none if there is no index, an `OmniError` if it is no reply's."""
    if not index.exists():
        return []
    try:
        names = json.loads(index.read_text())["files"]
        return [name for name in names if re.fullmatch(r"\d+\.(txt|png|wav|mp4)", name)]  # nothing elsewhere
    except (ValueError, KeyError, TypeError):
        raise OmniError(f"{index}: is there, and lists no reply; choose another directory") from None


def make_replies(
    processor: Processor, generated: Sequence[Generated], stops: Sequence[StopStrings] | None = None
) -> list[Reply]:
    """Replies from what the engine gave; text is cut before the strings that end it, in `stops` one for each reply."""
    grammar = processor.grammar
    spans, formed = [], []
    for reply in generated:
        try:
            spans.append(reply_spans(grammar, reply.ids))
            formed.append(reply.well_formed)
        except GrammarError as error:
            spans.append(error.spans)
            formed.append(False)
    parts = processor.parts(spans)
    if stops is not None:
        parts = [[cut(part, stop) for part in reply] for reply, stop in zip(parts, stops, strict=True)]
    return [
        Reply(list(own_parts), reply.ids, list(own), ok, reply.log_probabilities)
        for own_parts, own, reply, ok in zip(parts, spans, generated, formed, strict=True)
    ]


def cut(part: Part, stop: StopStrings) -> Part:
    """The part; of a text what stands before a string that ends it."""
    return dataclasses.replace(part, text=stop.cut(part.text)) if isinstance(part, Text) else part


def stop_place(processor: Processor, stop: StopStrings, ids: Int[np.ndarray, " tokens"]) -> int | None:
    """How many of a reply's ids there are until one of its texts holds a stop string; None if none does."""
    grammar, tokenizer = processor.grammar, processor.tokenizer("text")
    place = 0
    for span in spans_so_far(grammar, ids)[0]:
        length = len(grammar.span_ids(span))
        if span.modality == "text" and stop.found(tokenizer.decode(span.codes)):
            return place + next(n for n in range(1, length + 1) if stop.found(tokenizer.decode(span.codes[:n])))
        place += length
    return None


def reply_spans(grammar: Grammar, ids: Int[np.ndarray, " tokens"]) -> list[Span]:
    """The spans of a reply; `GrammarError` where its ids go wrong."""
    return grammar.parse(np.concatenate([[grammar.control["bos"], grammar.control["turn"]], ids]).astype(np.int32))


def spans_so_far(grammar: Grammar, ids: Int[np.ndarray, " tokens"]) -> tuple[list[Span], bool]:
    """The spans of a reply that are whole, and whether the last of them is text that may go on."""
    try:
        spans = reply_spans(grammar, ids)
    except GrammarError as error:  # a span is still open, and the text before it has ended
        return error.spans, False
    ended = len(ids) > 0 and ids[-1] == grammar.control["eos"]
    return spans, bool(spans) and spans[-1].modality == "text" and not ended
