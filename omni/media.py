"""Reading untrusted pictures, sounds and texts.

Sizes are bounded by what the header states, before anything is decoded, and every failure is one clear line.

Files are opened as streams, so that paths of disks and of buckets (`gs://`) go the same way.
"""

import contextlib
import logging
import os
import pathlib
import struct
import warnings
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import soundfile
from jaxtyping import Float, Shaped, UInt8
from PIL import Image as PillowImage
from PIL import ImageOps, UnidentifiedImageError

from omni.storage import is_remote, reading
from omni_tokenizers.errors import OmniError, UsageError

MAX_PIXELS = 64_000_000
MAX_SECONDS = 30 * 60.0
MAX_SAMPLES = 200_000_000  # over all channels: 800 MB as float32; half an hour of 48 kHz stereo fits
MAX_TEXT_BYTES = 16 * 2**20

TEXT_EXTENSIONS = (".txt", ".md")
PICTURE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
SOUND_EXTENSIONS = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf")
VIDEO_EXTENSIONS = (".mp4", ".mkv", ".webm", ".mov", ".avi")

# Named, because Pillow otherwise tries every format it knows, among them EPS, which starts an interpreter.
_PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_SOUND_FORMATS = ("WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF")

_log = logging.getLogger(__name__)


def as_path(path: str | os.PathLike):
    """The path as a `pathlib.Path`, or as an `etils.epath.Path` when it names a store such as `gs://`."""
    if isinstance(path, str) and "://" in path:
        from etils import epath

        return epath.Path(path)
    return pathlib.Path(path) if isinstance(path, str) else path


