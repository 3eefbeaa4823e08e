"""How a public family scales pictures before its tokenizer sees them, in the words of transformers' image processors.

A grammar declares it (`preprocessing` of "image"): so it goes with the model into every directory, and is covered by
the hash by which shards and weights are compared. Pixels are those of transformers 5.23.0, to the bit.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from jaxtyping import Float, UInt8

from omni import media
from omni.parts import Image
from omni_tokenizers.checkpoints.family import Settings
from omni_tokenizers.errors import OmniError

_DONE = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
_SCALING = ("resample", "rescale_factor", "image_mean", "image_std")
_SIZES = ("size", "min_size", "do_center_crop", "crop_size", "min_pixels", "max_pixels", "spatial_factor")
# What says nothing of the pixels of one picture.
_INDIFFERENT = ("image_processor_type", "feature_extractor_type", "processor_class", "do_pad", "default_to_square")
_INDIFFERENT += ("model_input_names", "data_format", "return_tensors", "auto_map", "background_color")
_MOST_ELONGATED = 200
_CHUNK = 1 << 18  # pixels that are scaled together, in float64

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """Scales pictures to squares that are cut, as Chameleon does, or filled up, as Janus does, or to whole codes at
    about their own aspect, as Emu3 does.

    Raises:
      OmniError: a number that no such scaling can have.
    """

    resample: int
    """Pillow's number of the filter."""
    rescale_factor: float
    """What values from 0 to 255 are multiplied with; then the mean is taken off, and the deviation divided by."""
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    side: int = 0
    """Pixels of the shorter edge, and of the square that is cut from the middle; 0 where pictures keep their aspect."""
    min_size: int = 0
    """Fewest pixels of the shorter edge of a picture whose longer one becomes `side`, filled up with the colour of the
    mean to a square; 0 where it is cut."""
    min_pixels: int = 0
    """Fewest pixels of a picture that keeps its aspect."""
    max_pixels: int = 0
    spatial_factor: int = 1
    """What height and width of such a picture are multiples of."""

    def __post_init__(self):
        numbers = (self.rescale_factor, *self.image_mean, *self.image_std)
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or not np.isfinite(numbers).all():
            raise OmniError("rescale_factor, image_mean and image_std must be finite, the last two of three channels")
        if not 0 <= self.resample <= 5 or not self.rescale_factor or 0 in self.image_std:
            raise OmniError(f"resample is {self.resample}, one of 0 to 5; rescale_factor and image_std are not 0")
        if not 0 <= self.min_size <= self.side:
            raise OmniError(f"min_size is {self.min_size}; it must be 0 to {self.side}, the side of pictures")
        if self.min_size and not all(0 <= mean <= 1 for mean in self.image_mean):
            raise OmniError(f"image_mean is {self.image_mean}; what fills a picture up must be a colour, 0 to 1")
        least = self.side or self.spatial_factor
        most = self.side**2 or self.max_pixels
        fewest = self.side**2 or self.min_pixels  # of 0 a narrow picture would be rounded to no row
        if not (least >= 1 and least**2 <= most <= media.MAX_PIXELS and 1 <= fewest <= most):
            raise OmniError(f"no pictures have {least} pixels an edge at least, and {fewest} to {most} in all")

    @classmethod
    def from_json(cls, values: Mapping[str, Any], source: str) -> Self:
        """Reads what `to_json` gives: a preprocessor_config.json that leaves nothing out.

        Raises:
          OmniError: a setting that is not supported, by its name; what is not known at all is ignored, and logged.
        """
        settings = Settings(values, source)
        for key in sorted(values.keys() - {*_DONE, *_SCALING, *_SIZES, *_INDIFFERENT}):
            if values[key] is not None and not key.startswith("_"):
                log.warning("%s: %s is not known here, and ignored", source, key)
        for key in _DONE:
            settings.require(key, True)
        if "min_pixels" in values:
            names = ("min_pixels", "max_pixels", "spatial_factor")
            sizes = {name: settings.get(name, 0) for name in names}
            settings.require("do_center_crop", False)
        elif "min_size" in values:
            side = settings.section("size").get("height", 0)
            if values.get("size") != {"height": side, "width": side}:
                raise OmniError(f"{source}: size = {values.get('size')!r} is not supported here, only a square")
            settings.require("do_center_crop", False)
            settings.require("do_pad", True)
            sizes = {"side": side, "min_size": settings.get("min_size", 0)}
        else:
            side = settings.section("size").get("shortest_edge", 0)
            if values.get("size") != {"shortest_edge": side}:
                raise OmniError(f"{source}: size = {values.get('size')!r} is not supported here, only a shortest_edge")
            settings.require("do_center_crop", True)
            settings.require("crop_size", {"height": side, "width": side})
            sizes = {"side": side}
        means = {name: settings.get(name, (0.0,)) for name in ("image_mean", "image_std")}
        try:
            return cls(settings.get("resample", -1), settings.get("rescale_factor", 0.0), **means, **sizes)
        except OmniError as error:
            raise OmniError(str(error) if str(error).startswith(source) else f"{source}: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """The content of a preprocessor_config.json, without the name of its class."""
        values = dict.fromkeys(_DONE, True) | {name: getattr(self, name) for name in _SCALING}
        values |= {name: list(values[name]) for name in ("image_mean", "image_std")}
        square = {"height": self.side, "width": self.side}
        if self.min_size:
            return values | {"size": square, "min_size": self.min_size, "do_pad": True}
        if self.side:
            return values | {"size": {"shortest_edge": self.side}, "do_center_crop": True, "crop_size": square}
        limits = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        return values | limits | {"size": limits, "spatial_factor": self.spatial_factor}

    def resized(self, picture: Image) -> Image:
        """The picture at the size that its tokenizer takes; one that has it already is as it is.

        Raises:
          OmniError: one so narrow that scaling it would take more memory than a picture may.
        """
        height, width = self._size(picture.height, picture.width)
        if height * width > media.MAX_PIXELS:
            raise OmniError(f"a picture of {picture.width}x{picture.height} pixels is too narrow to be scaled; crop it")
        pixels = np.asarray(picture.to_pil().resize((width, height), self.resample))
        if self.min_size:
            canvas = np.full((self.side, self.side, 3), [int(255 * mean) for mean in self.image_mean], np.uint8)
            top, left = (self.side - height) // 2, (self.side - width) // 2
            canvas[top : top + height, left : left + width] = pixels
            pixels = canvas
        elif self.side:
            top, left = (height - self.side) // 2, (width - self.side) // 2
            pixels = pixels[top : top + self.side, left : left + self.side]
        return dataclasses.replace(picture, pixels=pixels)

    def values(self, pixels: UInt8[np.ndarray, "batch height width 3"]) -> Float[np.ndarray, "batch height width 3"]:
        """What the tokenizer's net sees of pixels, float32; multiplied in float64, as transformers does it."""
        values = np.empty(pixels.shape, np.float32)
        flat, flat_values = pixels.reshape(-1, 3), values.reshape(-1, 3)
        for start in range(0, len(flat), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            scaled = (flat[chunk].astype(np.float64) * self.rescale_factor).astype(np.float32)
            flat_values[chunk] = (scaled - np.float32(self.image_mean)) / np.float32(self.image_std)
        return values

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width before anything is cut off."""
        short, long = sorted((height, width))
        if self.min_size:
            scale = self.side / long
            return max(round(height * scale), self.min_size), max(round(width * scale), self.min_size)
        if self.side:
            long = int(self.side * long / short)  # cut off, not rounded
            return (self.side, long) if height <= width else (long, self.side)
        if long > _MOST_ELONGATED * short:
            raise OmniError(
                f"a picture of {width}x{height} pixels is longer than {_MOST_ELONGATED} times its width; crop it"
            )
        factor = self.spatial_factor
        rows, columns = round(height / factor), round(width / factor)
        if rows * columns * factor**2 > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            rows, columns = (max(1, math.floor(side / shrink / factor)) for side in (height, width))
        elif rows * columns * factor**2 < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            rows, columns = (math.ceil(side * grow / factor) for side in (height, width))
        return rows * factor, columns * factor
