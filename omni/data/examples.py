"""What a configuration names as the data of a training."""

from __future__ import annotations

import abc
from typing import ClassVar

import grain
import numpy as np


class Examples(abc.ABC):
    """Where a training's examples come from. Subclasses are frozen dataclasses, whose fields are the configuration."""

    sample_rate: ClassVar[int | None] = None
    """Of sounds, in Hz, which no example says itself; None = not known."""

    @abc.abstractmethod
    def dataset(self, seed: int) -> grain.MapDataset:
        """Single examples, endless and in an order that depends on `seed`: dicts of numpy arrays of fixed shapes.

        Pictures are {"image": uint8 [height, width, 3]}; videos {"video": uint8 [time, height, width, 3]}; sounds
        {"audio": float32 [samples] within [-1, 1], "length": int32, how many of the samples count}.
        """

    def held_out(self) -> list[dict[str, np.ndarray]] | None:
        """Batches of such examples of which none is trained on; the first of them are shown in the run's page."""
        return None
