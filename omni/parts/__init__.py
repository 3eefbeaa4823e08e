"""The parts of a document: text, pictures and sounds, checked when made, never printing their arrays."""

import base64
import dataclasses
import html
import io
import logging
import operator
import os
from typing import ClassVar

import numpy as np
import soundfile
import soxr
from jaxtyping import Float, UInt8
from PIL import Image as PillowImage

from omni import media
from omni_tokenizers.errors import OmniError, UsageError

MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 1_000, 768_000
MAX_CHANNELS = 64

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
_SOUND_WRITERS = {".wav": "WAV", ".flac": "FLAC"}
_SHOWN_CHARACTERS = 60
_SHOWN_PIXELS = 192  # notebooks enlarge pictures whose longer side is smaller, by a whole factor

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Text:
    """A piece of text.

    Raises UsageError for anything but a string that UTF-8 can encode.
    """

    text: str
    """The text, as it is; nothing in it is ever read as a control token."""
    context: bool = False
    """True for a part that is given, not learned or generated."""

    modality: ClassVar[str] = "text"

    def __post_init__(self):
        if not isinstance(self.text, str):
            raise UsageError(f"text: expected a string, got {type(self.text).__name__}")
        try:
            self.text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(f"text: character {error.start} is a lone surrogate, not valid Unicode text") from error

    @classmethod
    def read(cls, path: str | os.PathLike) -> "Text":
        """Reads a UTF-8 file; see `omni.media.read_text` for limits and errors."""
        return cls(media.read_text(path))

    def save(self, path: str | os.PathLike) -> None:
        """Writes UTF-8 to .txt or .md; raises UsageError for another extension, OmniError if it cannot be written."""
        _extension(path, media.TEXT_EXTENSIONS, "text")
        media.write_file(path, self.text.encode("utf-8"))

    def __repr__(self) -> str:
        if len(self.text) <= _SHOWN_CHARACTERS:
            return f"Text({self.text!r}{_context(self)})"
        return f"Text({self.text[:_SHOWN_CHARACTERS]!r}..., {len(self.text)} characters{_context(self)})"

    def _repr_html_(self) -> str:
        return f'<div style="white-space: pre-wrap">{html.escape(self.text)}</div>'


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
        object.__setattr__(self, "pixels", _checked_pixels(self.pixels))

    @classmethod
    def read(cls, path: str | os.PathLike) -> "Image":
        """Reads a picture file, upright, its first frame; see `omni.media.read_picture` for limits and errors."""
        return _named(path, cls, media.read_picture(path))

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
        extension = _extension(path, _PICTURE_WRITERS, "a picture")
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
        return f"Image({self.width}x{self.height}{_context(self)})"

    def _repr_png_(self) -> bytes:
        factor = self._enlargement()
        return Image(self.pixels.repeat(factor, axis=0).repeat(factor, axis=1)).to_png_bytes()

    def _repr_html_(self) -> str:
        size = f'width="{self.width * self._enlargement()}" height="{self.height * self._enlargement()}"'
        source = _data_url("image/png", self.to_png_bytes())
        return f'<img {size} style="image-rendering: pixelated" alt="{self!r}" src="{source}">'

    def _enlargement(self) -> int:
        return max(1, _SHOWN_PIXELS // max(self.height, self.width))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Audio:
    """A sound.

    Made from [n] or [channels, n] samples: floats with full scale 1, or int16, int32 or uint8 PCM, which is scaled.
    Arrays that are right already are kept without a copy. Raises UsageError for anything else, for no samples, for NaN
    and infinity.
    """

    samples: Float[np.ndarray, "channels samples"]
    """float32, full scale 1."""
    sample_rate: int
    """In hertz."""
    context: bool = False
    """True for a part that is given, not learned or generated."""

    modality: ClassVar[str] = "audio"

    def __post_init__(self):
        object.__setattr__(self, "samples", _checked_samples(self.samples))
        object.__setattr__(self, "sample_rate", _checked_rate(self.sample_rate))

    @classmethod
    def read(cls, path: str | os.PathLike, max_seconds: float = media.MAX_SECONDS) -> "Audio":
        """Reads a sound file of at most `max_seconds`; see `omni.media.read_sound` for limits and errors."""
        return _named(path, cls, *media.read_sound(path, max_seconds))

    @property
    def channels(self) -> int:
        """How many channels there are."""
        return self.samples.shape[0]

    @property
    def seconds(self) -> float:
        """The duration."""
        return self.samples.shape[1] / self.sample_rate

    def mono(self) -> "Audio":
        """The mean of the channels."""
        if self.channels == 1:
            return self
        return dataclasses.replace(self, samples=self.samples.mean(axis=0, keepdims=True))

    def resample(self, sample_rate: int) -> "Audio":
        """Band-limited resampling (soxr, HQ) to round(n * sample_rate / self.sample_rate) samples, at least one."""
        sample_rate = _checked_rate(sample_rate)
        if sample_rate == self.sample_rate:
            return self
        count = max(1, round(self.samples.shape[1] * sample_rate / self.sample_rate))
        resampled = np.zeros((self.channels, count), np.float32)
        for row, channel in zip(resampled, self.samples, strict=True):
            values = soxr.resample(channel, self.sample_rate, sample_rate, quality="HQ")[:count]
            row[: len(values)] = values
        return dataclasses.replace(self, samples=resampled, sample_rate=sample_rate)

    def save(self, path: str | os.PathLike) -> None:
        """Writes 16-bit .wav or .flac; samples beyond full scale are clipped, which is logged.

        Raises UsageError for another extension, OmniError where it cannot be written.
        """
        extension = _extension(path, _SOUND_WRITERS, "a sound")
        media.write_file(path, self._encode(path, _SOUND_WRITERS[extension]))

    def to_wav_bytes(self) -> bytes:
        """The sound as a 16-bit WAV file."""
        return self._encode("sound", "WAV")

    def _encode(self, name, file_format: str) -> bytes:
        # Scaled here by 32768, as readers do: libsndfile scales by 32767, and 16-bit sound would come back changed.
        clipped = int(np.count_nonzero(np.abs(self.samples) > 1))
        if clipped:
            _log.warning("%s: %d samples beyond full scale are clipped", name, clipped)
        pcm = np.clip(np.rint(self.samples.T * 32768.0), -32768, 32767).astype(np.int16)
        buffer = io.BytesIO()
        try:
            soundfile.write(buffer, pcm, self.sample_rate, format=file_format, subtype="PCM_16")
        except soundfile.LibsndfileError as error:  # FLAC holds at most 8 channels
            raise OmniError(f"{name}: {self!r} cannot be written as {file_format} ({error.error_string})") from error
        return buffer.getvalue()

    def __repr__(self) -> str:
        channels = {1: "mono", 2: "stereo"}.get(self.channels, f"{self.channels} channels")
        return f"Audio({self.seconds:.2f} s, {self.sample_rate} Hz, {channels}{_context(self)})"

    def _repr_html_(self) -> str:
        return f'<audio controls src="{_data_url("audio/wav", self.to_wav_bytes())}"></audio>'


Part = Text | Image | Audio

_READERS = (
    dict.fromkeys(media.TEXT_EXTENSIONS, Text)
    | dict.fromkeys(media.PICTURE_EXTENSIONS, Image)
    | dict.fromkeys(media.SOUND_EXTENSIONS, Audio)
)


def read_part(path: str | os.PathLike) -> Part:
    """Reads a file as the part that its extension names; raises UsageError for an extension that is not known."""
    return _READERS[_extension(path, _READERS, "a part")].read(path)


def as_part(value: Part | str | np.ndarray | PillowImage.Image | os.PathLike) -> Part:
    """A part from what stands for one: a string is text, a uint8 [H, W, 3] array or a Pillow image a picture, a
    `pathlib.Path` a file to read; a part is itself. Raises UsageError for anything else."""
    match value:
        case Text() | Image() | Audio():
            return value
        case str():
            return Text(value)
        case PillowImage.Image():
            return Image.from_pil(value)
        case os.PathLike():
            return read_part(value)
        case np.ndarray(dtype=np.uint8, ndim=3) if value.shape[2] == 3:
            return Image(value)
    found = f"{value.dtype} array {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
    raise UsageError(
        f"a part cannot be made from {found}; accepted: a string, Text, Image, Audio, a uint8 array [H, W, 3], "
        "a Pillow image, a pathlib.Path to a file"
    )


def _named(path, make, *values) -> Part:
    """A part from a file's values; what its constructor refuses is told with the file's name."""
    try:
        return make(*values)
    except UsageError as error:
        raise OmniError(f"{path}: {error}") from error


def _checked_pixels(pixels) -> UInt8[np.ndarray, "height width 3"]:
    array = _as_array(pixels, "picture")
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise UsageError(
            f"picture: expected shape [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], got {list(np.shape(pixels))}"
        )
    if array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):  # written so that NaN fails, too
            raise UsageError(f"picture: floats must lie in [0, 1], found {array.min():g} to {array.max():g}")
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise UsageError(f"picture: expected uint8, or floats in [0, 1], got {array.dtype}")
    if array.shape[2] == 4:
        return media.over_white(PillowImage.fromarray(array))
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


