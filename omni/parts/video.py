"""Videos."""

import dataclasses
import os
from typing import ClassVar

import numpy as np
from jaxtyping import Float, UInt8

from omni import media, video_files
from omni.parts.image import Image, checked_pixels
from omni.parts.shared import as_array, context_note, data_url, enlargement, extension_of, from_file
from omni_tokenizers.errors import UsageError

ASSUMED_FPS = 25.0
"""Frames a second of frames that come without time stamps."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Video:
    """A video without sound.

    Made from uint8 [T, H, W, 3] (or one channel, or alpha, or floats in [0, 1], as `Image`) and the time of each frame.
    Arrays that are right already are kept without a copy. Raises UsageError for anything else, and for times that are
    negative, not finite or do not rise.
    """

    frames: UInt8[np.ndarray, "time height width 3"]
    """RGB, row by row from the top."""
    timestamps: Float[np.ndarray, " time"] | None = None
    """When each frame begins to be shown, in seconds, float64, strictly rising; None stands for 25 frames a second."""
    context: bool = False
    """True for a part that is given, not learned or generated."""

    modality: ClassVar[str] = "video"

    def __post_init__(self):
        frames = _checked_frames(self.frames)
        object.__setattr__(self, "frames", frames)
        object.__setattr__(self, "timestamps", _checked_timestamps(self.timestamps, len(frames)))

    @classmethod
    def at_rate(cls, frames, fps: float, *, context: bool = False) -> "Video":
        """A video of `fps` frames a second, the first at 0 s."""
        return cls(frames, np.arange(len(frames)) / video_files.check_fps(fps), context)

    @classmethod
    def read(
        cls,
        path: str | os.PathLike,
        fps: float | None = None,
        count: int | None = None,
        max_frames: int | None = None,
    ) -> "Video":
        """Reads a file: all frames, or those shown at `fps` moments a second, or at `count` moments evenly spread.

        Times count from the first frame; those of chosen frames are the moments that they were chosen for. More
        than `max_frames` are refused before any is decoded. See `omni.video_files.read_video` for limits and errors.
        """
        return from_file(path, cls, *video_files.read_video(path, fps, count, max_frames))

    @property
    def height(self) -> int:
        """Rows of pixels."""
        return self.frames.shape[1]

    @property
    def width(self) -> int:
        """Columns of pixels."""
        return self.frames.shape[2]

    @property
    def seconds(self) -> float:
        """From the first frame's time to the last's; how long the last one is shown, a video does not say."""
        return float(self.timestamps[-1] - self.timestamps[0])

    @property
    def fps(self) -> float | None:
        """Frames a second; None where there is one frame, or where they are not evenly spaced to a millisecond."""
        if len(self.frames) < 2:
            return None
        even = np.linspace(self.timestamps[0], self.timestamps[-1], len(self.timestamps))
        is_regular = np.abs(self.timestamps - even).max() <= video_files.TICK
        return (len(self.frames) - 1) / self.seconds if is_regular else None

    def resample(self, fps: float) -> "Video":
        """At each moment of `fps` a second the frame that is shown then, repeated or left out as it comes."""
        moments = video_files.moments_of(self.seconds, video_files.check_fps(fps))
        begun = self.timestamps - self.timestamps[0] - video_files.TICK
        shown = np.searchsorted(begun, moments, side="right") - 1
        return dataclasses.replace(self, frames=self.frames[shown], timestamps=moments)

    def resize_crop(self, height: int, width: int) -> "Video":
        """As `Image.resize_crop` of every frame."""
        if (height, width) == (self.height, self.width):
            return self
        frames = np.stack([Image(frame).resize_crop(height, width).pixels for frame in self.frames])
        return dataclasses.replace(self, frames=frames)

    def save(self, path: str | os.PathLike) -> None:
        """Writes .mp4, .webm, .mkv (lossless) or .gif; see `omni.video_files.encode_video` for what may not fit.

        Raises UsageError for another extension, OmniError where it cannot be written.
        """
        extension = extension_of(path, video_files.EXTENSIONS, "a video")
        media.write_file(path, video_files.encode_video(self.frames, self.timestamps, extension, str(path)))

    write = save
    """The counterpart of `read`; all parts have `save`."""

    def to_mp4_bytes(self) -> bytes:
        """The video as an MP4 file, which has a loss."""
        return video_files.encode_video(self.frames, self.timestamps, ".mp4")

    def playable(self) -> tuple[str, bytes]:
        """A file that browsers play, its type first: MP4 with H.264 where PyAV has that, else an animated GIF."""
        if video_files.has_h264():
            return "video/mp4", self.to_mp4_bytes()
        return "image/gif", video_files.encode_video(self.frames, self.timestamps, ".gif")

    def __repr__(self) -> str:
        fps = "" if self.fps is None else f", {self.fps:.4g} fps"
        return f"Video({self.width}x{self.height}, {len(self.frames)} frames{fps}{context_note(self)})"

    def _repr_html_(self) -> str:
        factor = enlargement(self.height, self.width)
        size = f'width="{self.width * factor}" height="{self.height * factor}" style="image-rendering: pixelated"'
        kind, content = self.playable()
        if kind == "image/gif":
            return f'<img {size} alt="{self!r}" src="{data_url(kind, content)}">'
        return f'<video controls loop muted {size} src="{data_url(kind, content)}"></video>'


def _checked_frames(frames) -> UInt8[np.ndarray, "time height width 3"]:
    array = as_array(frames, "video")
    if array.ndim != 4 or array.shape[3] not in (1, 3, 4) or 0 in array.shape:
        raise UsageError(f"video: expected shape [T, H, W, 3], [T, H, W, 1] or [T, H, W, 4], got {list(array.shape)}")
    pixels = checked_pixels(array.reshape(-1, *array.shape[2:]), "video")
    return pixels.reshape(*array.shape[:3], 3)


def _checked_timestamps(timestamps, frames: int) -> Float[np.ndarray, " time"]:
    if timestamps is None:
        return np.arange(frames) / ASSUMED_FPS
    times = as_array(timestamps, "video")
    if times.shape != (frames,) or times.dtype.kind not in "iuf":
        raise UsageError(f"video: {frames} frames need as many time stamps, got {times.dtype} {list(times.shape)}")
    times = times.astype(np.float64)
    if not (np.isfinite(times).all() and times[0] >= 0 and (np.diff(times) > 0).all()):
        raise UsageError("video: time stamps must be finite, begin at 0 s or later, and rise")
    return times
