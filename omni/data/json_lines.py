"""Documents of interleaved text, pictures and sounds as JSON lines: `docs/data.md` describes them.

`document.schema.json` beside this file says in JSON Schema what `parse_document` accepts.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Int

from omni.data.sources import Samples, Source, check_document, files_of, inside, sizes_of
from omni.media import MAX_TEXT_BYTES
from omni.parts import Audio, Image, Part, Text
from omni.storage import StorageError, local_copy
from omni_tokenizers.errors import OmniError

EXTENSION = ".jsonl"
_BLOCK = 1 << 24  # bytes looked at together when lines are counted
_READERS: dict[str, Callable[[epath.Path], Part]] = {"image": Image.read, "audio": Audio.read}


class Entry(NamedTuple):
    """A part as it is written: `value` is its text, or the path of its file."""

    modality: str
    value: str
    context: bool


@dataclass(frozen=True)
class JsonLines(Source):
    """Documents as JSON lines, with files beside them."""

    path: str
    """A .jsonl file, or a directory that holds some."""
    folder: str | None = None
    """Directory to which the paths of pictures and sounds are relative, and below which they stay; None is that of
    their .jsonl file."""

    def open(self) -> Samples:
        """The lines of all files, in the order of their names."""
        return _Lines(self)


class _Lines(Samples):
    """One document a line."""

    def __init__(self, source: JsonLines):
        self._files = files_of(source.path, EXTENSION)
        self._folder = None if source.folder is None else epath.Path(source.folder)
        self._sizes = sizes_of(self._files)
        # A line alone is read from a disk fast, from a bucket by a request of its own.
        self._copies = [epath.Path(local_copy(file, self._sizes[file.name])) for file in self._files]
        self._lines = [_find_lines(file) for file in self._copies]
        self._ends = np.cumsum([len(lines) for lines in self._lines])
        if not len(self):
            raise OmniError(f"{source.path}: there are no lines in it")

    @property
    def description(self) -> dict[str, Any]:
        return {"kind": "json lines", "files": self._sizes}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def where(self, index: int) -> tuple[epath.Path, int]:
        file, line = self._place(index)
        return self._files[file], int(self._lines[file][line][2])

    def __getitem__(self, index: int) -> list[Part]:
        file, _ = self._place(index)
        return read_document(self._entries(index), self._folder or self._files[file].parent)

    def texts(self, index: int) -> list[str]:
        return [entry.value for entry in self._entries(index) if entry.modality == "text"]

    def _entries(self, index: int) -> list[Entry]:
        file, line = self._place(index)
        start, length, _ = self._lines[file][line].tolist()
        if length > MAX_TEXT_BYTES:
            raise OmniError(f"the line is longer than {MAX_TEXT_BYTES >> 20} MiB; split the document")
        with self._copies[file].open("rb") as stream:
            stream.seek(start)
            return parse_document(stream.read(length))

    def _place(self, index: int) -> tuple[int, int]:
        file = int(np.searchsorted(self._ends, index, side="right"))
        return file, index - int(self._ends[file - 1] if file else 0)


def _find_lines(path: epath.Path) -> Int[np.ndarray, "lines 3"]:
    """First byte, length and number, counted from 1, of each line that is not empty."""
    breaks, position = [], 0
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            breaks.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + position)
            position += len(block)
    ends = np.concatenate([*breaks, [position]]).astype(np.int64)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lines = np.stack([starts, ends - starts, np.arange(1, len(ends) + 1)], axis=1)
    return lines[[length > 1 or (length == 1 and not _is_blank(path, start)) for start, length, _ in lines.tolist()]]


def _is_blank(path: epath.Path, place: int) -> bool:
    """Whether the only byte of a line is the rest of a line's end of two bytes."""
    with path.open("rb") as stream:
        stream.seek(place)
        return stream.read(1) == b"\r"


def parse_document(line: bytes | str) -> list[Entry]:
    """The entries of a document's line.

    Raises:
      OmniError: no JSON, or JSON that is not a document; says which part, what was found and what is known.
    """
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise OmniError(f"not JSON ({error})") from None
    if not isinstance(document, dict):
        raise OmniError(f"a document is a JSON object, this is {_kind(document)}")
    _check_keys(document, ("parts", "meta"), "the document")
    parts = document.get("parts")
    if not isinstance(parts, list) or not parts:
        raise OmniError(f'"parts" must be a list of at least one part, found {_kind(parts)}')
    return [_parse_part(part, f"part {number}") for number, part in enumerate(parts, start=1)]


def _parse_part(part: Any, where: str) -> Entry:
    known = ("text", *_READERS)
    if not isinstance(part, dict):
        raise OmniError(f"{where}: a part is a JSON object, this is {_kind(part)}")
    _check_keys(part, (*known, "context"), where)
    named = [name for name in known if name in part]
    if len(named) != 1:
        raise OmniError(f"{where}: needs exactly one of {', '.join(known)}, found {' and '.join(named) or 'none'}")
    value, context = part[named[0]], part.get("context", False)
    if not isinstance(value, str) or not value:
        raise OmniError(f"{where}: {named[0]} must be a string that is not empty, found {_kind(value)}")
    if not isinstance(context, bool):
        raise OmniError(f"{where}: context must be true or false, found {_kind(context)}")
    return Entry(named[0], value, context)


def read_document(entries: list[Entry], folder: epath.Path) -> list[Part]:
    """The parts of a document whose files lie in a folder.

    Raises:
      OmniError: names the part that cannot be read.
      StorageError: a bucket refuses a file.
    """
    parts = []
    for number, (modality, value, context) in enumerate(entries, start=1):
        try:
            part = Text(value) if modality == "text" else _READERS[modality](inside(folder, value))
        except StorageError:
            raise
        except OmniError as error:
            raise OmniError(f"part {number}: {error}") from None
        parts.append(dataclasses.replace(part, context=True) if context else part)
    return check_document(parts)


def _check_keys(found: dict, known: tuple[str, ...], where: str) -> None:
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise OmniError(f"{where}: unknown key {key!r}; {hint}")


def _kind(value: Any) -> str:
    """A JSON value in words."""
    if isinstance(value, (dict, list)):
        return f"{'' if value else 'empty '}{'object' if isinstance(value, dict) else 'list'}"
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