def _checked_samples(samples) -> Float[np.ndarray, "channels samples"]:
    array = np.atleast_2d(_as_array(samples, "sound"))
    if array.ndim != 2:
        raise UsageError(f"sound: expected shape [samples] or [channels, samples], got {list(array.shape)}")
    if array.size == 0:
        raise UsageError("sound: there are no samples")
    if len(array) > MAX_CHANNELS:
        raise UsageError(
            f"sound: {list(array.shape)} has more than {MAX_CHANNELS} channels; channels come first: transpose"
        )
    match array.dtype:
        case np.int16 | np.int32:
            array = array.astype(np.float32) / -float(np.iinfo(array.dtype).min)
        case np.uint8:
            array = (array.astype(np.float32) - 128) / 128
    if array.dtype.kind != "f":
        raise UsageError(f"sound: expected floats, or int16, int32 or uint8 PCM, got {array.dtype}")
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, and is refused as such
        array = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(array).all():
        raise UsageError("sound: NaN or infinite samples")
    return array


def _checked_rate(sample_rate) -> int:
    try:
        rate = operator.index(sample_rate)
    except TypeError as error:
        raise UsageError(f"sound: the sample rate must be a whole number of hertz, got {sample_rate!r}") from error
    if not MIN_SAMPLE_RATE <= rate <= MAX_SAMPLE_RATE:
        raise UsageError(f"sound: a sample rate of {rate} Hz is outside {MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE}")
    return rate


def _as_array(value, name: str) -> np.ndarray:
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name}: {type(value).__name__} is not an array ({error})") from error
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array  # numpy does not count it as a float


def _extension(path: str | os.PathLike, known, what: str) -> str:
    extension = os.path.splitext(os.fspath(path))[1].lower()
    if extension not in known:
        found = f"extension {extension!r}" if extension else "no extension"
        raise UsageError(f"{path}: {found} does not name {what}; known: {', '.join(known)}")
    return extension


def _context(part: Part) -> str:
    return ", context" if part.context else ""


def _data_url(mime_type: str, data: bytes) -> str:
    return f"data:{mime_type};base64,{base64.b64encode(data).decode('ascii')}"
