"""Text tokenizers of public checkpoints: the file tokenizer.json of the package `tokenizers`."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Self

import numpy as np
from etils import epath
from jaxtyping import Int

from omni_tokenizers.base import Tokenizer, fingerprint, read_object, write_description
from omni_tokenizers.errors import OmniError

MODEL = "text.json"
LARGEST = 1 << 27  # bytes of a tokenizer.json, most of them merges
BREAK = "\U0010fffd"
"""Breaks in a prompt what only looks like a token's name (`Names.broken`); it is gone before text becomes pieces."""
_MOST_PIECES = 1 << 24


class Names:
    """Finds names of tokens in text, the longest where several begin."""

    def __init__(self, names: Collection[str]):
        self._names, self._first = frozenset(names), {name[0] for name in names if name}
        self._lengths = sorted({len(name) for name in names}, reverse=True)

    def at(self, text: str, place: int) -> str | None:
        """The name that begins at a place; None if none does."""
        if text[place] not in self._first:
            return None
        found = (text[place : place + length] for length in self._lengths)
        return next((name for name in found if name in self._names), None)

    def broken(self, texts: Sequence[str]) -> list[str]:
        """Texts that may come to stand one behind the other, with `BREAK` in every name, also in those that only all of
        them together have."""
        whole, place, found = "".join(texts), 0, []
        for text in texts:
            signs = (sign + BREAK if self.at(whole, place + i) else sign for i, sign in enumerate(text))
            found.append("".join(signs))
            place += len(text)
        return found


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
        self._model, (self._named, self._added, special) = model, _numbering(model)
        known = set(self._named.values())
        self.ids = np.asarray(sorted(known - special) if ids is None else ids, np.int32)
        if not self.ids.size or not known.issuperset(self.ids.tolist()):
            raise OmniError("the text tokenizer lacks ids that the model's vocabulary counts as text")
        self.vocabulary_size = len(self.ids)
        self.codebook_sizes = (self.vocabulary_size,)
        self.hash = fingerprint(self._config(), {"model": np.frombuffer(model, np.uint8)})

    def _config(self) -> dict[str, Any]:
        return {"text_ids": _runs(self.ids)}

    @functools.cached_property
    def control(self) -> dict[str, int]:
        """Ids, in the file's numbering, of the names that are no text, such as those of control tokens."""
        text = set(self.ids.tolist())
        return {name: number for name, number in self._named.items() if number not in text}

    @property
    def added(self) -> list[str]:
        """Names of added tokens that are text, and come out of a string whole, such as "<think>"."""
        return [name for name in self._added if name not in self.control]

    @functools.cached_property
    def _tokenizer(self):
        content = json.loads(self._model)
        for token in content.get("added_tokens") or []:
            token["special"] = token["special"] or token["content"] in self.control  # so that typing it gives letters
        tokenizer = _made(content)
        tokenizer.encode_special_tokens = True
        return tokenizer

    @functools.cached_property
    def _prompt_tokenizer(self):
        """One that reads names of control tokens as these, and nothing of `BREAK`."""
        content, plain = json.loads(self._model), dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        listed = set(self._added)
        missing = {name: id for name, id in self.control.items() if name not in listed}
        added = [{"id": id, "content": name} | plain for name, id in missing.items()]
        added = [*(content.get("added_tokens") or []), *added]
        for token in added:
            if token["content"] in self.control:  # behind the normalizer a name would be found without its break
                token |= {"special": True, "normalized": False}
        cleaned = [{"type": "Replace", "pattern": {"String": BREAK}, "content": ""}, content.get("normalizer")]
        normalizer = {"type": "Sequence", "normalizers": [each for each in cleaned if each]}
        return _made(content | {"added_tokens": added, "normalizer": normalizer})

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
        codes, found = self._encoded(self._tokenizer, x)
        if (codes < 0).any():
            raise self._no_text(found[codes < 0][0])
        return codes

    def encode_between(self, pieces: Sequence[str | int]) -> list[Int[np.ndarray, " length"]]:
        """Codes (int32) of the text before, between and behind the control tokens of a prompt.

        All of it is read together, as transformers reads what a template has written: text ends at control tokens, not
        at the ends of strings. In the strings, names of control tokens are broken (`Names.broken`).

        Args:
            pieces: text, and control tokens as ids of the file.
        Raises:
            OmniError: an id that is none of these, and text that becomes one, or what else is no text.
        """
        names = {id: name for name, id in self.control.items()}
        wanted = [piece for piece in pieces if not isinstance(piece, str)]
        if unknown := set(wanted) - set(names):
            raise OmniError(f"tokenizer.json has no control token of id {min(unknown)}, which the prompt needs")
        text = "".join(piece if isinstance(piece, str) else names[piece] for piece in pieces)
        codes, found = self._encoded(self._prompt_tokenizer, text)
        places = np.flatnonzero(codes < 0)
        for place, id in itertools.zip_longest(found[places].tolist(), wanted):
            if place != id:
                raise self._no_text(id if place is None else place)
        return [stretch[stretch >= 0] for stretch in np.split(codes, places)]

    def _encoded(self, tokenizer, text: str) -> tuple[Int[np.ndarray, " length"], Int[np.ndarray, " length"]]:
        """Codes (int32), -1 for what is no text, and ids (int64) of a string."""
        try:
            found = np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
        except (UnicodeError, TypeError) as error:
            raise OmniError(f"text is not valid Unicode: {error}") from None
        codes = np.where(found < len(self._code_of), self._code_of[np.minimum(found, len(self._code_of) - 1)], -1)
        return codes.astype(np.int32), found

    def _no_text(self, id: int) -> OmniError:
        piece = self._tokenizer.id_to_token(int(id))
        return OmniError(f"this text becomes the piece {piece!r}, which is no text to the model; write it otherwise")

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


def _made(content: dict[str, Any]):
    """The package's tokenizer of the content of a tokenizer.json."""
    try:
        import tokenizers
    except ImportError:
        message = "tokenizer.json is read with the package tokenizers: pip install 'omni-any-to-any[checkpoints]'"
        raise OmniError(message) from None
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the package raises nothing narrower
        raise OmniError(f"tokenizer.json cannot be read by the package tokenizers ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _numbering(model: bytes) -> tuple[dict[str, int], list[str], set[int]]:
    """All ids of a tokenizer.json by name, the names of added tokens, and the ids of special ones."""
    try:
        content = json.loads(model)
        pieces, added = content["model"]["vocab"], content.get("added_tokens") or []
        named = dict(pieces) if isinstance(pieces, dict) else {piece[0]: i for i, piece in enumerate(pieces)}
        named |= {token["content"]: token["id"] for token in added}
        if not all(isinstance(name, str) for name in named):
            raise ValueError("a piece that is no string")
        if not all(type(number) is int and 0 <= number < _MOST_PIECES for number in named.values()):
            raise ValueError("an id that is no number of a piece")
        return named, [token["content"] for token in added], {token["id"] for token in added if token["special"]}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise OmniError(f"not a tokenizer.json ({type(error).__name__}: {error})") from None


def _runs(ids: Iterable[int]) -> list[list[int]]:
    """Ascending ids as [first, one after the last] of each run."""
    ids = np.asarray(ids)
    breaks = np.flatnonzero(np.diff(ids) != 1) + 1
    return [[int(run[0]), int(run[-1]) + 1] for run in np.split(ids, breaks)]
