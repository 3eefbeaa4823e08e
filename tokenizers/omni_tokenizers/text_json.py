"""Text tokenizers of public checkpoints: the file tokenizer.json of the package `tokenizers`."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence

from omni_tokenizers.errors import OmniError
from omni_tokenizers.text_public import MOST_PIECES, PublicTextTokenizer


class JsonTextTokenizer(PublicTextTokenizer):
    """Strings to codes and back, by a tokenizer.json."""

    type = "text_json"
    file = "tokenizer.json"
    saved_file = "text.json"
    transformers_class = "PreTrainedTokenizerFast"

    def numbering(self) -> tuple[set[int], set[int]]:
        try:
            content = json.loads(self._model)
        except (ValueError, RecursionError) as error:
            raise OmniError(f"not valid JSON ({error})") from None
        try:
            if not isinstance(content, dict):
                raise TypeError(f"expected a JSON object, found {type(content).__name__}")
            pieces, added = content["model"]["vocab"], content.get("added_tokens") or []
            known = set(pieces.values()) if isinstance(pieces, dict) else set(range(len(pieces)))
            special = {token["id"] for token in added if token["special"]}
            known |= {token["id"] for token in added}
            if not all(type(number) is int and 0 <= number < MOST_PIECES for number in known):
                raise ValueError("an id that is no number of a piece")
            return known, special
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OmniError(f"not a tokenizer.json ({type(error).__name__}: {error})") from None

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

    def _ids_of(self, text: str) -> Sequence[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _text_of(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _piece(self, token: int) -> str:
        return self._tokenizer.id_to_token(token)
