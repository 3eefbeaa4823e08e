"""Training of a text tokenizer on the texts of documents: counting, not steps, so there is no `Task`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from etils import epath
from tqdm import tqdm

from omni.data.sources import Samples, Source
from omni.train.run_directory import claim, to_json
from omni_tokenizers import TextTokenizer
from omni_tokenizers.base import DESCRIPTION
from omni_tokenizers.errors import OmniError, UsageError
from omni_tokenizers.text import SMALLEST_VOCABULARY

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextTokenizerConfig:
    """A text tokenizer, and what it is trained on."""

    output: str
    """Directory to write it to."""
    source: Source
    """Documents whose texts are read."""
    vocabulary_size: int = 8192
    """Most pieces, 256 bytes among them."""
    most_documents: int = 200_000
    """Documents that are read, evenly spread over the source: the pieces do not change much with more."""

    def __post_init__(self) -> None:
        if self.vocabulary_size < SMALLEST_VOCABULARY or self.most_documents < 1:
            raise UsageError(f"vocabulary_size is at least {SMALLEST_VOCABULARY}, and most_documents at least 1")

    def run(self) -> None:
        """Trains and writes the tokenizer, unless it is there.

        Raises:
          OmniError: no document has a text, or the output holds another one.
        """
        output = epath.Path(self.output)
        claim(output, to_json(self))
        if (output / DESCRIPTION).exists():
            logger.info("%s: trained before", output)
            return
        texts = list(_texts(self.source.open(), self.most_documents))
        if not texts:
            raise OmniError(f"{output}: none of the documents that could be read has a text")
        tokenizer = TextTokenizer.train(texts, self.vocabulary_size)
        tokenizer.save(output)
        logger.info("%s: %d pieces from %d texts", output, tokenizer.vocabulary_size, len(texts))


def _texts(samples: Samples, most: int) -> Iterator[str]:
    """The texts of so many documents; bad ones are left out and counted."""
    bad = 0
    places = np.unique(np.linspace(0, len(samples) - 1, min(most, len(samples))).astype(int))
    for index in tqdm(places.tolist(), "read texts", unit="document", delay=2):
        try:
            yield from samples.texts(index)
        except OmniError:
            bad += 1
    if bad:
        logger.warning(
            "%d of %d documents are bad and were left out; omni tokenize --validate lists them", bad, len(places)
        )
