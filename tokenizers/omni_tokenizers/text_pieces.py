"""Text tokenizers of public checkpoints: the file tokenizer.model of the package `sentencepiece`, as Llama 2 has it."""

from __future__ import annotations

from collections.abc import Sequence

import sentencepiece

from omni_tokenizers.errors import OmniError
from omni_tokenizers.text_public import PIECES_FILE, PublicTextTokenizer


class PieceTextTokenizer(PublicTextTokenizer):
    """Strings to codes and back, by a tokenizer.model.

    Where the file says so, as most do, a text begins with a space of its own, which decoding takes off again.
    """

    type = "text_pieces"
    file = PIECES_FILE
    saved_file = "text.model"
    transformers_class = "LlamaTokenizer"

    def numbering(self) -> tuple[set[int], set[int]]:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
            known = range(self._processor.vocab_size())
        except (RuntimeError, ValueError, IndexError):
            known = range(0)
        if not known:
            raise OmniError("not a SentencePiece model, or a damaged one")
        is_no_text = (self._processor.is_control, self._processor.is_unknown, self._processor.is_unused)
        return set(known), {token for token in known if any(kind(token) for kind in is_no_text)}

    def has(self, name: str, token: int) -> bool:
        """Whether the piece of an id has this name."""
        return token < self._processor.vocab_size() and self._piece(token) == name

    def _ids_of(self, text: str) -> Sequence[int]:
        text.encode()  # the package would write other characters for lone surrogates
        return self._processor.encode(text)

    def _text_of(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def _piece(self, token: int) -> str:
        return self._processor.id_to_piece(token)
