"""A reply while it comes: text in pieces, pictures by rows, sound by chunks, and every part once it is whole."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from omni.generate import Generated, Progress, is_whole
from omni.grammar import GrammarError, Span
from omni.parts import Audio, Image, Part, Text
from omni.processor import Processor
from omni.reply import Reply, cut, spans_so_far
from omni.stopping import StopStrings
from omni_tokenizers.errors import UsageError
from omni_tokenizers.streaming import StreamDecoder, StreamingCodec

SOUND_SECONDS = 0.25
HOP = 4  # tokens that come at once, at most


@dataclass(frozen=True, eq=False)
class Event:
    """Something that happened while a reply came.

    Attributes:
      kind: "text" (a piece of text), "rows" (the first rows of a picture that is being drawn), "sound" (the next piece
        of a sound), "part" (a part is whole), "end" (the reply is) or, of a server, "error" (there will be none).
      index: which part of the reply; at the end, the number of parts.
      text: the piece of text, or what went wrong.
      part: the whole part, the picture as far as it is drawn, or the piece of sound.
      reply: the whole reply, at its end.
    """

    kind: str
    index: int
    text: str = ""
    part: Part | None = None
    reply: Reply | None = None


class EventStream:
    """Turns the ids of one reply, as they come, into events in order.

    Pieces of sound come from codecs that are causal; together they are the whole sound (within what float32 rounds).
    A picture's rows are what the decoder makes of the rows of codes so far, with the last of them repeated below: where
    it looks beyond a row, as convolutions and attention do, pixels still change until the picture is whole.
    """

    def __init__(
        self,
        processor: Processor,
        stop: StopStrings | None = None,
        *,
        picture_rows: int = 0,
        sound_seconds: float = SOUND_SECONDS,
    ):
        """A stream of a reply that has not begun.

        Args:
          stop: strings that end the reply's text; what may become one is held back until it is known.
          picture_rows: rows of codes after which a picture is shown; 0 for whole pictures alone.
          sound_seconds: least length of a piece of sound; 0 for whole sounds alone.
        """
        if not (is_whole(picture_rows) and picture_rows >= 0 and 0 <= sound_seconds < math.inf):
            raise UsageError(
                f"picture_rows is a whole number, 0 for none, and sound_seconds a time, not {picture_rows!r} and "
                f"{sound_seconds!r}"
            )
        self._processor, self._grammar, self._stop = processor, processor.grammar, stop or StopStrings()
        self._picture_rows = picture_rows
        self._decoder = _sound_decoder(processor, sound_seconds)
        self._ids: list[Int[np.ndarray, " tokens"]] = []
        self._open = np.zeros(0, np.int32)  # ids behind the last part that cannot go on
        self._states = np.zeros(0, np.int32)  # after each of them
        self._parts: list[Part] = []
        self._spans: list[Span] = []
        self._shown = ""  # of the text that is open
        self._sent = 0  # rows or frames of the span that is open

    @property
    def hop(self) -> int:
        """Tokens after which to push: few, and so that a piece of sound waits for less than half of another one."""
        pieces = self._decoder and self._decoder.frames * self._decoder.codebooks
        return max(1, min(HOP, pieces // 2)) if pieces else HOP

    def of(self, progress: Progress) -> Iterator[Event]:
        """The events of what is new of the reply."""
        yield from self.push(progress.ids)
        if progress.reply:
            yield from self.end(progress.reply)

    def push(self, ids: Int[np.ndarray, " tokens"]) -> Iterator[Event]:
        """The events of the reply's next ids."""
        self._ids.append(ids)
        self._open = np.concatenate([self._open, ids])
        spans, open_text = spans_so_far(self._grammar, self._open)
        whole = spans[: len(spans) - open_text]
        yield from self._whole(whole)
        self._forget(whole)
        if open_text:
            yield from self._text(spans[-1])
        elif begun := self._begun_span():
            yield from self._begun(begun)

    def end(self, reply: Generated) -> Iterator[Event]:
        """The events at the end of the reply; all its ids were pushed."""
        spans, _ = spans_so_far(self._grammar, self._open)
        yield from self._whole(spans)
        self._forget(spans)
        ids = np.concatenate(self._ids) if self._ids else self._open
        whole = Reply(self._parts, ids, self._spans, reply.well_formed, reply.log_probabilities)
        yield Event("end", len(self._parts), reply=whole)

    def _forget(self, whole: list[Span]) -> None:
        """Leaves out what whole spans are made of: it is not parsed again."""
        length = sum(len(self._grammar.span_ids(span)) for span in whole)
        self._spans += whole
        self._open, self._states = self._open[length:], self._states[length:]

    def _begun_span(self) -> Span | None:
        """The span that the ids leave open, if they do."""
        behind = self._open[len(self._states) :]
        try:
            states = self._grammar.follow(int(self._states[-1]) if len(self._states) else None, behind)
        except GrammarError:
            return None
        self._states = np.concatenate([self._states, states])
        return self._grammar.begun(self._open, self._states)

    def _whole(self, spans: list[Span]) -> Iterator[Event]:
        """Parts that have become whole, with what of them was not given in pieces."""
        for span in spans:
            index = len(self._parts)
            part = cut(self._processor.parts([[span]])[0][0], self._stop)
            if isinstance(part, Text) and part.text[len(self._shown) :]:
                yield Event("text", index, text=part.text[len(self._shown) :])
            if isinstance(part, Audio) and self._decoder:
                yield from self._sound(span.codes[:, 0], ended=True)
            self._parts.append(part)
            self._shown, self._sent = "", 0
            yield Event("part", index, part=part)

    def _text(self, span: Span) -> Iterator[Event]:
        """What is new of a text that may go on."""
        text = self._processor.parts([[span]])[0][0].text
        # Bytes of a character may still be missing at the end of what has come.
        text = self._stop.settled(self._stop.cut(text).rstrip("\ufffd"))
        # A tokenizer may take back more than the last character.
        if text.startswith(self._shown) and len(text) > len(self._shown):
            yield Event("text", len(self._parts), text=text[len(self._shown) :])
            self._shown = text

    def _begun(self, span: Span) -> Iterator[Event]:
        """What is new of a picture or a sound that has begun."""
        if span.modality == "audio" and self._decoder:
            whole = (span.codes[:, 0] >= 0).all(axis=0)
            frames = len(whole) if whole.all() else int(np.argmin(whole))
            yield from self._sound(span.codes[:, 0, :frames])
        if span.modality == "image" and self._picture_rows:
            whole = (span.codes[0] >= 0).all(axis=-1)
            rows = int(np.argmin(whole))  # the last one cannot be whole: then the picture would be
            if rows >= self._sent + self._picture_rows:
                self._sent = rows
                yield Event("rows", len(self._parts), part=self._picture(span, rows))

    def _sound(self, codes: Int[np.ndarray, "codebooks frames"], ended: bool = False) -> Iterator[Event]:
        """The next pieces of a sound, whose codes so far these are."""
        if not self._sent:
            self._decoder.reset()
        samples = self._decoder.push([codes[:, self._sent :]])[0]
        self._sent = codes.shape[1]
        if ended:
            samples = np.concatenate([samples, self._decoder.finish()], axis=1)
        if samples.size:
            rate = self._decoder.tokenizer.sample_rate
            yield Event("sound", len(self._parts), part=Audio(samples, rate))

    def _picture(self, span: Span, rows: int) -> Image:
        known = np.minimum(np.arange(span.codes.shape[1]), rows - 1)
        codes = span.codes[:, known]
        picture = self._processor.parts([[dataclasses.replace(span, codes=codes)]])[0][0]
        return Image(picture.pixels[: picture.pixels.shape[0] * rows // codes.shape[1]])


def _sound_decoder(processor: Processor, seconds: float) -> StreamDecoder | None:
    """What decodes sound in pieces; None where the model makes none, or its codec is not causal."""
    codec = processor.tokenizers.get("audio")
    if not seconds or not isinstance(codec, StreamingCodec) or codec.obstacle is not None:
        return None
    return codec.stream(frames=max(1, math.ceil(seconds * codec.sample_rate / codec.samples_per_frame))).decoder
