"""What text tokenizers of public checkpoints share: which ids of their file are text, and numbers of text alone."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from etils import epath
from jaxtyping import Int

from omni_tokenizers.base import Tokenizer, fingerprint, read_object, write_description
from omni_tokenizers.errors import OmniError

TEXT_FILES = JSON_FILE, PIECES_FILE = "tokenizer.json", "tokenizer.model"
"""What text tokenizers are read from, the first that is there."""
SETTINGS = "tokenizer_config.json"
LARGEST = 1 << 27  # bytes of such a file
MOST_PIECES = 1 << 24


class PublicTextTokenizer(Tokenizer):
    """Strings to codes and back, by the file of a public checkpoint.

    Such a file numbers control tokens, and of early-fusion models the codes of pictures too, among its pieces of text.
    Here these have no code and never come out of a string, whatever is typed: code c is the piece of id `ids[c]`.

    Subclasses say which ids their file has (`numbering`), and how it makes ids of a string and a string of ids.
    """

    modality = "text"
    file: ClassVar[str]
    """Name of the file in a checkpoint."""
    saved_file: ClassVar[str]
    """Its name in this package's own directory."""
    transformers_class: ClassVar[str]
    """The tokenizer of transformers that reads the file."""

    def __init__(self, model: bytes, ids: Int[np.ndarray, " codes"] | None = None):
        """Wraps the content of such a file.

        Args:
            model: the file's bytes.
            ids: the ids, in the file's numbering, that are text, ascending; all but special tokens unless given.
        Raises:
            OmniError: not such a file, or one without some of `ids`.
        """
        self._model = model
        known, special = self.numbering()
        self.ids = np.asarray(sorted(known - special) if ids is None else ids, np.int32)
        if not self.ids.size or not known.issuperset(self.ids.tolist()):
            raise OmniError("the text tokenizer lacks ids that the model's vocabulary counts as text")
        self.vocabulary_size = len(self.ids)
        self.codebook_sizes = (self.vocabulary_size,)
        self.hash = fingerprint(self._config(), {"model": np.frombuffer(model, np.uint8)})

    def _config(self) -> dict[str, Any]:
        return {"text_ids": _runs(self.ids)}

    @abc.abstractmethod
    def numbering(self) -> tuple[set[int], set[int]]:
        """All ids of the file, and those of its special tokens."""

    @abc.abstractmethod
    def _ids_of(self, text: str) -> Sequence[int]:
        """The file's ids of a string; UnicodeError or TypeError for one that is not valid."""

    @abc.abstractmethod
    def _text_of(self, ids: list[int]) -> str:
        """The string of ids that are text."""

    @abc.abstractmethod
    def _piece(self, token: int) -> str:
        """The name of an id."""

    @functools.cached_property
    def _code_of(self) -> Int[np.ndarray, " ids"]:
        codes = np.full(int(self.ids.max()) + 1, -1, np.int32)
        codes[self.ids] = np.arange(len(self.ids))
        return codes

    def encode(self, x: str) -> Int[np.ndarray, " length"]:
        """Codes (int32) of a string; `ids` of them are the file's own ids, without special tokens around them.

        Raises:
            OmniError: not a string, one with lone surrogates, or one that only pieces that are no text can write.
        """
        if not isinstance(x, str):
            raise OmniError(f"text must be a string, got {type(x).__name__}")
        codes, found = self._codes_by(self._ids_of, x)
        if (codes < 0).any():
            raise self._no_text(found[codes < 0][0])
        return codes

    def _codes_by(
        self, ids_of: Callable[[str], Sequence[int]], text: str
    ) -> tuple[Int[np.ndarray, " length"], Int[np.ndarray, " length"]]:
        """Codes (int32), -1 for what is no text, and ids (int64) of a string."""
        try:
            found = np.array(ids_of(text), np.int64)
        except (UnicodeError, TypeError) as error:
            raise OmniError(f"text is not valid Unicode: {error}") from None
        codes = np.where(found < len(self._code_of), self._code_of[np.minimum(found, len(self._code_of) - 1)], -1)
        return codes.astype(np.int32), found

    def _no_text(self, token: int) -> OmniError:
        piece = self._piece(int(token))
        return OmniError(f"this text becomes the piece {piece!r}, which is no text to the model; write it otherwise")

    def decode(self, codes: Int[np.ndarray, " length"]) -> str:
        """The string of codes; those that are none are left out, and broken byte sequences read as U+FFFD."""
        codes = np.asarray(codes).ravel()
        codes = codes[(codes >= 0) & (codes < self.vocabulary_size)]
        return self._text_of(self.ids[codes].tolist())

    def write_original(self, directory: epath.PathLike) -> None:
        """Writes the file that it was made of, and beside it what transformers asks for."""
        directory = epath.Path(directory)
        (directory / self.file).write_bytes(self._model)
        (directory / SETTINGS).write_text(f'{{"tokenizer_class": "{self.transformers_class}"}}\n')

    def save(self, directory: epath.PathLike) -> None:
        """Writes tokenizer.json, here this package's description, and the file that it was made of."""
        directory = epath.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / self.saved_file).write_bytes(self._model)
        write_description(directory, {"type": self.type, "config": self._config(), "hash": self.hash})

    @classmethod
    def from_directory(cls, directory: epath.Path, description: dict) -> Self:
        try:
            runs = description["config"]["text_ids"]
            if not all(0 <= start < stop <= MOST_PIECES for start, stop in runs) or len(runs) > MOST_PIECES:
                raise ValueError("ids that no file has")
            ids = np.concatenate([np.arange(start, stop) for start, stop in runs])
        except (KeyError, TypeError, ValueError) as error:
            raise OmniError(f"{directory}: its tokenizer.json does not say which ids are text ({error})") from None
        return cls.from_file(directory / cls.saved_file, ids)

    @classmethod
    def from_file(cls, path: epath.PathLike, ids: Int[np.ndarray, " codes"] | None = None) -> Self:
        """Reads such a file; `ids` as in the constructor, whose errors name the file here."""
        path = epath.Path(path)
        if not path.exists():
            raise OmniError(f"{path}: the text tokenizer is missing")
        if path.stat().length > LARGEST:
            raise OmniError(f"{path}: larger than {LARGEST} bytes, so not the text tokenizer it should be")
        try:
            return cls(path.read_bytes(), ids)
        except OmniError as error:
            raise OmniError(f"{path}: {error}") from None


