"""Text tokenizers of public checkpoints: the file tokenizer.json of the package `tokenizers`."""

from __future__ import annotations

import bisect
import functools
import itertools
import json
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from omni_tokenizers.errors import OmniError
from omni_tokenizers.text_public import JSON_FILE, MOST_PIECES, PublicTextTokenizer

BREAK = "\U0010fffd"
"""Breaks in a prompt what only looks like a token's name (`Names.broken`); it is gone before text becomes pieces."""


class Names:
    """Finds names of tokens in text, the longest where several begin."""

    def __init__(self, names: Collection[str]):
        self._names = sorted({name for name in names if name})
        self._first, self._longest = {name[0] for name in self._names}, max(map(len, self._names), default=0)
        self._shorter: dict[str, str | None] = {}  # of each name the longest other that it begins with
        begun: list[str] = []
        for name in self._names:
            while begun and not name.startswith(begun[-1]):
                begun.pop()
            self._shorter[name] = begun[-1] if begun else None
            begun.append(name)

    def at(self, text: str, place: int) -> str | None:
        """The name that begins at a place; None if none does."""
        if text[place] not in self._first:
            return None
        # Sorted, names that the text here begins with are the last one before it, or what that one begins with.
        last = bisect.bisect_right(self._names, text[place : place + self._longest])
        name = self._names[last - 1] if last else None
        while name is not None and not text.startswith(name, place):
            name = self._shorter[name]
        return name

    def broken(self, texts: Sequence[str]) -> list[str]:
        """Texts that may come to stand one behind the other, with `BREAK` in every name, also in those that only all of
        them together have."""
        whole, place, found = "".join(texts), 0, []
        for text in texts:
            signs = (sign + BREAK if self.at(whole, place + i) else sign for i, sign in enumerate(text))
            found.append("".join(signs))
            place += len(text)
        return found


class JsonTextTokenizer(PublicTextTokenizer):
    """Strings to codes and back, by a tokenizer.json."""

    type = "text_json"
    file = JSON_FILE
    saved_file = "text.json"
    transformers_class = "PreTrainedTokenizerFast"

    def numbering(self) -> tuple[set[int], set[int]]:
        self._named, self._added, special = _numbering(self._model)
        return set(self._named.values()), special

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
        added = [{"id": id, "content": name, "special": True} | plain for name, id in missing.items()]
        added = [*(content.get("added_tokens") or []), *added]
        for token in added:  # behind the normalizer a name would be found without its break
            token |= {"special": token["special"] or token["content"] in self.control, "normalized": False}
        cleaned = [{"type": "Replace", "pattern": {"String": BREAK}, "content": ""}, content.get("normalizer")]
        normalizer = {"type": "Sequence", "normalizers": [each for each in cleaned if each]}
        return _made(content | {"added_tokens": added, "normalizer": normalizer})

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
        codes, found = self._codes_by(functools.partial(_ids_by, self._prompt_tokenizer), text)
        places = np.flatnonzero(codes < 0)
        for place, id in itertools.zip_longest(found[places].tolist(), wanted):
            if place != id:
                raise self._no_text(id if place is None else place)
        return [stretch[stretch >= 0] for stretch in np.split(codes, places)]

    def _ids_of(self, text: str) -> Sequence[int]:
        return _ids_by(self._tokenizer, text)

    def _text_of(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _piece(self, token: int) -> str:
        return self._tokenizer.id_to_token(token)


def _ids_by(tokenizer: Any, text: str) -> Sequence[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


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
    except (ValueError, RecursionError) as error:
        raise OmniError(f"not valid JSON ({error})") from None
    try:
        if not isinstance(content, dict):
            raise TypeError(f"expected a JSON object, found {type(content).__name__}")
        pieces, added = content["model"]["vocab"], content.get("added_tokens") or []
        named = dict(pieces) if isinstance(pieces, dict) else {piece[0]: i for i, piece in enumerate(pieces)}
        named |= {token["content"]: token["id"] for token in added}
        if not all(isinstance(name, str) for name in named):
            raise ValueError("a piece that is no string")
        if not all(type(number) is int and 0 <= number < MOST_PIECES for number in named.values()):
            raise ValueError("an id that is no number of a piece")
        return named, [token["content"] for token in added], {token["id"] for token in added if token["special"]}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise OmniError(f"not a tokenizer.json ({type(error).__name__}: {error})") from None