@contextlib.contextmanager
def open_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Opens a file for reading bytes.

    Raises:
      UsageError: there is none.
      OmniError: it cannot be read, or is empty; `StorageError` where a bucket refuses, whatever a decoder made of it.
    """
    path = as_path(path)
    with contextlib.ExitStack() as stack:
        try:
            if not is_remote(path) and path.exists() and not path.is_file():
                raise IsADirectoryError  # a device that were opened could wait for ever
            stream = stack.enter_context(reading(path))
            size = stream.seek(0, os.SEEK_END)
            stream.seek(0)
        except FileNotFoundError:
            raise UsageError(f"{path}: no such file") from None
        except IsADirectoryError:
            raise UsageError(f"{path}: a file was expected, this is a folder or a device") from None
        except OmniError:
            raise
        except Exception as error:  # no permission, a name that the system cannot have
            raise OmniError(f"{path}: cannot be read ({reason(error)})") from error
        if size == 0:
            raise OmniError(f"{path}: the file is empty (0 bytes)")
        yield stream


def write_file(path: str | os.PathLike, data: bytes) -> None:
    """Writes the bytes; raises OmniError where the place cannot be written."""
    path = as_path(path)
    try:
        path.write_bytes(data)
    except Exception as error:
        raise OmniError(f"{path}: cannot be written ({reason(error)})") from error


def read_text(path: str | os.PathLike) -> str:
    """The text of a UTF-8 file of at most MAX_TEXT_BYTES; raises OmniError for anything else."""
    with open_file(path) as stream:
        data = stream.read(MAX_TEXT_BYTES + 1)
    if len(data) > MAX_TEXT_BYTES:
        raise OmniError(f"{path}: the text is longer than {MAX_TEXT_BYTES >> 20} MiB; split it")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise OmniError(
            f"{path}: not UTF-8 text (byte {error.start} is {data[error.start]:#04x}); convert it"
        ) from error


def read_picture(path: str | os.PathLike) -> Shaped[np.ndarray, "height width *channels"]:
    """Decodes the (first) picture of a file, upright; see `decode_picture`. UsageError for a missing file."""
    with open_file(path) as stream:
        return decode_picture(stream, path)


def decode_picture(stream: BinaryIO, path) -> Shaped[np.ndarray, "height width *channels"]:
    """Decodes the (first) picture of an open file, upright; see `pixels_of` for what comes back.

    Raises OmniError, which begins with `path`, for an empty, truncated or foreign one, or one of more than MAX_PIXELS
    pixels; the last is known from the header, before decoding.
    """
    try:
        with warnings.catch_warnings(record=True) as complaints:
            warnings.simplefilter("always")
            pixels = _first_frame(PillowImage.open(stream, formats=_PICTURE_FORMATS), path)
    except OmniError:
        raise
    except PillowImage.DecompressionBombError as error:  # raised while opening, far above our own limit
        raise OmniError(f"{path}: the picture is larger than {_millions(MAX_PIXELS)} pixels; scale it down") from error
    except UnidentifiedImageError as error:
        formats = ", ".join(_PICTURE_FORMATS)
        raise OmniError(f"{path}: not a picture in a known format ({formats})") from error
    except Exception as error:  # decoders raise anything on hostile bytes, from struct.error to KeyError
        raise OmniError(f"{path}: the picture is damaged or unsupported ({reason(error)})") from error
    for complaint in complaints:
        _log.warning("%s: %s", path, reason(complaint.message))
    return pixels


def _first_frame(image: PillowImage.Image, path) -> Shaped[np.ndarray, "height width *channels"]:
    pixels = pixels_of(image, str(path))
    if getattr(image, "is_animated", False):
        _log.warning("%s: holds more than one frame; the first is used", path)
    return pixels


def pixels_of(image: PillowImage.Image, name: str = "picture") -> Shaped[np.ndarray, "height width *channels"]:
    """Pixels of a Pillow image, upright by its EXIF orientation: uint8 [H, W] or [H, W, 3]; float [H, W] for mode F.

    16-bit grey is scaled, transparency laid over white, CMYK, palette and the rest converted by Pillow (without colour
    profiles). Raises OmniError above MAX_PIXELS, ValueError for 32-bit values of unknown scale.
    """
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise OmniError(
            f"{name}: {width}x{height} pixels are more than {_millions(MAX_PIXELS)}; scale the picture down"
        )
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        return _grey_from_16_bit(np.asarray(image))
    if image.mode == "F":
        return np.asarray(image)
    if image.has_transparency_data:
        return over_white(image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def over_white(image: PillowImage.Image) -> UInt8[np.ndarray, "height width 3"]:
    """Lays a Pillow image of mode RGBA (straight alpha) over white."""
    canvas = PillowImage.new("RGB", image.size, "white")
    canvas.paste(image, mask=image)
    return np.asarray(canvas)


def _grey_from_16_bit(values: Shaped[np.ndarray, "height width"]) -> UInt8[np.ndarray, "height width"]:
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("integer values outside 0..65535")
    return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def read_sound(
    path: str | os.PathLike, max_seconds: float = MAX_SECONDS
) -> tuple[Float[np.ndarray, "channels samples"], int]:
    """Decodes a sound file; see `decode_sound`. UsageError for a missing file."""
    with open_file(path) as stream:
        return decode_sound(stream, path, max_seconds)


def decode_sound(
    stream: BinaryIO, path, max_seconds: float = MAX_SECONDS
) -> tuple[Float[np.ndarray, "channels samples"], int]:
    """Decodes an open sound file to float32 samples (full scale 1) and its sample rate in hertz.

    Raises OmniError, which begins with `path`, for an empty, truncated or foreign one, and for one longer than
    `max_seconds` or MAX_SAMPLES; the length is known from the header, before decoding.
    """
    try:
        _check_stated_length(stream, path)
        with soundfile.SoundFile(stream) as sound:
            _check_sound_header(sound, path, max_seconds)
            return _decode(sound, path), sound.samplerate
    except OmniError:
        raise
    except soundfile.LibsndfileError as error:
        raise OmniError(f"{path}: not a sound that can be read ({reason(error)})") from error
    except Exception as error:  # as for pictures
        raise OmniError(f"{path}: the sound is damaged or unsupported ({reason(error)})") from error


def _check_sound_header(sound: soundfile.SoundFile, path, max_seconds: float) -> None:
    if sound.format not in _SOUND_FORMATS:
        raise OmniError(f"{path}: sound format {sound.format} is not one of {', '.join(_SOUND_FORMATS)}")
    if sound.samplerate <= 0:
        raise OmniError(f"{path}: the header states a sample rate of {sound.samplerate} Hz")
    seconds = sound.frames / sound.samplerate
    if seconds > max_seconds:
        raise OmniError(f"{path}: the sound lasts {seconds:.0f} s by its header, more than {max_seconds:.0f} s; cut it")
    if sound.frames * sound.channels > MAX_SAMPLES:
        raise OmniError(
            f"{path}: {_millions(sound.frames * sound.channels)} samples over {sound.channels} channels are more than "
            f"{_millions(MAX_SAMPLES)}; cut it, or reduce its rate or channels"
        )


def _decode(sound: soundfile.SoundFile, path) -> Float[np.ndarray, "channels samples"]:
    samples = np.empty((sound.channels, sound.frames), np.float32)
    filled = 0
    for block in sound.blocks(blocksize=65536, dtype="float32", always_2d=True):
        samples[:, filled : filled + len(block)] = block.T
        filled += len(block)
    if filled < sound.frames:
        raise OmniError(f"{path}: truncated; the header states {sound.frames} samples, {filled} could be decoded")
    return samples


def _check_stated_length(stream: BinaryIO, path) -> None:
    """Raises OmniError when a WAV or AIFF file claims more sound than it has, which libsndfile ignores."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    byte_order = {b"RIFF": "<", b"FORM": ">"}.get(stream.read(4))
    position = 12
    while byte_order and position + 8 <= size:
        stream.seek(position)
        name, length = struct.unpack(f"{byte_order}4sI", stream.read(8))
        position += 8
        if name in (b"data", b"SSND"):
            # Programs that write to a pipe state about 2 or 4 GiB for "unknown"; there the end of the file is the end.
            if size - position < length < 0x7FFFF000:
                raise OmniError(f"{path}: truncated; {length} bytes of sound are stated, {size - position} are there")
            break
        position += length + length % 2
    stream.seek(0)


def _millions(count: int) -> str:
    return f"{count / 1e6:,.0f} million"


def reason(error: BaseException) -> str:
    """An exception's message on one line."""
    text = getattr(error, "strerror", None) or getattr(error, "error_string", None) or str(error)
    return " ".join(text.split()) or type(error).__name__
