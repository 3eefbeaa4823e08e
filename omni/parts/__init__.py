"""The parts of a document: text, pictures, sounds, videos; checked when made, never printing their arrays."""

import os

import numpy as np
from PIL import Image as PillowImage

from omni import media
from omni.parts.audio import Audio
from omni.parts.image import Image
from omni.parts.shared import extension_of
from omni.parts.text import Text
from omni.parts.video import Video
from omni_tokenizers.errors import UsageError

__all__ = ["Audio", "Image", "Part", "Text", "Video", "as_part", "read_part"]

Part = Text | Image | Audio | Video

_READERS = (
    dict.fromkeys(media.TEXT_EXTENSIONS, Text)
    | dict.fromkeys(media.PICTURE_EXTENSIONS, Image)
    | dict.fromkeys(media.SOUND_EXTENSIONS, Audio)
    | dict.fromkeys(media.VIDEO_EXTENSIONS, Video)
)


def read_part(path: str | os.PathLike, fps: float | None = None, max_frames: int | None = None) -> Part:
    """Reads a file as the part that its extension names; raises UsageError for an extension that is not known.

    A video is read at `fps` frames a second if that is given, and refused if these are more than `max_frames`, before
    any is decoded; a .gif is a picture, its first frame.
    """
    kind = _READERS[extension_of(path, _READERS, "a part")]
    return Video.read(path, fps=fps, max_frames=max_frames) if kind is Video else kind.read(path)


def as_part(value: Part | str | np.ndarray | PillowImage.Image | os.PathLike) -> Part:
    """A part from what stands for one: a string is text, a uint8 [H, W, 3] array or a Pillow image a picture, a uint8
    [T, H, W, 3] array a video, a `pathlib.Path` a file to read; a part is itself.

    Raises UsageError for anything else."""
    match value:
        case Text() | Image() | Audio() | Video():
            return value
        case str():
            return Text(value)
        case PillowImage.Image():
            return Image.from_pil(value)
        case os.PathLike():
            return read_part(value)
        case np.ndarray(dtype=np.uint8, ndim=3) if value.shape[2] == 3:
            return Image(value)
        case np.ndarray(dtype=np.uint8, ndim=4) if value.shape[3] == 3:
            return Video(value)
    found = f"{value.dtype} array {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
    raise UsageError(
        f"a part cannot be made from {found}; accepted: a string, Text, Image, Audio, Video, a uint8 array [H, W, 3] "
        "or [T, H, W, 3], a Pillow image, a pathlib.Path to a file"
    )
