"""Pictures."""

import dataclasses
import io
import os
from typing import ClassVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image as PillowImage

from omni import media
from omni.parts.shared import as_array, context_note, data_url, enlargement, extension_of, from_file
from omni_tokenizers.errors import OmniError, UsageError

_PICTURE_WRITERS = {
    ".png": {"format": "PNG"},
    ".jpg": {"format": "JPEG", "quality": 95},
    ".jpeg": {"format": "JPEG", "quality": 95},
    ".webp": {"format": "WEBP", "lossless": True},
    ".bmp": {"format": "BMP"},
    ".tif": {"format": "TIFF"},
    ".tiff": {"format": "TIFF"},
    ".ppm": {"format": "PPM"},
}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Image:
    """A picture.

    Made from uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] (alpha is laid over white), or from floats in [0, 1] of
    those shapes. Arrays that are right already are kept without a copy. Raises UsageError for anything else.
    """

    pixels: UInt8[np.ndarray, "height width 3"]
    """RGB, row by row from the top."""
    context: bool = False
    """True for a part that is given, not learned or generated."""

    modality: ClassVar[str] = "image"

    def __post_init__(self):
        object.__setattr__(self, "pixels", checked_pixels(self.pixels))

    @classmethod
    def read(cls, path: str | os.PathLike) -> "Image":
        """Reads a picture file, upright, its first frame; see `omni.media.read_picture` for limits and errors."""
        return from_file(path, cls, media.read_picture(path))

    @classmethod
    def from_pil(cls, image: PillowImage.Image) -> "Image":
        """From a Pillow image of any mode; raises OmniError when it is too large or cannot be decoded."""
        try:
            return cls(media.pixels_of(image))
        except OmniError:
            raise
        except Exception as error:  # Pillow decodes late, and its decoders raise anything
            raise OmniError(f"picture: cannot be decoded ({media.reason(error)})") from error

    def to_pil(self) -> PillowImage.Image:
        """The picture as a Pillow image of mode RGB."""
        return PillowImage.fromarray(self.pixels)

    @property
    def height(self) -> int:
        """Rows of pixels."""
        return self.pixels.shape[0]

    @property
    def width(self) -> int:
        """Columns of pixels."""
        return self.pixels.shape[1]

    def resize_crop(self, height: int, width: int) -> "Image":
        """The largest centred region with the aspect height : width, resampled (Lanczos, antialiased) to that size."""
        if (height, width) == (self.height, self.width):
            return self
        scale = min(self.height / height, self.width / width)
        left, top = (self.width - width * scale) / 2, (self.height - height * scale) / 2
        box = (max(left, 0), max(top, 0), min(left + width * scale, self.width), min(top + height * scale, self.height))
        resized = self.to_pil().resize((width, height), PillowImage.Resampling.LANCZOS, box=box)
        return dataclasses.replace(self, pixels=np.asarray(resized))

    def save(self, path: str | os.PathLike) -> None:
        """Writes .png, .jpg, .webp (lossless), .bmp, .tif or .ppm.

        Raises UsageError for another extension, OmniError where it cannot be written.
        """
        extension = extension_of(path, _PICTURE_WRITERS, "a picture")
        media.write_file(path, self._encode(path, **_PICTURE_WRITERS[extension]))

    def to_png_bytes(self) -> bytes:
        """The picture as a PNG file, lossless."""
        return self._encode("picture", format="PNG")

    def _encode(self, name, **options) -> bytes:
        buffer = io.BytesIO()
        try:
            self.to_pil().save(buffer, **options)
        except (OSError, ValueError) as error:  # JPEG and WebP bound the sides of a picture
            raise OmniError(f"{name}: {self.width}x{self.height} pixels cannot be written so ({error})") from error
        return buffer.getvalue()

    def __repr__(self) -> str:
        return f"Image({self.width}x{self.height}{context_note(self)})"

    def _repr_png_(self) -> bytes:
        factor = enlargement(self.height, self.width)
        return Image(self.pixels.repeat(factor, axis=0).repeat(factor, axis=1)).to_png_bytes()

    def _repr_html_(self) -> str:
        factor = enlargement(self.height, self.width)
        size = f'width="{self.width * factor}" height="{self.height * factor}"'
        source = data_url("image/png", self.to_png_bytes())
        return f'<img {size} style="image-rendering: pixelated" alt="{self!r}" src="{source}">'


def checked_pixels(pixels, name: str = "picture") -> UInt8[np.ndarray, "height width 3"]:
    """RGB of what `Image` is made from; UsageError, which begins with `name`, for anything else."""
    array = as_array(pixels, name)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise UsageError(
            f"{name}: expected shape [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], got {list(np.shape(pixels))}"
        )
    if array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):  # written so that NaN fails, too
            raise UsageError(f"{name}: floats must lie in [0, 1], found {array.min():g} to {array.max():g}")
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise UsageError(f"{name}: expected uint8, or floats in [0, 1], got {array.dtype}")
    if array.shape[2] == 4:
        return media.over_white(PillowImage.fromarray(array))
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))
