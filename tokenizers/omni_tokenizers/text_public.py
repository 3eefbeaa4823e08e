"""What text tokenizers of public checkpoints share: which ids of their file are text, and numbers of text alone."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from etils import epath
from jaxtyping import Int

from omni_tokenizers.base import Tokenizer, fingerprint, write_description
from omni_tokenizers.errors import OmniError

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
        (directory / "tokenizer_config.json").write_text(f'{{"tokenizer_class": "{self.transformers_class}"}}\n')

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
    """The text tokenizer of a checkpoint, of its tokenizer.json or else its tokenizer.model; None if it has neither."""
    from omni_tokenizers.text_json import JsonTextTokenizer
    from omni_tokenizers.text_pieces import PieceTextTokenizer

    for kind in (JsonTextTokenizer, PieceTextTokenizer):
        if (path := epath.Path(directory) / kind.file).exists():
            return kind.from_file(path, ids)
    return None


def _runs(ids: Iterable[int]) -> list[list[int]]:
    """Ascending ids as [first, one after the last] of each run."""
    ids = np.asarray(ids)
    breaks = np.flatnonzero(np.diff(ids) != 1) + 1
    return [[int(run[0]), int(run[-1]) + 1] for run in np.split(ids, breaks)]
