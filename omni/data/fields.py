"""Documents from records of named fields: the columns of a table, the files of an archive's sample, features."""

from __future__ import annotations

import abc
import dataclasses
import difflib
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from omni import media
from omni.data.sources import Samples, check_document
from omni.parts import Audio, Image, Part, Text
from omni_tokenizers.errors import OmniError, UsageError

MAX_BYTES = 1 << 29
"""Of one field: what is larger is not even looked at."""


@dataclass(frozen=True)
class Field:
    """One part of every document."""

    name: str
    """Column, feature, or extension (as "jpg" or "seg.png"; "jpg;png" takes whichever is there)."""
    part: Literal["text", "image", "audio"]
    """What it holds."""
    context: bool = False
    """Given, not learned; such fields come first."""
    sample_rate: int | None = None
    """In Hz, of sounds that are stored as bare samples."""

    @property
    def names(self) -> list[str]:
        """All names that it may have."""
        return self.name.split(";")


class FieldSamples(Samples):
    """Samples that are records of fields."""

    def __init__(self, fields: Sequence[Field]):
        if not fields:
            raise UsageError("fields names no part of the documents")
        self._fields = fields

    @abc.abstractmethod
    def record(self, index: int) -> Mapping[str, Any]:
        """The fields of a sample, those at least that were asked for; `OmniError` where it cannot be read."""

    def __getitem__(self, index: int) -> list[Part]:
        record = self.record(index)
        return check_document([_part(record, field) for field in self._fields])

    def texts(self, index: int) -> list[str]:
        record = self.record(index)
        return [_part(record, field).text for field in self._fields if field.part == "text"]

    def check_names(self, where: str, known: Collection[str]) -> None:
        """`UsageError` for a field of which no sample can have any."""
        for field in self._fields:
            if not set(field.names) & set(known):
                near = difflib.get_close_matches(field.name, known, 1, 0)
                raise UsageError(f"{where}: nothing is called {field.name!r} there; the nearest is {near[0]!r}")


def _part(record: Mapping[str, Any], field: Field) -> Part:
    name = next((name for name in field.names if record.get(name) is not None), None)
    if name is None:
        raise OmniError(f"{field.name}: there is none")
    value = record[name]
    if isinstance(value, Mapping):  # as Hugging Face's datasets store pictures and sounds
        value = value.get("bytes")
        if value is None:
            raise OmniError(f"{name}: holds no bytes, only the path of a file elsewhere; embed the files")
    if isinstance(value, bytes) and len(value) > MAX_BYTES:
        raise OmniError(f"{name}: {len(value)} bytes are more than {MAX_BYTES}")
    try:
        part = _READERS[field.part](value, name, field)
    except UsageError as error:  # of a part that is made from what is no such thing
        raise OmniError(f"{name}: {error}") from None
    return dataclasses.replace(part, context=True) if field.context else part


def _text(value: Any, name: str, field: Field) -> Text:
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise OmniError(f"{name}: not UTF-8 text (byte {error.start})") from None
    if isinstance(value, str) and not 0 < len(value) <= media.MAX_TEXT_BYTES:
        raise OmniError(f"{name}: a text of {len(value)} characters; it has 1 to {media.MAX_TEXT_BYTES}")
    return Text(value)


def _image(value: Any, name: str, field: Field) -> Image:
    return Image(media.decode_picture(io.BytesIO(value), name) if isinstance(value, bytes) else value)


def _audio(value: Any, name: str, field: Field) -> Audio:
    if isinstance(value, bytes):
        return Audio(*media.decode_sound(io.BytesIO(value), name))
    if field.sample_rate is None:
        raise OmniError(f"{name}: holds bare samples; say their sample_rate in its Field")
    samples = np.asarray(value)
    if samples.dtype.kind == "i" and samples.size and np.abs(samples).max() <= 32768:
        samples = samples.clip(-32768, 32767).astype(np.int16)  # stored as 16 bits, given back as 64 by tfds
    return Audio(samples, field.sample_rate)


_READERS = {"text": _text, "image": _image, "audio": _audio}
