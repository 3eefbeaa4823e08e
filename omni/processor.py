"""Between parts and ids: every part goes through the tokenizer of its modality and the layout of the grammar."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from omni.grammar import Grammar, Span, Tokens
from omni.image_processor import ImageProcessor
from omni.parts import Audio, Image, Part, Text, Video, as_part, read_part
from omni.vocabulary import Vocabulary
from omni_tokenizers.codes import Codes
from omni_tokenizers.errors import OmniError

See = Callable[[Float[np.ndarray, "batch side side 3"]], Float[np.ndarray, "batch features dim"]]

_NO_CODES = np.zeros((1, 0, 0), np.int32)
_BATCH = 256  # pictures or sounds that go through a tokenizer together
_BATCH_PIXELS = 1 << 24  # of these pictures, so that their values take 200 MB


class Processor:
    """Turns documents of parts into ids and back.

    Raises:
      OmniError: if a tokenizer's codebooks are larger than the blocks that the grammar gives them.
    """

    def __init__(self, vocabulary: Vocabulary, grammar: Grammar, tokenizers: Mapping[str, Any], see: See | None = None):
        """A processor; `see` makes features of pictures as the image processor scales them, None where the model sees
        codes alone."""
        self.vocabulary, self.grammar, self.tokenizers = vocabulary, grammar, dict(tokenizers)
        for modality, layout in grammar.layouts.items():
            if modality in self.tokenizers:
                sizes = tuple(self.tokenizers[modality].codebook_sizes)
                blocks = tuple(len(table) for table in layout.tables)
                if sizes != blocks:
                    raise OmniError(f"the {modality} tokenizer has codebooks {sizes}, the vocabulary blocks {blocks}")
        layout = grammar.layouts.get("image")
        declared = layout.preprocessing if layout else None
        self.image_processor = (
            None if declared is None else ImageProcessor.from_json(declared, "grammar: preprocessing")
        )
        self._see = see if layout and layout.seen else None

    def tokenizer(self, modality: str):
        """The tokenizer of a modality; `OmniError` if the model came without it."""
        self.grammar.index(modality)
        if modality not in self.tokenizers:
            public = ", or the tokenizer.json or tokenizer.model of a public checkpoint" if modality == "text" else ""
            raise OmniError(
                f"this model came without its {modality} tokenizer: add the directory tokenizers/{modality}{public}"
            )
        return self.tokenizers[modality]

    @property
    def frame_rate(self) -> float | None:
        """Frames a second of the videos that the model reads and writes; None where it knows none, or no rate."""
        layout = self.grammar.layouts.get("video")
        return layout.frame_rate if layout else None

    @property
    def most_frames(self) -> int | None:
        """Frames of pixels of the longest video that the model reads; None where it knows none."""
        layout = self.grammar.layouts.get("video")
        if layout is None:
            return None
        tokenizer = self.tokenizer("video")
        return tokenizer.config.strides[0] * max(frames for frames, _, _ in layout.shapes) - tokenizer.lead

    def read(self, path: str | os.PathLike) -> Part:
        """Reads a file as `read_part` does; of a video only the frames that the model sees, and none if too many."""
        if self.grammar.layouts.get("video") is None:
            return read_part(path)
        return read_part(path, self.frame_rate, self.most_frames)

    def part(self, value) -> Part:
        """What stands for a part as one (see `as_part`); a file is read as `read` does."""
        return self.read(value) if isinstance(value, os.PathLike) else as_part(value)

    # Parts to ids

    def spans(self, documents: Sequence[Sequence[Part]], prompts: bool = False) -> list[list[Span]]:
        """Codes of the parts of several documents.

        Pictures and sounds of all of them are tokenized together, videos one by one: they are large, and of many
        lengths.

        Args:
          prompts: whether these are prompts, of which a model that sees has features of pictures in place of codes.
        """
        flat = [part for document in documents for part in document]
        spans: list[Span | None] = [None] * len(flat)
        encoders = {
            "text": self._encode_text,
            "image": self._encode_images,
            "audio": self._encode_audio,
            "video": self._encode_videos,
        }
        seen = ("image",) if prompts and self._see else ()
        for modality, encode in encoders.items():
            places = [i for i, part in enumerate(flat) if part.modality == modality]
            for start in range(0, len(places), _BATCH):
                chunk = places[start : start + _BATCH]
                parts = [flat[i] for i in chunk]
                for place, made in zip(chunk, self.see(parts) if modality in seen else encode(parts), strict=True):
                    more = {"codes": _NO_CODES, "features": made} if modality in seen else {"codes": made}
                    spans[place] = Span(modality, context=flat[place].context, **more)
        iterator = iter(spans)
        return [[next(iterator) for _ in document] for document in documents]

    def prepared(self, part: Part) -> Part:
        """A part as its tokenizer takes it: a picture or video of its size, a sound or video of its rate.

        `spans` does so itself; done before, by other threads, it leaves less to what feeds a device.

        Raises:
          OmniError: no tokenizer of this modality, or a sound or video that is longer than the grammar holds.
        """
        tokenizer = self.tokenizer(part.modality)
        match part:
            case Image():
                return self._scaled(part)
            case Audio():
                step, longest = tokenizer.samples_per_frame, max(c for _, c in self.grammar.layouts["audio"].shapes)
                limit = longest * step / tokenizer.sample_rate
                if part.seconds > limit:
                    raise OmniError(
                        f"a sound of {part.seconds:.2f} s is too long: this model takes at most {limit:.2f} s"
                    )
                part = part.mono().resample(tokenizer.sample_rate)
                samples = part.samples[:, : longest * step]  # resampled, it may have become one longer
                return dataclasses.replace(part, samples=samples) if samples.size < part.samples.size else part
            case Video():
                rate, most = self._declared_rate(), self.most_frames
                if part.seconds * rate >= most:
                    limit = f"{most} frames at {rate:g} a second"
                    raise OmniError(f"a video of {part.seconds:.2f} s is too long: this model takes at most {limit}")
                size = tokenizer.config.image_size
                return part.resample(rate).resize_crop(size, size)
        return part

    def see(self, parts: Sequence[Image]) -> Float[np.ndarray, "pictures features dim"]:
        """Features of pictures, float32; `OmniError` of a model that sees none."""
        if self._see is None:
            raise OmniError("this model has no features of pictures: it reads their codes")
        pixels = np.stack([self.image_processor.resized(part).pixels for part in parts])
        return self._see(self.image_processor.values(pixels))

    def tokens(self, parts: Sequence[Part]) -> Tokens:
        """A whole document; parts marked `context` come before `turn`."""
        return self.grammar.pack(self.spans([parts])[0])

    def _encode_text(self, parts: Sequence[Text]) -> list[Int[np.ndarray, " tokens"]]:
        tokenizer = self.tokenizer("text")
        return [np.asarray(tokenizer.encode(part.text), np.int32) for part in parts]

    def _scaled(self, part: Image) -> Image:
        """A picture at the size that its tokenizer takes.

        One that is given has the size that the family's processor gives it; one to be drawn, of those that are drawn
        the one nearest to that.
        """
        tokenizer, layout = self.tokenizer("image"), self.grammar.layouts["image"]
        if self.image_processor is None:
            return part.resize_crop(tokenizer.image_size, tokenizer.image_size)
        scaled = self.image_processor.resized(part)
        strides = tokenizer.config.strides[-2:]
        grid = tuple(side // stride for side, stride in zip(scaled.pixels.shape, strides, strict=False))
        if grid in layout.shapes or (part.context and layout.spelling):
            return scaled
        rows, columns = min(layout.shapes, key=lambda size: sum(abs(np.log(np.divide(size, grid)))))
        return part.resize_crop(rows * strides[0], columns * strides[1])

    def _encode_images(self, parts: Sequence[Image]) -> list[Int[np.ndarray, "1 rows columns"]]:
        tokenizer, scaled = self.tokenizer("image"), [self.prepared(part).pixels for part in parts]

        def encode(pixels):
            if self.image_processor is None:
                return np.asarray(tokenizer.encode(pixels))[:, None]
            return np.asarray(tokenizer.encode_values(self.image_processor.values(pixels)))[:, None]

        return _by_shape(scaled, encode)

    def _encode_audio(self, parts: Sequence[Audio]) -> list[Int[np.ndarray, "codebooks 1 frames"]]:
        tokenizer = self.tokenizer("audio")
        clips = [self.prepared(part).samples[0] for part in parts]
        lengths = np.array([len(clip) for clip in clips])
        batch = np.zeros((len(clips), 1, lengths.max()), np.float32)
        for row, clip in zip(batch, clips, strict=True):
            row[0, : len(clip)] = clip
        codes = np.asarray(tokenizer.encode(batch, lengths=lengths))
        frames = -(-lengths // tokenizer.samples_per_frame)
        return [item[:, None, :n] for item, n in zip(codes, frames, strict=True)]

    def _encode_videos(self, parts: Sequence[Video]) -> list[Int[np.ndarray, "1 frames rows columns"]]:
        tokenizer = self.tokenizer("video")
        # A batch of one stands for the only codebook.
        return [np.asarray(tokenizer.encode(self.prepared(part).frames[None])) for part in parts]

    def _declared_rate(self) -> float:
        if self.frame_rate is None:
            raise OmniError('grammar: "video" needs a "frame_rate", frames a second, to read and write videos')
        return self.frame_rate

    # Ids to parts

    def parts(self, documents: Sequence[Sequence[Span]]) -> list[list[Part]]:
        """Parts of the spans of several documents; pictures and sounds of all of them are decoded together."""
        flat = [span for document in documents for span in document]
        parts: list[Part | None] = [None] * len(flat)
        decoders = {
            "text": self._decode_text,
            "image": self._decode_images,
            "audio": self._decode_audio,
            "video": self._decode_videos,
        }
        if codes_alone := {span.modality for span in flat} - set(decoders):
            raise OmniError(
                f"{min(codes_alone)} is codes alone to this model, of which no part is made: ask for others with want, "
                "or for ids with model.engine.generate"
            )
        for modality, decode in decoders.items():
            places = [i for i, span in enumerate(flat) if span.modality == modality]
            for start in range(0, len(places), _BATCH):
                chunk = places[start : start + _BATCH]
                for place, part in zip(chunk, decode([flat[i] for i in chunk]), strict=True):
                    parts[place] = part
        iterator = iter(parts)
        return [[next(iterator) for _ in document] for document in documents]

    def _decode_text(self, spans: Sequence[Span]) -> list[Text]:
        tokenizer = self.tokenizer("text")
        return [Text(tokenizer.decode(span.codes), context=span.context) for span in spans]

    def _decode_images(self, spans: Sequence[Span]) -> list[Image]:
        tokenizer = self.tokenizer("image")
        pixels = _by_shape([span.codes[0] for span in spans], tokenizer.decode)
        return [Image(picture, context=span.context) for picture, span in zip(pixels, spans, strict=True)]

    def _decode_audio(self, spans: Sequence[Span]) -> list[Audio]:
        tokenizer = self.tokenizer("audio")
        frames = np.array([span.codes.shape[2] for span in spans])
        ids = np.zeros((len(spans), spans[0].codes.shape[0], frames.max()), np.int32)
        for row, span in zip(ids, spans, strict=True):
            row[:, : span.codes.shape[2]] = span.codes[:, 0]
        lengths = frames * tokenizer.samples_per_frame
        samples = tokenizer.decode(Codes(ids, lengths))
        return [
            Audio(clip[:, :length], tokenizer.sample_rate, context=span.context)
            for clip, length, span in zip(samples, lengths, spans, strict=True)
        ]

    def _decode_videos(self, spans: Sequence[Span]) -> list[Video]:
        tokenizer, rate = self.tokenizer("video"), self._declared_rate()
        return [Video.at_rate(tokenizer.decode(span.codes)[0], rate, context=span.context) for span in spans]


def given(parts: Sequence[Part]) -> list[Part]:
    """Parts marked as context: of a prompt nothing is to be produced."""
    return [dataclasses.replace(part, context=True) for part in parts]


def _by_shape(arrays: Sequence[np.ndarray], function: Callable[[np.ndarray], Sequence]) -> list:
    """What `function` makes of stacked arrays of rows and columns, one of each, in their order; those of one shape go
    together, up to `_BATCH_PIXELS` of them."""
    results: list = [None] * len(arrays)
    for shape in dict.fromkeys(array.shape for array in arrays):
        every = [place for place, array in enumerate(arrays) if array.shape == shape]
        most = max(1, _BATCH_PIXELS // math.prod(shape[:2]))
        for places in (every[start : start + most] for start in range(0, len(every), most)):
            for place, result in zip(places, function(np.stack([arrays[place] for place in places])), strict=True):
                results[place] = result
    return results
