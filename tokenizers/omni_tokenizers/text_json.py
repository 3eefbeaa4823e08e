"""Text tokenizers of public checkpoints: the file tokenizer.json of the package `tokenizers`."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from typing import Any, Self

import numpy as np
from etils import epath
from jaxtyping import Int

from omni_tokenizers.base import Tokenizer, fingerprint, read_object, write_description
from omni_tokenizers.errors import OmniError

MODEL = "text.json"
LARGEST = 1 << 27  # bytes of a tokenizer.json, most of them merges
_MOST_PIECES = 1 << 24


class JsonTextTokenizer(Tokenizer):
    """Strings to codes and back, by a tokenizer.json.

    Such a file numbers control tokens, and of early-fusion models the codes of pictures too, among its pieces of text.
    Here these have no code and never come out of a string, whatever is typed: code c is the piece of id `ids[c]`.
    """

    type = "text_json"
    modality = "text"

    def __init__(self, model: bytes, ids: Int[np.ndarray, " codes"] | None = None):
        """Wraps the content of a tokenizer.json.

        Args:
            model: the file's bytes.
            ids: the ids, in the file's numbering, that are text, ascending; all but special tokens unless given.
        Raises:
            OmniError: not such a file, or one without some of `ids`.
        """
        self._model, (known, special) = model, _numbering(model)
        self.ids = np.asarray(sorted(known - special) if ids is None else ids, np.int32)
        if not self.ids.size or not known.issuperset(self.ids.tolist()):
            raise OmniError("the text tokenizer lacks ids that the model's vocabulary counts as text")
        self.vocabulary_size = len(self.ids)
        self.codebook_sizes = (self.vocabulary_size,)
        self.hash = fingerprint(self._config(), {"model": np.frombuffer(model, np.uint8)})

    def _config(self) -> dict[str, Any]:
        return {"text_ids": _runs(self.ids)}

    @functools.cached_property
    def _tokenizer(self):
        try:
            import tokenizers
        except ImportError:
            message = "tokenizer.json is read with the package tokenizers: pip install 'omni-any-to-any[checkpoints]'"
            raise OmniError(message) from None
        content, text = json.loads(self._model), set(self.ids.tolist())
        for token in content.get("added_tokens") or []:
            token["special"] = token["special"] or token["id"] not in text  # so that typing it does not give it
        try:
            tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # the package raises nothing narrower
            raise OmniError(f"tokenizer.json cannot be read by the package tokenizers ({error})") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        return tokenizer

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
        try:
            found = np.array(self._tokenizer.encode(x, add_special_tokens=False).ids, np.int64)
        except (UnicodeError, TypeError) as error:
            raise OmniError(f"text is not valid Unicode: {error}") from None
        codes = np.where(found < len(self._code_of), self._code_of[np.minimum(found, len(self._code_of) - 1)], -1)
        if (codes < 0).any():
            piece = self._tokenizer.id_to_token(int(found[codes < 0][0]))
            raise OmniError(f"this text becomes the piece {piece!r}, which is no text to the model; write it otherwise")
        return codes.astype(np.int32)

    def decode(self, codes: Int[np.ndarray, " length"]) -> str:
        """The string of codes; those that are none are left out, and broken byte sequences read as U+FFFD."""
        codes = np.asarray(codes).ravel()
        codes = codes[(codes >= 0) & (codes < self.vocabulary_size)]
        return self._tokenizer.decode(self.ids[codes].tolist(), skip_special_tokens=False)

    def write_original(self, directory: epath.PathLike) -> None:
        """Writes the tokenizer.json that it was made of, and beside it what transformers asks for."""
        directory = epath.Path(directory)
        (directory / "tokenizer.json").write_bytes(self._model)
        (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n')

    def save(self, directory: epath.PathLike) -> None:
        """Writes tokenizer.json, here this package's description, and text.json, the file that it was made of."""
        directory = epath.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / MODEL).write_bytes(self._model)
        write_description(directory, {"type": self.type, "config": self._config(), "hash": self.hash})

    @classmethod
    def from_directory(cls, directory: epath.Path, description: dict) -> Self:
        try:
            runs = description["config"]["text_ids"]
            if not all(0 <= start < stop <= _MOST_PIECES for start, stop in runs) or len(runs) > _MOST_PIECES:
                raise ValueError("ids that no file has")
            ids = np.concatenate([np.arange(start, stop) for start, stop in runs])
        except (KeyError, TypeError, ValueError) as error:
            raise OmniError(f"{directory}: its tokenizer.json does not say which ids are text ({error})") from None
        return cls.from_file(directory / MODEL, ids)

    @classmethod
    def from_file(cls, path: epath.PathLike, ids: Int[np.ndarray, " codes"] | None = None) -> Self:
        """Reads the file of the package `tokenizers`; `ids` as in the constructor, whose errors name the file here."""
        path = epath.Path(path)
        if not path.exists():
            raise OmniError(f"{path}: the text tokenizer is missing")
        read_object(path, LARGEST)
        try:
            return cls(path.read_bytes(), ids)
        except OmniError as error:
            raise OmniError(f"{path}: {error}") from None


def _numbering(model: bytes) -> tuple[set[int], set[int]]:
    """All ids of a tokenizer.json, and those of its special tokens."""
    try:
        content = json.loads(model)
        pieces, added = content["model"]["vocab"], content.get("added_tokens") or []
        known = set(pieces.values()) if isinstance(pieces, dict) else set(range(len(pieces)))
        special = {token["id"] for token in added if token["special"]}
        known |= {token["id"] for token in added}
        if not all(type(number) is int and 0 <= number < _MOST_PIECES for number in known):
            raise ValueError("an id that is no number of a piece")
        return known, special
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise OmniError(f"not a tokenizer.json ({type(error).__name__}: {error})") from None


def _runs(ids: Iterable[int]) -> list[list[int]]:
    """Ascending ids as [first, one after the last] of each run."""
    ids = np.asarray(ids)
    breaks = np.flatnonzero(np.diff(ids) != 1) + 1
    return [[int(run[0]), int(run[-1]) + 1] for run in np.split(ids, breaks)]
