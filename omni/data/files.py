"""A user's own pictures and sounds, from the files of a directory, for tokenizers.

Files are split by name: a hash of the name decides, so one that is added changes the side of no other, and those that
are measured come from all of the directory. Everything is
read through `omni.parts`, so what is damaged is named. Sounds are decoded whole for each excerpt; long ones are better
cut into pieces of some seconds first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import grain
import numpy as np
import PIL.Image
from jaxtyping import Float

from omni import media
from omni.data.examples import Examples
from omni.data.loader import stack
from omni.parts import Audio, Image
from omni_tokenizers.errors import OmniError, UsageError

_TOGETHER = 8  # held-out examples in a batch


@dataclass(frozen=True)
class Files:
    """Which files of a directory, and which of them are held out."""

    directory: str
    """Directory of the files, which may lie in others below it."""
    held_out_share: float = 0.02
    """Part of the files that is not trained on."""
    held_out_files: int = 64
    """Most held-out files that are measured; the rest is not used at all."""

    def __post_init__(self) -> None:
        if not 0 <= self.held_out_share < 1 or self.held_out_files < 0:
            raise UsageError("held_out_share lies in 0 to below 1, and held_out_files is not negative")

    def split(self, extensions: Collection[str]) -> tuple[list[Path], list[Path]]:
        """The files to train on, by name, and those to measure, by hash; `OmniError` if there are none to train on."""
        root = Path(self.directory)
        found = sorted(path for path in root.rglob("*") if path.suffix.lower() in extensions and path.is_file())
        shares = {path: _share(path.relative_to(root).as_posix()) for path in found}
        trained = [path for path in found if shares[path] >= self.held_out_share]
        if not trained:
            known = " ".join(extensions)
            raise OmniError(f"{root}: no file to train on there, out of {len(found)} with the extensions {known}")
        held_out = sorted(shares.keys() - set(trained), key=shares.get)
        return trained, held_out[: self.held_out_files]


@dataclass(frozen=True)
class PictureFiles(Examples):
    """Square crops of pictures."""

    files: Files
    """The pictures."""
    size: int = 256
    """Height and width in pixels."""
    smallest: float = 0.5
    """Side of the smallest crop, as a part of the picture's shorter side."""

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 < self.smallest <= 1:
            raise UsageError("size is at least 1, and smallest lies above 0 to 1")

    def dataset(self, seed: int) -> grain.MapDataset:
        """A crop of random size and place of each picture, half of them mirrored."""

        def crop(path: Path, rng: np.random.Generator) -> dict[str, np.ndarray]:
            picture = Image.read(path).to_pil()
            side = min(picture.size) * rng.uniform(self.smallest, 1)
            left, top = (rng.uniform(0, length - side) for length in picture.size)
            box, size = (left, top, left + side, top + side), (self.size, self.size)
            pixels = np.asarray(picture.resize(size, PIL.Image.Resampling.LANCZOS, box))
            return {"image": np.ascontiguousarray(pixels[:, :: rng.choice((1, -1))])}

        return _shuffled(self.files.split(media.PICTURE_EXTENSIONS)[0], seed, crop)

    def held_out(self) -> list[dict[str, np.ndarray]] | None:
        """The largest square in the middle of each."""
        paths = self.files.split(media.PICTURE_EXTENSIONS)[1]
        return _batches({"image": Image.read(path).resize_crop(self.size, self.size).pixels} for path in paths)


@dataclass(frozen=True)
class SoundFiles(Examples):
    """Excerpts of sounds, mixed to one channel and resampled to the codec's rate."""

    files: Files
    """The sounds."""
    sample_rate: int = 24000
    """In Hz."""
    samples: int = 24000
    """Length of an excerpt; sounds that are shorter are followed by silence."""

    def __post_init__(self) -> None:
        if min(self.sample_rate, self.samples) < 1:
            raise UsageError("sample_rate and samples are at least 1")

    def dataset(self, seed: int) -> grain.MapDataset:
        """From a random place of each sound."""

        def excerpt(path: Path, rng: np.random.Generator) -> dict[str, np.ndarray]:
            sound = self._read(path)
            start = int(rng.integers(0, max(0, len(sound) - self.samples) + 1))
            return self._excerpt(sound[start:])

        return _shuffled(self.files.split(media.SOUND_EXTENSIONS)[0], seed, excerpt)

    def held_out(self) -> list[dict[str, np.ndarray]] | None:
        """The beginning of each."""
        paths = self.files.split(media.SOUND_EXTENSIONS)[1]
        return _batches(self._excerpt(self._read(path)) for path in paths)

    def _read(self, path: Path) -> Float[np.ndarray, " samples"]:
        return Audio.read(path).mono().resample(self.sample_rate).samples[0]

    def _excerpt(self, sound: Float[np.ndarray, " present"]) -> dict[str, np.ndarray]:
        sound = sound[: self.samples]
        audio = np.pad(sound, (0, self.samples - len(sound)))
        return {"audio": np.clip(audio, -1, 1), "length": np.int32(len(sound))}


def _shuffled(paths: list[Path], seed: int, example: Callable) -> grain.MapDataset:
    return grain.MapDataset.source(paths).seed(seed).shuffle().repeat().random_map(example)


def _batches(examples: Iterable[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]] | None:
    """Batches of a few examples each; None where there are none."""
    examples = list(examples)
    return [stack(examples[i : i + _TOGETHER]) for i in range(0, len(examples), _TOGETHER)] or None


def _share(name: str) -> float:
    """Where a name stands between 0 and 1."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
