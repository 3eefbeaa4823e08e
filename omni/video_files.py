"""Reading untrusted videos, and writing videos, with PyAV (FFmpeg), which is imported where it is used.

A file is read twice. The first time its packets are counted and timed without decoding them, so that all sizes are
bounded before anything is decoded; the second time it is decoded, and only the frames that are asked for are kept.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image as PillowImage

from omni import media
from omni_tokenizers.errors import OmniError, UsageError

MAX_FRAME_PIXELS = 36_000_000  # 8K fits
MAX_FRAMES = 216_000  # half an hour at 120 a second
MAX_BYTES = 1 << 31  # of all frames together, as they are returned
MAX_FPS = 240.0
TICK = 1e-3
"""Seconds to which Matroska and WebM round time stamps: a frame counts as shown so much earlier."""

# Named, because FFmpeg otherwise tries every format it knows, among them playlists, which open other files.
_FORMATS = "mov,matroska,webm,avi,gif"
# Container, codecs with their options (the first that there is), pixel format, and time stamps in a second.
_X264, _MPEG4 = ("libx264", {"crf": "18"}), ("mpeg4", {"qmin": "1", "qmax": "5"})
_WRITERS = {
    ".mp4": ("mp4", (_X264, _MPEG4), "yuv420p", 60_000),
    ".webm": ("webm", (("libvpx-vp9", {"crf": "20", "b": "0", "deadline": "good", "cpu-used": "4"}),), "yuv420p", 1000),
    ".mkv": ("matroska", (("ffv1", {}),), "bgr0", 1000),
}
EXTENSIONS = (*_WRITERS, ".gif")
"""What can be written."""

_log = logging.getLogger(__name__)


def pyav():
    """The module `av`; OmniError where it is not installed."""
    try:
        import av
    except ImportError:
        raise OmniError('video files need PyAV: pip install "omni-any-to-any[video]"') from None
    return av


def read_video(
    path: str | os.PathLike, fps: float | None = None, count: int | None = None
) -> tuple[UInt8[np.ndarray, "time height width 3"], Float[np.ndarray, " time"]]:
    """Frames of the (first) video of a file, upright, and their times in seconds after the first one's.

    Args:
        fps: for each moment of so many in a second, the frame that is shown at it.
        count: the same for so many moments, evenly spread from the first frame to the last. Default: all frames.
    Raises:
        UsageError: no such file, `fps` and `count` together, or one of them out of range.
        OmniError: PyAV is missing; an empty, truncated or foreign file, or one without a picture; more pixels, frames
            or seconds than the limits above.
    """
    _check_sampling(fps, count)
    pyav()
    with media.open_file(path) as stream:
        try:
            _check_stated_bytes(stream, path)
            with _opened(stream, path) as (container, video):
                times = _packet_times(container, video, path)
            moments = _moments(times, fps, count, path)
            _check_bytes(len(times) if moments is None else len(moments), video, path)
            with _opened(stream, path) as (container, video):
                shown = _decoded(container, video, path)
                return _all(shown, path) if moments is None else (_at(shown, moments, path), moments)
        except OmniError:
            raise
        except Exception as error:  # as for pictures
            raise OmniError(f"{path}: the video is damaged or unsupported ({media.reason(error)})") from error


def moments_of(seconds: float, fps: float) -> Float[np.ndarray, " moments"]:
    """The moments 0, 1 / fps, 2 / fps, ... up to `seconds`, the last of them included."""
    return np.arange(int((seconds + TICK) * fps) + 1) / fps


def check_fps(fps: float) -> float:
    """`fps`, if it is a number of frames a second; else a UsageError."""
    if isinstance(fps, bool) or not isinstance(fps, (int, float, np.number)) or not 0 < fps <= MAX_FPS:
        raise UsageError(f"video: fps must be above 0 and at most {MAX_FPS:g}, got {fps!r}")
    return float(fps)


def _check_sampling(fps: float | None, count: int | None) -> None:
    if fps is not None and count is not None:
        raise UsageError("video: fps and count are two ways to choose frames; give one of them")
    if fps is not None:
        check_fps(fps)
    if count is not None and not (isinstance(count, (int, np.integer)) and 1 <= count <= MAX_FRAMES):
        raise UsageError(f"video: count must be a whole number from 1 to {MAX_FRAMES}, got {count!r}")


@contextlib.contextmanager
def _opened(stream: BinaryIO, path) -> Iterator[tuple[Any, Any]]:
    """A container and its video stream, whose header is within the limits."""
    av = pyav()
    stream.seek(0)
    most = {"max_pixels": str(MAX_FRAME_PIXELS)}  # of what is decoded, which may be larger than the header says
    try:
        container = av.open(stream, options={"format_whitelist": _FORMATS, **most})
    except av.error.FFmpegError as error:
        raise OmniError(f"{path}: not a video that can be read: truncated, or none of {_FORMATS}") from error
    with container:
        covers = av.stream.Disposition.attached_pic
        videos = [video for video in container.streams.video if not video.disposition & covers]
        if not videos:
            raise OmniError(f"{path}: holds no video{', only sound' if container.streams.audio else ''}")
        video = videos[0]
        width, height = video.codec_context.width, video.codec_context.height
        if not 0 < width * height <= MAX_FRAME_PIXELS:
            limit = f"{MAX_FRAME_PIXELS / 1e6:.0f} million pixels"
            raise OmniError(f"{path}: its frames say no size, or one above {limit}; scale the video down")
        video.codec_context.options = most
        if (stated := _stated_seconds(container, video)) is not None:
            _check_seconds(stated, path)
        yield container, video


def _stated_seconds(container, video) -> float | None:
    """The duration by the header; that of the whole file stands for that of a video which is alone in it."""
    if video.duration is not None:
        return float(video.duration * video.time_base)
    if container.duration is not None and len(container.streams) == 1:
        return container.duration / 1e6
    return None


def _check_seconds(seconds: float, path) -> None:
    if not 0 <= seconds <= media.MAX_SECONDS:
        most = media.MAX_SECONDS
        raise OmniError(f"{path}: the video lasts {seconds:.0f} s by its time stamps, more than {most:.0f}; cut it")


def _check_stated_bytes(stream: BinaryIO, path) -> None:
    """Refuses Matroska, WebM and AVI files that are shorter than they state, which FFmpeg does not mind."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    head = stream.read(4096)
    stated = 0
    if head[:4] == b"RIFF":
        length = int.from_bytes(head[4:8], "little")
        stated = 8 + length if length < 0x7FFFF000 else 0  # programs that write to a pipe state more, for "unknown"
    elif head[:4] == b"\x1a\x45\xdf\xa3":  # EBML's header, then the segment, which is all the rest
        segment = 4 + sum(_ebml_size(head[4:]))
        stated = segment + 4 + sum(_ebml_size(head[segment + 4 :]))
    if size < stated:
        raise OmniError(f"{path}: truncated; {stated} bytes are stated, {size} are there")


