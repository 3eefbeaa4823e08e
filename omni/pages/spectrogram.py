"""Sounds as pictures."""

from __future__ import annotations

import numpy as np

from omni.parts import Audio, Image
from omni_tokenizers.spectral import hann, mel_filterbank

_MELS = 64
_COLUMNS = 192  # of which a picture has about so many, whatever the length
_RANGE = 80.0  # dB from the loudest band down to black
# Black, violet, orange, pale yellow: brightness rises evenly, so that the picture reads in grey too.
_COLOURS = np.array([[0, 0, 4], [87, 15, 109], [187, 55, 84], [249, 142, 9], [252, 255, 164]], np.float64)


def spectrogram(audio: Audio, loudest: float | None = None) -> Image:
    """Log-mel spectrogram of a sound, time to the right and frequency upwards, 64 bands.

    Args:
      loudest: magnitude that is shown brightest; by default the sound's own largest.
    """
    mel = mel_magnitudes(audio)
    level = 20 * np.log10(np.maximum(mel, 1e-10) / max(mel.max() if loudest is None else loudest, 1e-10))
    place = np.clip(1 + level / _RANGE, 0, 1) * (len(_COLOURS) - 1)
    colours = [np.interp(place, range(len(_COLOURS)), channel) for channel in _COLOURS.T]
    return Image(np.stack(colours, -1).round().astype(np.uint8)[::-1])


def mel_magnitudes(audio: Audio) -> np.ndarray:
    """Mel-filtered magnitudes [64, frames] of all channels' mean."""
    samples = audio.mono().samples[0]
    window = 1 << int(np.log2(audio.sample_rate * 0.04))
    hop = max(1, -(-len(samples) // _COLUMNS))
    padded = np.pad(samples, (window // 2, window))
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[: len(samples) : hop]
    return (np.abs(np.fft.rfft(frames * hann(window))) @ mel_filterbank(audio.sample_rate, window, _MELS)).T