def public_text(directory: epath.PathLike, ids: Int[np.ndarray, " codes"] | None = None) -> PublicTextTokenizer | None:
    """The text tokenizer of a checkpoint, of its tokenizer.json or else its tokenizer.model; None if it has neither.

    Raises:
        OmniError: a damaged file, or a tokenizer.model to whose pieces other files add tokens.
    """
    from omni_tokenizers.text_json import JsonTextTokenizer
    from omni_tokenizers.text_pieces import PieceTextTokenizer

    for kind in (JsonTextTokenizer, PieceTextTokenizer):
        if (path := epath.Path(directory) / kind.file).exists():
            text = kind.from_file(path, ids)
            more = [] if kind is JsonTextTokenizer else [*added_tokens(directory).items()]
            if lacking := [name for name, token in more if not text.has(name, token)]:
                raise OmniError(
                    f"{path}: lacks the added token {lacking[0]!r} of the files beside it; let transformers save it as "
                    "tokenizer.json"
                )
            return text
    return None


def added_tokens(directory: epath.PathLike) -> dict[str, int]:
    """Ids by name of the tokens that a checkpoint adds to the pieces of its text: those of tokenizer.json, or where
    there is none, of the two files in which older versions of transformers wrote them.

    Raises:
        OmniError: a damaged file, or what is no id.
    """
    directory = epath.Path(directory)
    whole, alone, settings = (directory / name for name in (JSON_FILE, "added_tokens.json", SETTINGS))
    if whole.exists():
        entries = read_object(whole, LARGEST).get("added_tokens")
        entries = entries if isinstance(entries, list) else []  # what reads the whole file refuses any other form
        found = [(whole, entry.get("content"), entry.get("id")) for entry in entries if isinstance(entry, dict)]
    else:
        named = read_object(alone, LARGEST) if alone.exists() else {}
        decoder = read_object(settings, LARGEST).get("added_tokens_decoder") if settings.exists() else {}
        decoder = decoder if isinstance(decoder, dict) else {}
        found = [(alone, name, token) for name, token in named.items()]
        for token, entry in decoder.items():
            name = entry.get("content") if isinstance(entry, dict) else None
            found.append((settings, name, int(token) if token.isascii() and token.isdecimal() else token))
    for path, name, token in found:
        if type(name) is not str or type(token) is not int or not 0 <= token < MOST_PIECES:
            raise OmniError(f"{path}: the added token {name!r} has {token!r}, which is no id")
    return {name: token for _, name, token in found}


def _runs(ids: Iterable[int]) -> list[list[int]]:
    """Ascending ids as [first, one after the last] of each run."""
    ids = np.asarray(ids)
    breaks = np.flatnonzero(np.diff(ids) != 1) + 1
    return [[int(run[0]), int(run[-1]) + 1] for run in np.split(ids, breaks)]
