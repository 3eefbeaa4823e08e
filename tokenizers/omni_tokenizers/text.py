"""Text tokenizer: SentencePiece byte-pair encoding (Sennrich et al. 2016) with byte fallback, lossless for any text."""

from __future__ import annotations

import collections
import io
import re
from collections.abc import Iterable
from typing import Self

import numpy as np
import sentencepiece
from etils import epath
from jaxtyping import Int

from omni_tokenizers.base import Tokenizer, fingerprint, write_description
from omni_tokenizers.errors import OmniError, UsageError

MODEL = "text.model"
# The unknown piece, 256 bytes and the space, which has no byte form of its own.
SMALLEST_VOCABULARY = 258

# SentencePiece writes a space as this character, so the character itself travels as bytes.
_SPACE = "\u2581"
# Never inside a learned piece: control characters (bytes serve them) and SentencePiece's own marks.
_SEPARATORS = re.compile(r"[\x00-\x1f\x7f\u2047\u2581\u2585]")
_LONGEST_SENTENCE = 1000


class TextTokenizer(Tokenizer):
    """Strings to ids and back; ``decode(encode(text)) == text`` for every valid string.

    Id 0 is SentencePiece's obligatory unknown piece; it is never produced, and there are no other control pieces.
    """

    type = "text_sentencepiece"
    modality = "text"

    def __init__(self, model: bytes):
        """Wraps a serialised SentencePiece model.

        Raises:
            OmniError: not such a model, or one without byte fallback.
        """
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self._bytes = [self._processor.piece_to_id(f"<0x{value:02X}>") for value in range(256)]
            complete = all(map(self._processor.is_byte, self._bytes))
        except (RuntimeError, IndexError):
            raise OmniError("the text model is not a SentencePiece model; the file is damaged") from None
        if not complete:
            raise OmniError("the text model has no byte fallback, so it cannot hold every string; train it again")
        self._model = model
        self.vocabulary_size = self._processor.vocab_size()
        self.codebook_sizes = (self.vocabulary_size,)
        self.hash = fingerprint({"type": self.type}, {"model": np.frombuffer(model, np.uint8)})

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary_size: int = 384) -> Self:
        """Learns pieces from texts, the same for the same texts in the same order.

        A small corpus gives fewer pieces than `vocabulary_size`; where there are more distinct characters than room,
        the rarest are left to bytes.

        Raises:
            UsageError: `vocabulary_size` is below 258, or the text is not valid Unicode.
        """
        if vocabulary_size < SMALLEST_VOCABULARY:
            raise UsageError(f"a text vocabulary needs at least {SMALLEST_VOCABULARY} ids, got {vocabulary_size}")
        # The last sentence gives the space its piece, whatever the corpus.
        sentences = [*_sentences(texts, vocabulary_size - SMALLEST_VOCABULARY), " "]
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocabulary_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=1,
            minloglevel=3,
        )
        return cls(model.getvalue())

    def encode(self, x: str) -> Int[np.ndarray, " length"]:
        """Ids (int32) of a string.

        Raises:
            OmniError: not a string, or one with lone surrogates, which UTF-8 cannot write.
        """
        if not isinstance(x, str):
            raise OmniError(f"text must be a string, got {type(x).__name__}")
        _check_unicode(x)
        ids = []
        for index, part in enumerate(x.split(_SPACE)):
            if index:
                ids += [self._bytes[value] for value in _SPACE.encode()]
            ids += self._processor.encode(part)
        return np.array(ids, np.int32)

    def decode(self, codes: Int[np.ndarray, " length"]) -> str:
        """The string of ids; ids that are none and broken byte sequences read as U+FFFD, nothing raises."""
        ids = np.asarray(codes).ravel()
        valid = (ids > 0) & (ids < self.vocabulary_size)
        # Byte 255 occurs in no UTF-8 sequence.
        return self._processor.decode(np.where(valid, ids, self._bytes[255]).astype(np.int32).tolist())

    def save(self, directory: epath.PathLike) -> None:
        """Writes tokenizer.json and text.model."""
        directory = epath.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / MODEL).write_bytes(self._model)
        config = {"vocabulary_size": self.vocabulary_size}
        write_description(directory, {"type": self.type, "config": config, "hash": self.hash})

    @classmethod
    def from_directory(cls, directory: epath.Path, description: dict) -> Self:
        try:
            model = (directory / MODEL).read_bytes()
        except OSError:
            raise OmniError(f"{directory / MODEL}: the text model is missing") from None
        try:
            return cls(model)
        except OmniError as error:
            raise OmniError(f"{directory / MODEL}: {error}") from None


def _sentences(texts: Iterable[str], characters: int) -> list[str]:
    """Pieces of text to learn from, which hold only the `characters` most frequent characters besides the space."""
    sentences = []
    for text in texts:
        _check_unicode(text)
        for line in _SEPARATORS.split(text):
            # The trainer would drop long sentences without a word.
            sentences += [line[start : start + _LONGEST_SENTENCE] for start in range(0, len(line), _LONGEST_SENTENCE)]
    counts = collections.Counter(character for sentence in sentences for character in sentence if character != " ")
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    if rare := "".join(map(re.escape, ranked[characters:])):
        sentences = [part for sentence in sentences for part in re.split(f"[{rare}]", sentence)]
    return [sentence for sentence in sentences if sentence]


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise OmniError(f"text is not valid Unicode: lone surrogate at character {error.start}") from None
