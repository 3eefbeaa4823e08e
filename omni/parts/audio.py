"""Sounds."""

import dataclasses
import io
import logging
import operator
import os
from typing import ClassVar

import numpy as np
import soundfile
import soxr
from jaxtyping import Float

from omni import media
from omni.parts.shared import as_array, context_note, data_url, extension_of, from_file
from omni_tokenizers.errors import OmniError, UsageError

MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 1_000, 768_000
MAX_CHANNELS = 64

_SOUND_WRITERS = {".wav": "WAV", ".flac": "FLAC"}

_log = logging.getLogger(__name__)


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
        return from_file(path, cls, *media.read_sound(path, max_seconds))

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
        extension = extension_of(path, _SOUND_WRITERS, "a sound")
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
        return f"Audio({self.seconds:.2f} s, {self.sample_rate} Hz, {channels}{context_note(self)})"

    def _repr_html_(self) -> str:
        return f'<audio controls src="{data_url("audio/wav", self.to_wav_bytes())}"></audio>'


def _checked_samples(samples) -> Float[np.ndarray, "channels samples"]:
    array = np.atleast_2d(as_array(samples, "sound"))
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
