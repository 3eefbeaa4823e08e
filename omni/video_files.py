"""Reading untrusted videos, and writing videos, with PyAV (FFmpeg), which is imported where it is used.

A file is read twice. The first time its packets are counted and timed without decoding them, so that all sizes are
bounded before anything is decoded; the second time it is decoded, and only the frames that are asked for are kept.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import zlib
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
_MATROSKA = bytes.fromhex("1a45dfa3")
_SECTIONS = (  # of a Matroska file: its index, facts, tracks, seek points, frames, attachments, chapters, tags; padding
    *(b"\x11\x4d\x9b\x74", b"\x15\x49\xa9\x66", b"\x16\x54\xae\x6b", b"\x1c\x53\xbb\x6b", b"\x1f\x43\xb6\x75"),
    *(b"\x19\x41\xa4\x69", b"\x10\x43\xa7\x70", b"\x12\x54\xc3\x67", b"\xec", b"\xbf"),
)
# Container, codecs with their options (the first that there is), pixel format, and time stamps in a second.
_X264, _MPEG4 = ("libx264", {"crf": "18"}), ("mpeg4", {"qmin": "1", "qmax": "5"})
_WRITERS = {
    ".mp4": ("mp4", (_X264, _MPEG4), "yuv420p", 60_000),
    ".webm": ("webm", (("libvpx-vp9", {"crf": "20", "b": "0", "deadline": "good", "cpu-used": "4"}),), "yuv420p", 1000),
    ".mkv": ("matroska", (("ffv1", {"level": "3", "slicecrc": "1"}),), "bgr0", 1000),
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
    path: str | os.PathLike, fps: float | None = None, count: int | None = None, max_frames: int | None = None
) -> tuple[UInt8[np.ndarray, "time height width 3"], Float[np.ndarray, " time"]]:
    """Frames of the (first) video of a file, upright, and their times in seconds after the first one's.

    Args:
        fps: for each moment of so many in a second, the frame that is shown at it.
        count: the same for so many moments, evenly spread from the first frame to the last. Default: all frames.
        max_frames: how many frames the caller takes at most; more are refused, before any is decoded.
    Raises:
        UsageError: no such file, `fps` and `count` together, or an argument out of range.
        OmniError: PyAV is missing; an empty, truncated or foreign file, or one without a picture; damage that the
            format or the decoder notices; more pixels, frames or seconds than the limits above, or than `max_frames`.
    """
    _check_sampling(fps, count, max_frames)
    pyav()
    with media.open_file(path) as stream:
        try:
            _check_stated_bytes(stream, path)
            with _opened(stream, path) as (container, video):
                times = _packet_times(container, video, stream, path)
            moments = _moments(times, fps, count, path)
            wanted = len(times) if moments is None else len(moments)
            _check_frames(wanted, max_frames, path)
            _check_bytes(wanted, video, path)
            with _opened(stream, path) as (container, video):
                shown = _decoded(container, video, path)
                if moments is not None:
                    return _at(shown, moments, path), moments
                return _all(shown, wanted, max_frames, path)
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


def _check_sampling(fps: float | None, count: int | None, max_frames: int | None) -> None:
    if fps is not None and count is not None:
        raise UsageError("video: fps and count are two ways to choose frames; give one of them")
    if fps is not None:
        check_fps(fps)
    if count is not None and not (isinstance(count, (int, np.integer)) and 1 <= count <= MAX_FRAMES):
        raise UsageError(f"video: count must be a whole number from 1 to {MAX_FRAMES}, got {count!r}")
    if max_frames is not None and not (isinstance(max_frames, (int, np.integer)) and max_frames >= 1):
        raise UsageError(f"video: max_frames must be a whole number from 1, got {max_frames!r}")


@contextlib.contextmanager
def _opened(stream: BinaryIO, path) -> Iterator[tuple[Any, Any]]:
    """A container and its video stream, whose header is within the limits."""
    av = pyav()
    stream.seek(0)
    try:
        container = av.open(stream, options=_options())
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
        video.codec_context.options = _options() | _strictness(video)
        if (stated := _stated_seconds(container, video)) is not None:
            _check_seconds(stated, path)
        yield container, video


def _options() -> dict[str, str]:
    """Known formats alone, and most pixels of what is decoded, which may be larger than the header says."""
    return {"format_whitelist": _FORMATS, "max_pixels": str(MAX_FRAME_PIXELS)}


def _strictness(video) -> dict[str, str]:
    """Options by which decoders refuse what is damaged, for codecs whose frames stand alone.

    Others would also refuse intact videos that are trimmed to begin among frames that refer to earlier ones.
    """
    return {"err_detect": "crccheck+explode"} if video.codec_context.codec.intra_only else {}


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
    """Refuses Matroska, WebM and AVI files that are shorter than they state or do not match their checksums.

    FFmpeg minds neither.
    """
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    head = stream.read(4096)
    stated, sections = 0, None
    if head[:4] == b"RIFF":
        length = int.from_bytes(head[4:8], "little")
        stated = 8 + length if length < 0x7FFFF000 else 0  # programs that write to a pipe state more, for "unknown"
    elif head[:4] == _MATROSKA:  # EBML's header, then the segment, which is all the rest
        length, header = _ebml_size(head[4:])
        segment = 4 + length + (header or 0)
        length, content = _ebml_size(head[segment + 4 :])
        sections = segment + 4 + length
        stated = sections + (content or 0)
    if size < stated:
        raise OmniError(f"{path}: truncated; {stated} bytes are stated, {size} are there")
    if sections:
        _check_checksums(stream, sections, stated if stated > sections else size, path)


def _check_checksums(stream: BinaryIO, start: int, end: int, path) -> None:
    """Refuses what does not match the CRC-32 with which sections of a Matroska file may begin.

    A file that has such checksums has no sections of unknown kinds, either. What follows a section of unknown size, or
    is not built of sections, is left to FFmpeg.
    """
    at, sealed = start, False
    for _ in range(MAX_FRAMES):
        if at >= end:
            return
        stream.seek(at)
        head = stream.read(18)  # an identity of up to 4 bytes, a size of up to 8, a checksum of 6
        identity = head[: 9 - head[0].bit_length()]
        length, size = _ebml_size(head[len(identity) :])
        content = at + len(identity) + length
        if size is None:
            return
        if content + size > end or (sealed and identity not in _SECTIONS):
            if sealed:
                raise OmniError(f"{path}: damaged or truncated at byte {at}")
            return
        checksum = head[content - at :]
        at = content + size
        if checksum[:2] == b"\xbf\x84" and size >= 6:
            sealed = True
            if _crc32(stream, content + 6, size - 6) != int.from_bytes(checksum[2:6], "little"):
                raise OmniError(f"{path}: damaged; the checksum of bytes {content} to {at} does not match")


def _crc32(stream: BinaryIO, start: int, length: int) -> int:
    stream.seek(start)
    value = 0
    while length and (content := stream.read(min(length, 1 << 20))):
        value = zlib.crc32(content, value)
        length -= len(content)
    return value


def _ebml_size(content: bytes) -> tuple[int, int | None]:
    """Length of a variable-size integer, by its leading zero bits, and its value: None where all ones say unknown."""
    length = 9 - content[0].bit_length() if content else 0
    value = int.from_bytes(content[:length], "big") - (1 << 7 * length)
    return length, value if 0 <= value < (1 << 7 * length) - 1 else None


def _packet_times(container, video, stream: BinaryIO, path) -> Float[np.ndarray, " packets"]:
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
    if "mov" in container.format.name:
        _check_index(video, stream, path)
        if packets < video.frames:  # truncated, or trimmed: a list says which parts of the whole are shown
            stream.seek(0)
            with pyav().open(stream, options={"ignore_editlist": "1", **_options()}) as untrimmed:
                video = untrimmed.streams[video.index]
                _check_index(video, stream, path)
                if len(video.index_entries) < video.frames:
                    found = f"{video.frames} frames are stated, {len(video.index_entries)} are there"
                    raise OmniError(f"{path}: truncated or damaged; {found}")
    if not times:
        raise OmniError(f"{path}: holds no frames")
    times = np.sort(times)
    _check_seconds(times[-1] - times[0], path)
    return times


def _check_index(video, stream: BinaryIO, path) -> None:
    """Refuses MP4 and MOV files without all the bytes that their index, as far as it is known, places in them."""
    stated = max((entry.pos + entry.size for entry in video.index_entries), default=0)
    if stated > (size := stream.seek(0, os.SEEK_END)):
        raise OmniError(f"{path}: truncated; at least {stated} bytes are stated, {size} are there")


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


def _check_frames(frames: int, most: int | None, path) -> None:
    if most is not None and frames > most:
        raise OmniError(f"{path}: {frames} frames, of which at most {most} can be taken; cut the video")


def _check_bytes(frames: int, video, path) -> None:
    size = frames * video.codec_context.width * video.codec_context.height * 3
    if frames > MAX_FRAMES or size > MAX_BYTES:
        most = f"{MAX_FRAMES}, {MAX_BYTES / 1e9:.1f} GB"
        raise OmniError(f"{path}: {frames} frames, {size / 1e9:.1f} GB, are more than {most}; take fewer")


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
        if frame.is_corrupt:
            raise OmniError(f"{path}: frame {number} is damaged")
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
    shown: Iterable[tuple[float, Any]], expected: int, most: int | None, path
) -> tuple[UInt8[np.ndarray, "time height width 3"], Float[np.ndarray, " time"]]:
    """All frames; memory is for as many as are expected, so that they are not held twice."""
    times: list[float] = []
    pixels = np.empty((0, 0, 0, 3), np.uint8)
    for time, frame in shown:
        upright = _upright(frame, path)
        if not times:
            pixels = np.empty((expected, *upright.shape), np.uint8)
        if len(times) >= expected:  # a packet may hold several frames
            _check_frames(len(times) + 1, most, path)
            if (len(times) + 1) * upright.nbytes > MAX_BYTES:
                raise OmniError(f"{path}: more than {MAX_BYTES / 1e9:.1f} GB of frames; take fewer")
        if len(times) == len(pixels):
            pixels = np.concatenate([pixels, np.empty_like(pixels[: len(pixels) // 4 + 1])])
        pixels[len(times)] = upright
        times.append(time)
    return pixels[: len(times)], np.array(times)


def _at(
    shown: Iterable[tuple[float, Any]], moments: Float[np.ndarray, " moments"], path
) -> UInt8[np.ndarray, "moments height width 3"]:
    """The frame that is shown at each moment: the last that is not later. Two frames are held at a time."""
    pixels = np.empty((0, 0, 0, 3), np.uint8)
    done, before = 0, None
    for time, frame in shown:
        due = int(np.searchsorted(moments, time - TICK))  # moments at which this frame is not shown yet
        if before is not None and due > done:
            pixels = _filled(pixels, done, due, len(moments), _upright(before, path))
            done = due
        before = frame
        if done == len(moments):
            break
    if done < len(moments):
        pixels = _filled(pixels, done, len(moments), len(moments), _upright(before, path))
    return pixels


def _filled(pixels, start: int, end: int, size: int, upright) -> UInt8[np.ndarray, "size height width 3"]:
    """With one frame from `start` to `end`; the array is made with the first."""
    if not start:
        pixels = np.empty((size, *upright.shape), np.uint8)
    pixels[start:end] = upright
    return pixels


def _upright(frame, path) -> UInt8[np.ndarray, "height width 3"]:
    """RGB, turned and mirrored by the display matrix that comes with a frame."""
    (right, down), (right_by_row, down_by_row) = _display_matrix(frame)
    pixels = frame.to_ndarray(format="rgb24")
    straight, crossed = sorted((abs(right), abs(down_by_row))), sorted((abs(down), abs(right_by_row)))
    if crossed[1] < straight[0] / 100:
        return pixels[:: int(np.sign(down_by_row)), :: int(np.sign(right))]
    if straight[1] < crossed[0] / 100:
        return pixels.transpose(1, 0, 2)[:: int(np.sign(down)), :: int(np.sign(right_by_row))]
    matrix = f"{right:.3g} {down:.3g} {right_by_row:.3g} {down_by_row:.3g}"
    raise OmniError(f"{path}: its display matrix ({matrix}) is none of turns by whole quarters and reflections")


def _display_matrix(frame) -> Float[np.ndarray, "2 2"]:
    """How far right and down the next column of the stored frame is shown, then the next row."""
    try:
        matrices = [data for data in frame.side_data if data.type.name == "DISPLAYMATRIX"]
    except ValueError:  # beside it is something that PyAV does not know, such as EXIF
        angle = np.deg2rad(frame.rotation)  # counterclockwise
        return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    if not matrices:
        return np.eye(2)
    return np.frombuffer(bytes(matrices[0]), np.int32).reshape(3, 3)[:2, :2] / 65536


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
