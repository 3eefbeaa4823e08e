"""Opus, as libsndfile writes it, beside a codec of speech."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import soundfile
from jaxtyping import Float

from omni_tokenizers.errors import OmniError

_OGG_HEADER, _OPUS_HEADERS = 27, 2  # bytes of a page's header before its table; packets that hold no sound


def nearest(
    clips: Sequence[Float[np.ndarray, " samples"]], sample_rate: int, bits_per_second: float
) -> tuple[list[Float[np.ndarray, " samples"]], dict[str, float]]:
    """Clips as Opus gives them back at the setting of libsndfile whose rate is nearest to one, and the rate itself.

    The rate counts the packets of sound; `bits_per_second_of_files` counts the Ogg container too, which weighs much in
    clips of seconds. Opus goes down to about 6 kbit/s.

    Raises:
      OmniError: the installed libsndfile does not write Opus.
    """
    if "OPUS" not in soundfile.available_subtypes("OGG"):
        raise OmniError(f"libsndfile {soundfile.__libsndfile_version__} does not write Opus; 1.0.29 and newer do")
    seconds = sum(map(len, clips)) / sample_rate
    found = []
    for level in np.linspace(1, 0.9, 21):  # from 6 kbit/s up
        files = [_opus(clip, sample_rate, level) for clip in clips]
        rate = 8 * sum(map(_opus_bytes, files)) / seconds
        found.append((abs(rate - bits_per_second), level, rate, files))
        if rate > bits_per_second:
            break
    _, level, rate, files = min(found, key=lambda each: each[0])
    decoded = [soundfile.read(io.BytesIO(file), dtype="float32")[0] for file in files]
    return decoded, {
        "compression_level": float(level),
        "bits_per_second": rate,
        "bits_per_second_of_files": 8 * sum(map(len, files)) / seconds,
    }


def _opus(clip: Float[np.ndarray, " samples"], sample_rate: int, level: float) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, clip, sample_rate, format="OGG", subtype="OPUS", compression_level=level)
    return file.getvalue()


def _opus_bytes(file: bytes) -> int:
    """Bytes of the packets that hold sound (RFC 3533: a page's table lists segments; one below 255 ends a packet)."""
    sizes, place = [0], 0
    while place < len(file):
        table = file[place + _OGG_HEADER : place + _OGG_HEADER + file[place + _OGG_HEADER - 1]]
        for segment in table:
            sizes[-1] += segment
            if segment < 255:
                sizes.append(0)
        place += _OGG_HEADER + len(table) + sum(table)
    return sum(sizes[_OPUS_HEADERS:])