def _ebml_size(content: bytes) -> tuple[int, int]:
    """Length of a variable-size integer, by its leading zero bits, and its value: 0 where all ones say unknown."""
    length = 9 - content[0].bit_length() if content else 0
    value = int.from_bytes(content[:length], "big") - (1 << 7 * length)
    return length, value if 0 < value < (1 << 7 * length) - 1 else 0


def _packet_times(container, video, path) -> Float[np.ndarray, " packets"]:
    """When the frame of each packet is shown, in seconds and in order, by what the file says without decoding."""
    times, packets = [], 0
    for packet in container.demux(video):
        if packet.is_corrupt:
            raise OmniError(f"{path}: truncated or damaged (at packet {packets})")
        packets += packet.size > 0
        if not packet.size or packet.is_discard:
            continue
        if packets > MAX_FRAMES:
            raise OmniError(f"{path}: more than {MAX_FRAMES} frames; cut the video")
        stamp = packet.dts if packet.pts is None else packet.pts
        if stamp is None:
            raise OmniError(f"{path}: frame {len(times)} has no time stamp")
        times.append(float(stamp * packet.time_base))
    if not times:
        raise OmniError(f"{path}: holds no frames")
    times = np.sort(times)
    _check_seconds(times[-1] - times[0], path)
    if "mov" in container.format.name and packets < video.frames:
        raise OmniError(f"{path}: truncated; {video.frames} frames are stated, {packets} are there")
    return times


