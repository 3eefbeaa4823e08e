"""The photos that come inside scikit-image and scikit-learn, split by photo, as crops for image tokenizers.

The split was chosen by content, once and before anything was trained on it: what is held out shows a building among
trees, an animal and an object, and no photo of the training split shows the same place or thing. Nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import grain
import numpy as np
import PIL.Image
from jaxtyping import UInt8

from omni.data.examples import Examples
from omni_tokenizers.errors import OmniError, UsageError

Split = Literal["train", "validation", "held_out"]

# Each file's place in its package. motorcycle_left and motorcycle_right are one scene, so they are on one side.
PHOTOS: dict[Split, dict[str, tuple[str, ...]]] = {
    "train": {
        "skimage": (
            "data/brick.png",
            "data/camera.png",
            "data/grass.png",
            "data/gravel.png",
            "data/hubble_deep_field.jpg",
            "data/ihc.png",
            "data/motorcycle_left.png",
            "data/motorcycle_right.png",
            "data/retina.jpg",
            "data/rocket.jpg",
        ),
        "sklearn": ("datasets/images/flower.jpg",),
    },
    "validation": {"skimage": ("data/astronaut.png",)},
    "held_out": {"skimage": ("data/chelsea.png", "data/coffee.png"), "sklearn": ("datasets/images/china.jpg",)},
}
SMALLEST_SIDE = 300  # pixels; chelsea's height
LARGEST_SCALE = 3.0  # pixels of a photo, along a side, that one pixel of a training crop stands for at most


@dataclass(frozen=True)
class PhotoCrops(Examples):
    """Crops of the training photos; see `random_crop`."""

    size: int
    """Height and width in pixels."""

    def __post_init__(self) -> None:
        if not 1 <= self.size <= SMALLEST_SIDE:
            raise UsageError(f"size is {self.size}; crops of every photo have 1 to {SMALLEST_SIDE} pixels a side")

    def dataset(self, seed: int) -> grain.MapDataset:
        """Each photo is as frequent as the others."""
        photos = list(load("train").values())
        examples = grain.MapDataset.source(photos).seed(seed).shuffle().repeat()
        return examples.random_map(lambda photo, rng: {"image": random_crop(photo, self.size, rng)})

    def held_out(self) -> list[dict[str, np.ndarray]]:
        """The validation photo, by which settings may be chosen; what is measured in the end stays unseen."""
        return [{"image": fixed_crops("validation", self.size)}]


def load(split: Split) -> dict[str, UInt8[np.ndarray, "height width 3"]]:
    """The photos of a split by name; grey ones have three equal channels.

    Raises:
      UsageError: no such split.
      OmniError: scikit-image or scikit-learn is missing, or the installed one does not bring a photo.
    """
    if split not in PHOTOS:
        raise UsageError(f"unknown split {split!r}; choose one of {', '.join(get_args(Split))}")
    paths = [_package(package) / name for package, names in PHOTOS[split].items() for name in names]
    return {path.stem: _read(path) for path in paths}


def random_crop(
    photo: UInt8[np.ndarray, "height width 3"], size: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "size size 3"]:
    """A square of a photo, from anywhere, reduced by a factor of 1 to 3, one of the eight ways that it can lie."""
    height, width = photo.shape[:2]
    scale = np.exp(rng.uniform(0, np.log(min(LARGEST_SCALE, height / size, width / size))))
    side = size * scale
    top, left = rng.uniform(0, height - side), rng.uniform(0, width - side)
    if rng.random() < 0.5:  # half of the crops keep the photo's own pixels, as held-out crops do
        side, top, left = size, int(top), int(left)
    picture = PIL.Image.fromarray(photo)
    box = (left, top, left + side, top + side)
    crop = np.asarray(picture.resize((size, size), PIL.Image.Resampling.LANCZOS, box))
    crop = crop.swapaxes(0, 1) if rng.random() < 0.5 else crop
    return np.ascontiguousarray(crop[:: rng.choice((1, -1)), :: rng.choice((1, -1))])


def fixed_crops(split: Split, size: int) -> UInt8[np.ndarray, "n size size 3"]:
    """All crops of a split's photos on a grid without overlap, at the photos' own resolution; the rest is left out."""
    crops = []
    for photo in load(split).values():
        rows, columns = photo.shape[0] // size, photo.shape[1] // size
        grid = photo[: rows * size, : columns * size].reshape(rows, size, columns, size, 3).swapaxes(1, 2)
        crops.append(grid.reshape(-1, size, size, 3))
    return np.concatenate(crops)


def _package(name: str) -> Path:
    """The directory of an installed package, found without importing it."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        package = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[name]
        raise OmniError(f"the photos need {package}: pip install 'omni-any-to-any[quickstart]'")
    return Path(found.submodule_search_locations[0])


def _read(path: Path) -> UInt8[np.ndarray, "height width 3"]:
    try:
        with PIL.Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except OSError as error:
        raise OmniError(f"{path}: the installed package does not bring this photo ({error})") from None
