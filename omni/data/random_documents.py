"""Documents of random ids, for measuring and compiling a training whose data is elsewhere or not there yet."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from omni.grammar import Grammar, Span
from omni.vocabulary import Vocabulary

_SPECIAL = ("<pad>", "<bos>", "<turn>", "<eos>", "<image>", "</image>")
_IMAGE_CODES, _GRID = 8192, 32  # Chameleon's: 512 x 512 pixels as 32 x 32 codes
_SMALL_CODES, _SMALL_GRID = 16, 2  # where the vocabulary or the row is too small for that


class RandomDocuments:
    """In place of `TokenShards`: pictures with captions, as long as a row holds; no two are alike.

    Args:
      vocabulary_size: ids; Chameleon's 8192 image codes are among them where they fit.
      row_length: no document is longer.
      documents: how many there are.
    """

    def __init__(self, vocabulary_size: int, row_length: int, documents: int = 4096):
        self.directory, self.codebooks, self.manifest = "random", {}, {"provenance": {"data": "random"}}
        large = vocabulary_size > 2 * _IMAGE_CODES and row_length > 2 * _GRID**2
        codes, self._side = (_IMAGE_CODES, _GRID) if large else (_SMALL_CODES, _SMALL_GRID)
        blocks = {"text": vocabulary_size - len(_SPECIAL) - codes, "image": codes}
        self.vocabulary = Vocabulary.build(blocks, _SPECIAL)
        shape = {"rows": self._side, "columns": self._side}
        image = {"codebooks": ["image"], "open": ["<image>"], "close": ["</image>"], "shapes": [shape]}
        control = {name: f"<{name}>" for name in ("bos", "turn", "eos", "pad")}
        modalities = {"text": {"block": "text"}, "image": image}
        self.grammar = Grammar({"format": 1, "control": control, "modalities": modalities}, self.vocabulary)
        self._text, self._codes = blocks["text"], codes
        around = len(self.grammar.pack([Span("text", self._words(0, 1), True), self._picture(0)]).ids) - 1
        self._most = row_length - around
        self.lengths = np.array([around + self._caption(i) for i in range(documents)], np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        words = Span("text", self._words(index, self._caption(index)), True)
        packed = self.grammar.pack([words, self._picture(index)])
        return {"ids": packed.ids.astype(np.int32), "target": packed.target.astype(np.uint8)}

    def _caption(self, index: int) -> int:
        """Words of a caption: few mostly, up to all that a row holds."""
        share = np.random.default_rng([1, index]).uniform() ** 3
        return 1 + int(share * (self._most - 1))

    def _words(self, index: int, count: int) -> Int[np.ndarray, " words"]:
        return np.random.default_rng([2, index]).integers(0, self._text, count, dtype=np.int32)

    def _picture(self, index: int) -> Span:
        codes = np.random.default_rng([3, index]).integers(0, self._codes, (1, self._side, self._side), dtype=np.int32)
        return Span("image", codes)
