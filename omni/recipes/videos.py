"""Camera moves over the photos of `photos`, split by photo as these are: videos that cost nothing to have.

A move is a curve through three poses of a camera over a photo; it may pan, zoom and turn. In some videos a piece of
another photo of the same split moves over the first, so that not all of a frame moves alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import grain
import numpy as np
import PIL.Image
from jaxtyping import Float, UInt8

from omni.data.examples import Examples
from omni.recipes import photos
from omni_tokenizers.errors import UsageError

SCALES = (0.7, 1.4)  # pixels of a photo, along a side, that one pixel of a frame stands for: the least and the most
LARGEST_SIZE = int(photos.SMALLEST_SIDE / (SCALES[1] * 2**0.5))
"""Pixels along a side of frames that fit into every photo however they are turned."""


@dataclass(frozen=True)
class CameraMoves(Examples):
    """Videos of camera moves over the training photos; see `camera_move`."""

    size: int
    """Height and width in pixels."""
    frames: int
    """Length of a video."""

    def __post_init__(self) -> None:
        if not 1 <= self.size <= LARGEST_SIZE or self.frames < 1:
            raise UsageError(
                f"size is {self.size} and frames {self.frames}; moves over every photo have 1 to {LARGEST_SIZE} pixels "
                "a side and at least 1 frame"
            )

    def dataset(self, seed: int) -> grain.MapDataset:
        """Each photo is as frequent as the others."""
        sources = list(photos.load("train").values())
        examples = grain.MapDataset.source(range(len(sources))).seed(seed).shuffle().repeat()
        return examples.random_map(
            lambda index, rng: {"video": camera_move(sources, index, self.size, self.frames, rng)}
        )

    def held_out(self) -> list[dict[str, np.ndarray]]:
        """Moves over the validation photo, by which settings may be chosen."""
        return [{"video": fixed_moves("validation", self.size, self.frames, 8)}]


def fixed_moves(split: photos.Split, size: int, frames: int, each: int) -> UInt8[np.ndarray, "n frames size size 3"]:
    """`each` moves over each photo of a split, always the same."""
    sources = list(photos.load(split).values())
    numbers = [(photo, number) for photo in range(len(sources)) for number in range(each)]
    return np.stack(
        [camera_move(sources, photo, size, frames, np.random.default_rng([photo, n])) for photo, n in numbers]
    )


def camera_move(
    sources: list[UInt8[np.ndarray, "height width 3"]], index: int, size: int, frames: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "frames size size 3"]:
    """A camera that moves over a photo; in a third of all videos a piece of any photo moves over what it sees.

    Panning, zooming and turning are drawn one by one, and may all be left out. Videos are mirrored at random.
    """
    photo = PIL.Image.fromarray(sources[index])
    poses = curve(_poses(photo, size, rng), frames)
    pictures = [_view(photo, size, *pose) for pose in poses]
    if rng.random() < 1 / 3:
        other = PIL.Image.fromarray(sources[rng.integers(len(sources))])
        side = int(rng.integers(size // 4, size // 2 + 1))
        left, top = rng.integers(0, other.width - side), rng.integers(0, other.height - side)
        piece = other.crop((left, top, left + side, top + side))
        for picture, place in zip(
            pictures, curve(rng.uniform(-side / 2, size - side / 2, (3, 2)), frames), strict=True
        ):
            picture.paste(piece, tuple(int(x) for x in place.round()))
    video = np.stack([np.asarray(picture) for picture in pictures])
    return np.ascontiguousarray(video[:, :, :: rng.choice((1, -1))])


def curve(points: Float[np.ndarray, "3 values"], frames: int) -> Float[np.ndarray, "frames values"]:
    """The quadratic Bézier curve of three points, which lies between them: smooth in place and in speed."""
    t = np.linspace(0, 1, frames)[:, None]
    return (1 - t) ** 2 * points[0] + 2 * t * (1 - t) * points[1] + t**2 * points[2]


def _poses(photo: PIL.Image.Image, size: int, rng: np.random.Generator) -> Float[np.ndarray, "3 4"]:
    """Three of a camera: the middle of what it sees, across and down, the logarithm of its scale, its angle."""
    pans, zooms, turns = rng.random(3) < (0.8, 0.5, 0.5)
    smallest, largest = np.log(SCALES)
    scale = rng.uniform(smallest, largest) + zooms * rng.normal(0, 0.2, 3) * (0, 1, 1)
    scale = scale.clip(smallest, largest)
    angle = rng.integers(4) * np.pi / 2 + turns * rng.normal(0, 0.3, 3) * (0, 1, 1)
    reach = size * np.exp(scale.max()) / 2**0.5  # however it is turned
    lowest, highest = np.full(2, reach), np.array(photo.size) - reach
    middle = rng.uniform(lowest, highest) + pans * rng.normal(0, size / 4, (3, 2)) * [[0], [1], [1]]
    return np.concatenate([middle.clip(lowest, highest), scale[:, None], angle[:, None]], 1)


def _view(photo: PIL.Image.Image, size: int, x: float, y: float, scale: float, angle: float) -> PIL.Image.Image:
    """What a camera sees: a square around (x, y)."""
    cosine, sine = np.exp(scale) * np.cos(angle), np.exp(scale) * np.sin(angle)
    half = size / 2
    matrix = (cosine, -sine, x - half * (cosine - sine), sine, cosine, y - half * (sine + cosine))
    return photo.transform((size, size), PIL.Image.Transform.AFFINE, matrix, PIL.Image.Resampling.BICUBIC)
