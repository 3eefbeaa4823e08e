"""How far reconstructed sounds are from the originals, at several resolutions of time and frequency."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from omni_tokenizers.errors import UsageError
from omni_tokenizers.losses.terms import Sum, quantizer_metrics
from omni_tokenizers.quantizers.base import Quantized, check_weights
from omni_tokenizers.spectral import magnitude, mel_filterbank, stft

DAC_WINDOWS = (32, 64, 128, 256, 512, 1024, 2048)
DAC_MELS = (5, 10, 20, 40, 80, 160, 320)


@dataclasses.dataclass(frozen=True)
class AudioLosses:
    """Weights of the differences between a sound and its reconstruction, each a mean over windows, frames and bins.

    With `windows` and `mels` = DAC_WINDOWS and DAC_MELS the mel term is the loss of the Descript Audio Codec (Kumar et
    al. 2023, arXiv:2306.06546, section 3.5), but for natural logarithms and a mean over windows where DAC has decimal
    ones and a sum: DAC's weight of 15 is 15 x 7 / ln 10 = 45.6 here. All frames are centred in a hop, zeros around.
    """

    windows: tuple[int, ...] = (256, 512, 1024, 2048)
    """Windows, in samples, multiples of 8; each has hops of a quarter."""
    mels: tuple[int, ...] = (20, 40, 80, 120)
    """Mel bands of each of these windows."""
    mel: float = 1.0
    """Weight of the absolute difference of log-mels, clamped below at 1e-5."""
    magnitude: float = 1.0
    """Weight of the absolute difference of magnitudes, relative to the original's mean magnitude."""
    complex: float = 0.1
    """Weight of the difference of complex spectra, relative to it too, which alone sees the phase."""
    waveform: float = 0.0
    """Weight of the absolute difference of samples (L1)."""

    def __post_init__(self) -> None:
        check_weights(mel=self.mel, magnitude=self.magnitude, complex=self.complex, waveform=self.waveform)
        check_windows(self.windows, self.mels)

    def __call__(
        self,
        estimate: Float[Array, "batch samples"],
        audio: Float[Array, "batch samples"],
        mask: Float[Array, "batch frames"],
        quantized: Quantized,
        sample_rate: int,
    ) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, Sum]]:
        """(total, weight, metrics): the loss summed over clips, their number, and metrics name -> (total, weight).

        Clips without a frame weigh nothing. The quantiser's own losses count once a clip.

        Args:
            mask: 1 for the frames of codes that a clip has; `samples` is a multiple of their number.
        """
        present = jnp.repeat(mask, audio.shape[1] // mask.shape[1], axis=1)
        clips = (mask[:, 0] > 0).astype(jnp.float32)
        mel, size, wave = (term @ clips for term in self.distances(estimate, audio, present, sample_rate))
        weight = clips.sum()
        total = self.mel * mel + self.magnitude * size + self.complex * wave
        values = {"mel": mel, "magnitude": size, "complex": wave}
        if self.waveform:
            error = (jnp.abs(estimate - audio) * present).sum(1) / jnp.maximum(present.sum(1), 1)
            values["waveform"] = error @ clips
            total += self.waveform * values["waveform"]
        total += (quantized.commitment + quantized.auxiliary) * weight
        metrics = {name: (value, weight) for name, value in values.items()} | quantizer_metrics(quantized, weight)
        return total, weight, metrics

    def distances(
        self,
        estimate: Float[Array, "batch samples"],
        audio: Float[Array, "batch samples"],
        present: Float[Array, "batch samples"],
        sample_rate: int,
    ) -> tuple[Float[Array, " batch"], Float[Array, " batch"], Float[Array, " batch"]]:
        """Differences of log-mels, magnitudes and complex spectra: means over a clip's frames, bins and all windows."""
        scales = [
            _distances_at(estimate, audio, present, window, mel_filterbank(sample_rate, window, mels))
            for window, mels in zip(self.windows, self.mels, strict=True)
        ]
        return tuple(sum(term) / len(scales) for term in zip(*scales, strict=True))


def check_windows(windows: tuple[int, ...], mels: tuple[int, ...]) -> None:
    """A UsageError unless there are windows that hops of a quarter tile, and mel bands for each."""
    if not windows or len(windows) != len(mels) or any(window < 8 or window % 8 for window in windows) or min(mels) < 1:
        raise UsageError(f"loss windows must be multiples of 8, each with mel bands, got {windows} and {mels}")


def _distances_at(estimate: Array, audio: Array, present: Array, window: int, bank: np.ndarray) -> tuple[Array, ...]:
    """The terms of `AudioLosses.distances` at one window."""
    hop = window // 4
    whole = ((0, 0), (0, -audio.shape[1] % hop))
    inside = jnp.pad(present, whole)[:, ::hop]

    def mean(x):
        return (x.mean(-1) * inside).sum(1) / jnp.maximum(inside.sum(1), 1)

    spectra = [stft(jnp.pad(each, whole), window, hop) for each in (estimate, audio)]
    sizes = [magnitude(spectrum) for spectrum in spectra]
    mels = [jnp.log(jnp.maximum(size @ bank, 1e-5)) for size in sizes]
    scale = 1 / jnp.maximum(mean(sizes[1]), 1e-2)
    linear, wave = jnp.abs(sizes[0] - sizes[1]), magnitude(spectra[0] - spectra[1])
    return mean(jnp.abs(mels[0] - mels[1])), mean(linear) * scale, mean(wave) * scale
