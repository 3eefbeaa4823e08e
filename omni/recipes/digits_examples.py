"""What the two tokenizers of the digits recipe are trained on: augmented training scans and clips."""

from __future__ import annotations

from dataclasses import dataclass

import grain

from omni.data.examples import Examples
from omni.recipes import digits_data


@dataclass(frozen=True)
class DigitScans(Examples):
    """Augmented handwritten digits."""

    directory: str
    """Directory written by `digits_data.prepare`."""

    def dataset(self, seed: int) -> grain.MapDataset:
        return digits_data.scan_dataset(self.directory, seed)


@dataclass(frozen=True)
class SpokenDigits(Examples):
    """Augmented spoken digits."""

    sample_rate = digits_data.SAMPLE_RATE
    directory: str
    """Directory written by `digits_data.prepare`."""

    def dataset(self, seed: int) -> grain.MapDataset:
        return digits_data.speech_dataset(self.directory, seed)