def _moments(times: Float[np.ndarray, " packets"], fps, count, path) -> Float[np.ndarray, " moments"] | None:
    """The moments, in seconds after the first frame, of which frames are wanted; None for all frames."""
    seconds = times[-1] - times[0]
    if fps is not None:
        return moments_of(seconds, fps)
    if count is None:
        return None
    if count > 1 and not seconds:
        raise OmniError(f"{path}: holds one frame, over which {count} cannot be spread")
    return np.linspace(0, seconds, count)


def _check_bytes(frames: int, video, path) -> None:
    size = frames * video.codec_context.width * video.codec_context.height * 3
    if frames > MAX_FRAMES or size > MAX_BYTES:
        most = f"{MAX_FRAMES}, {MAX_BYTES / 1e9:.1f} GB"
        raise OmniError(f"{path}: {frames} frames, {size / 1e9:.1f} GB, are more than {most}; take fewer: fps or count")


def _decoded(container, video, path) -> Iterator[tuple[float, Any]]:
    """Each frame with its time in seconds after the first, strictly rising."""
    size, first, before = (video.codec_context.width, video.codec_context.height), None, -np.inf
    ratio = video.sample_aspect_ratio
    if ratio and ratio != 1:
        _log.warning("%s: its pixels are %s times as wide as high; they are taken as squares", path, ratio)
    for number, frame in enumerate(container.decode(video)):
        if (frame.width, frame.height) != size:
            found, stated = f"{frame.width}x{frame.height}", f"{size[0]}x{size[1]}"
            raise OmniError(f"{path}: frame {number} has {found} pixels where {stated} are stated")
        if frame.time is None:
            raise OmniError(f"{path}: frame {number} has no time stamp")
        first = frame.time if first is None else first
        if frame.time - first <= before:
            raise OmniError(f"{path}: time stamps do not rise: frame {number} is at {frame.time - first:.3f} s")
        before = frame.time - first
        _check_seconds(before, path)
        yield before, frame
    if first is None:
        raise OmniError(f"{path}: holds no frame that can be decoded")


def _all(
    shown: Iterable[tuple[float, Any]], path
) -> tuple[UInt8[np.ndarray, "time height width 3"], Float[np.ndarray, " time"]]:
    times, pixels, size = [], [], 0
    for time, frame in shown:
        times.append(time)
        pixels.append(_upright(frame, path))
        size += pixels[-1].nbytes
        if size > MAX_BYTES:  # a packet may hold several frames
            raise OmniError(f"{path}: more than {MAX_BYTES / 1e9:.1f} GB of frames; take fewer, by fps or count")
    return np.stack(pixels), np.array(times)


def _at(
    shown: Iterable[tuple[float, Any]], moments: Float[np.ndarray, " moments"], path
) -> UInt8[np.ndarray, "moments height width 3"]:
    """The frame that is shown at each moment: the last that is not later. Two frames are held at a time."""
    pixels: list[np.ndarray] = []
    before = None
    for time, frame in shown:
        due = int(np.searchsorted(moments, time - TICK))  # moments at which this frame is not shown yet
        if before is not None and due > len(pixels):
            pixels += [_upright(before, path)] * (due - len(pixels))
        before = frame
        if len(pixels) == len(moments):
            break
    if len(pixels) < len(moments):
        pixels += [_upright(before, path)] * (len(moments) - len(pixels))
    return np.stack(pixels)


