"""Pictures and sounds as vectors in which judges decide and distances are measured.

They depend on pixels and samples alone: no tokenizer and no network of the model is involved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float
from scipy import ndimage

from omni.parts import Audio, Image, Part
from omni_tokenizers.spectral import hann, mel_filterbank

PICTURE_SIZE = 32
SAMPLE_RATE = 16000
WINDOW, HOP, BANDS, FRAMES = 512, 160, 24, 24
FLOOR_DECIBELS = 45.0  # below the loudest value of a clip nothing is looked at
END_DECIBELS = 25.0  # a word begins and ends where its energy is this far below its loudest frame
_FILTERS = mel_filterbank(SAMPLE_RATE, WINDOW, BANDS)


def picture_features(pictures: Sequence[Image], degrees: float = 0.0, scale: float = 1.0) -> Float[np.ndarray, "n 256"]:
    """The stroke without its colours and place: 16 x 16 values in [0, 1].

    Grey is each pixel's distance in RGB from the background, the median colour of the picture's border, so that light
    on dark and dark on light are alike; it is scaled to 1 at its 99th percentile, moved so that its centre of mass is
    the picture's centre, and averaged over 2 x 2 pixels. Before that it may be turned by `degrees` and enlarged.
    """
    pixels = np.stack([picture.resize_crop(PICTURE_SIZE, PICTURE_SIZE).pixels for picture in pictures])
    grey = np.stack([_centred(_turned(picture, degrees, scale)) for picture in _grey(pixels.astype(np.float32))])
    half = PICTURE_SIZE // 2
    return grey.reshape(len(grey), half, 2, half, 2).mean((2, 4)).reshape(len(grey), -1).astype(np.float32)


def sound_features(sounds: Sequence[Audio]) -> Float[np.ndarray, "n 576"]:
    """The word without its voice's colour, its loudness and its pace: 24 frames of 24 log-mel bands.

    Log-mel energies (16 kHz, Hann window of 32 ms, hop of 10 ms, 24 bands), cut below 45 dB under the largest, cut at
    both ends where a frame's energy is 25 dB under the loudest frame's, resampled linearly to 24 frames, scaled to mean
    0 and deviation 1, each band's mean over time removed.
    """
    return np.stack([_log_mel(sound) for sound in sounds])


FEATURES: dict[str, Callable[[Sequence[Part]], Float[np.ndarray, "n features"]]] = {
    "image": picture_features,
    "audio": sound_features,
}

# (degrees, scale) at which judges see each training picture: models draw a little turned and scaled, as taught.
PICTURE_VIEWS = ((0, 1), (-12, 0.9), (12, 0.9), (-6, 1.1), (6, 1.1))


def _grey(pixels: Float[np.ndarray, "n height width 3"]) -> Float[np.ndarray, "n height width"]:
    border = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], axis=1)
    distance = np.linalg.norm(pixels - np.median(border, axis=1)[:, None, None], axis=-1)
    top = np.percentile(distance, 99, axis=(1, 2), keepdims=True)
    return np.clip(distance / np.maximum(top, 8), 0, 1)  # a flat picture's noise is not blown up


def _turned(grey: Float[np.ndarray, "height width"], degrees: float, scale: float) -> Float[np.ndarray, "height width"]:
    if degrees == 0 and scale == 1:
        return grey
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    matrix, middle = np.array([[cosine, -sine], [sine, cosine]]) / scale, (np.array(grey.shape) - 1) / 2
    return ndimage.affine_transform(grey, matrix, middle - matrix @ middle, order=1)


def _centred(grey: Float[np.ndarray, "height width"]) -> Float[np.ndarray, "height width"]:
    if grey.sum() < 1e-3:
        return grey
    middle = (np.array(grey.shape) - 1) / 2
    return ndimage.shift(grey, middle - ndimage.center_of_mass(grey), order=1)


def _log_mel(sound: Audio) -> Float[np.ndarray, " features"]:
    samples = np.pad(sound.mono().resample(SAMPLE_RATE).samples[0], WINDOW // 2 + HOP)
    frames = np.lib.stride_tricks.sliding_window_view(samples, WINDOW)[::HOP] * hann(WINDOW)
    power = np.abs(np.fft.rfft(frames)) ** 2 @ _FILTERS
    decibels = 10 * np.log10(np.maximum(power, 1e-10))
    decibels = np.maximum(decibels, decibels.max() - FLOOR_DECIBELS)
    energy = power.sum(axis=1)
    loud = np.flatnonzero(energy >= energy.max() * 10 ** (-END_DECIBELS / 10))
    word = decibels[loud[0] : loud[-1] + 1]
    places = np.linspace(0, len(word) - 1, FRAMES)
    below = np.floor(places).astype(int)
    above = np.minimum(below + 1, len(word) - 1)
    share = (places - below)[:, None]
    word = word[below] * (1 - share) + word[above] * share
    word = (word - word.mean()) / max(word.std(), 1e-3)
    return (word - word.mean(axis=0)).ravel().astype(np.float32)
