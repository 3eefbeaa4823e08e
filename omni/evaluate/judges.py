"""Judges: which class a picture, a sound or a text shows.

Those of pictures and sounds are support vector machines trained on the real pixels (each picture also turned and scaled
a little) and log-mels of the training split. They see neither what a tokenizer made nor a held-out example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Int

from omni.evaluate.data import EvaluationData
from omni.evaluate.features import FEATURES, PICTURE_VIEWS, picture_features
from omni.parts import Part
from omni_tokenizers.errors import OmniError

VERSION = "svc-rbf.1"
NOT_JUDGED = -1


class Judge(Protocol):
    """Reads the class out of parts of one modality."""

    def labels(self, parts: Sequence[Part | None]) -> Int[np.ndarray, " n"]:
        """The class of each part, `NOT_JUDGED` for None and where none is recognised."""
        ...


@dataclass(frozen=True)
class TextJudge:
    """Exact match with a class's word, after stripping and lower-casing."""

    words: tuple[str, ...]

    def labels(self, parts: Sequence[Part | None]) -> Int[np.ndarray, " n"]:
        """See `Judge.labels`."""
        found = {word: label for label, word in enumerate(self.words)}
        texts = [None if part is None else part.text.strip().lower() for part in parts]
        return np.array([found.get(text, NOT_JUDGED) for text in texts])


class FeatureJudge:
    """A support vector machine (radial basis functions, C = 10, gamma = 1 / (features x variance)) over `FEATURES`."""

    def __init__(self, modality: str, parts: Sequence[Part], labels: Int[np.ndarray, " n"]):
        try:
            from sklearn.svm import SVC
        except ImportError as error:
            raise OmniError("the judges need scikit-learn: pip install 'omni-any-to-any[quickstart]'") from error
        self.features = FEATURES[modality]
        if modality == "image":
            views = [picture_features(parts, *view) for view in PICTURE_VIEWS]
        else:
            views = [self.features(parts)]
        self.machine = SVC(C=10.0, gamma="scale").fit(np.concatenate(views), np.tile(labels, len(views)))

    def labels(self, parts: Sequence[Part | None]) -> Int[np.ndarray, " n"]:
        """See `Judge.labels`."""
        labels = np.full(len(parts), NOT_JUDGED)
        there = [i for i, part in enumerate(parts) if part is not None]
        if there:
            labels[there] = self.machine.predict(self.features([parts[i] for i in there]))
        return labels


def fit_judges(data: EvaluationData) -> dict[str, Judge]:
    """A judge for each modality that has held-out examples."""
    judges: dict[str, Judge] = {"text": TextJudge(data.words)}
    for modality, examples in data.train.items():
        judges[modality] = FeatureJudge(modality, examples.parts, examples.labels)
    return judges


def ceilings(data: EvaluationData, judges: dict[str, Judge]) -> dict[str, float]:
    """Each judge's accuracy on real held-out examples, in their own label balance; 1 for text."""
    measured = {
        modality: float(np.mean(judges[modality].labels(data.test[modality].parts) == data.test[modality].labels))
        for modality in data.train
    }
    return {"text": 1.0, **measured}