def _upright(frame, path) -> UInt8[np.ndarray, "height width 3"]:
    """RGB, turned by the display matrix that comes with a frame (degrees counterclockwise)."""
    quarters, rest = divmod(frame.rotation, 90)
    if rest:
        raise OmniError(f"{path}: turned by {frame.rotation} degrees; whole quarters can be read")
    return np.rot90(frame.to_ndarray(format="rgb24"), quarters)


# Writing


def has_h264() -> bool:
    """Whether PyAV is there and writes H.264, the codec of .mp4 files that browsers play."""
    try:
        return _X264[0] in pyav().codecs_available
    except OmniError:
        return False


def encode_video(
    frames: UInt8[np.ndarray, "time height width 3"],
    timestamps: Float[np.ndarray, " time"],
    extension: str,
    name: str = "video",
) -> bytes:
    """A file of these frames at these times (seconds): .mp4 and .webm with loss, .mkv without; .gif of 256 colours.

    .mp4 and .webm have sides of even length: others are padded by repeating the edge, which is logged.

    Raises:
        OmniError: PyAV is missing, times are too close together for the format, or the codec refuses.
    """
    if extension == ".gif":
        return _encode_gif(frames, _ticks(timestamps, 100, name))
    av = pyav()
    container_format, codecs, pixel_format, per_second = _WRITERS[extension]
    codec, options = next((each for each in codecs if each[0] in av.codecs_available), codecs[-1])
    if pixel_format == "yuv420p":
        frames = _even(frames, name)
    buffer = io.BytesIO()
    try:
        with av.open(buffer, "w", format=container_format) as container:
            stream = container.add_stream(codec, rate=_mean_rate(timestamps), options=options)
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixel_format
            stream.codec_context.time_base = Fraction(1, per_second)
            for pixels, tick in zip(frames, _ticks(timestamps, per_second, name), strict=True):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = int(tick), stream.codec_context.time_base
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    except (av.error.FFmpegError, ValueError) as error:
        size = f"{frames.shape[2]}x{frames.shape[1]}"
        raise OmniError(f"{name}: {size} pixels cannot be written by {codec} ({media.reason(error)})") from error
    return buffer.getvalue()


def _ticks(timestamps: Float[np.ndarray, " time"], per_second: int, name: str) -> Int[np.ndarray, " time"]:
    ticks = np.rint(np.asarray(timestamps) * per_second).astype(np.int64)
    if (np.diff(ticks) < 1).any():
        raise OmniError(f"{name}: frames less than 1/{per_second} s apart cannot be written in this format")
    return ticks


def _mean_rate(timestamps: Float[np.ndarray, " time"]) -> Fraction:
    """Frames a second, about, which the codec plans by; 1 for a single frame."""
    seconds = float(timestamps[-1] - timestamps[0])
    return max(Fraction((len(timestamps) - 1) / seconds if seconds else 1).limit_denominator(1001), Fraction(1, 1001))


def _even(
    frames: UInt8[np.ndarray, "time height width 3"], name: str
) -> UInt8[np.ndarray, "time even_height even_width 3"]:
    height, width = frames.shape[1:3]
    if height % 2 == width % 2 == 0:
        return frames
    _log.warning("%s: padded to even sides, %dx%d pixels", name, width + width % 2, height + height % 2)
    return np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _encode_gif(frames: UInt8[np.ndarray, "time height width 3"], hundredths: Int[np.ndarray, " time"]) -> bytes:
    """The last frame is shown as long as the others are on average, a single one for a second."""
    durations = np.diff(hundredths)
    durations = np.append(durations, round(durations.mean()) if len(durations) else 100)
    pictures = [PillowImage.fromarray(pixels) for pixels in frames]
    buffer = io.BytesIO()
    settings = {"duration": (durations * 10).tolist(), "loop": 0}
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], **settings)
    return buffer.getvalue()
