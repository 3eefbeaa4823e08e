"""What the digits recipe is measured on: its held-out scans, voices and requests, and the codes that it trained on."""

from __future__ import annotations

from itertools import zip_longest

import numpy as np
from etils import epath
from jaxtyping import Int
from tqdm import tqdm

from omni.data.shards import TokenShards
from omni.evaluate import EvaluationData, Examples, WordRequest
from omni.parts import Audio, Image, Text
from omni.recipes import digits_data, digits_documents


def evaluation_data(data: epath.PathLike, tokens: epath.PathLike | None = None) -> EvaluationData:
    """The digits' training and held-out examples.

    Args:
      data: directory that `digits_data.prepare` wrote.
      tokens: directory of the training documents, whose codes count as training examples too, augmented ones included.

    Raises:
      OmniError: one of them is not there or damaged.
    """
    digits = digits_data.load(data)
    names = [(phrase, digit) for digit in range(10) for phrase in digits_documents.phrases(digit)]
    text = Examples([Text(phrase) for phrase, _ in names], np.array([digit for _, digit in names]))
    return EvaluationData(
        version=f"digits-{digits_data.VERSION}",
        words=digits_data.WORDS,
        train=_examples(digits.train),
        test={"text": text, **_examples(digits.test)},
        requests=held_out_requests(),
        pool=trained_codes(tokens) if tokens else {},
    )


def held_out_requests() -> list[WordRequest]:
    """Requests that training never draws: for one, two and three parts in turn while there are some."""
    rng = np.random.default_rng(0)
    requests = digits_documents.requests("test")
    by_length = [[request for request in requests if len(request.want) == length] for length in (1, 2, 3)]
    shuffled = [[own[i] for i in rng.permutation(len(own))] for own in by_length]
    return [WordRequest(*request) for turn in zip_longest(*shuffled) for request in turn if request is not None]


def trained_codes(tokens: epath.PathLike) -> dict[str, list[Int[np.ndarray, "codebooks rows columns"]]]:
    """Codes of all pictures and sounds in the training documents, each once."""
    shards = TokenShards(tokens)
    found: dict[str, dict] = {}
    for index in tqdm(range(len(shards)), desc="read trained codes", unit="document", mininterval=1):
        for span in shards.grammar.parse(shards[index]["ids"]):
            if span.modality != "text":
                found.setdefault(span.modality, {}).setdefault((span.codes.shape, span.codes.tobytes()), span.codes)
    return {modality: list(codes.values()) for modality, codes in found.items()}


def _examples(split: digits_data.DigitsSplit) -> dict[str, Examples]:
    scans, speech = split.scans, split.speech
    return {
        "image": Examples([Image(pixels) for pixels in scans.images], scans.labels),
        "audio": Examples([Audio(samples, digits_data.SAMPLE_RATE) for samples in speech.audio], speech.labels),
    }
