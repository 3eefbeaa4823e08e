"""Measures of sound that need no network: mel distance, SI-SDR, STOI, PESQ and the use of codebooks.

All take numpy arrays: `reference` and `estimate` float [clips, samples], `lengths` int [clips] in samples (None = all).
Arrays of other shapes raise OmniError.
"""

import logging
from collections.abc import Iterator

import numpy as np
import soxr
from jaxtyping import Float, Int

from omni_tokenizers.codes import codebook_use
from omni_tokenizers.errors import OmniError
from omni_tokenizers.losses.audio import DAC_MELS, DAC_WINDOWS
from omni_tokenizers.spectral import hann, mel_filterbank

_STOI_SECONDS = 3
_PESQ_RATE = 16000
_PESQ_WORST, _INAUDIBLE = 1.0, 1e-9  # silence as an estimate stops the package
logger = logging.getLogger(__name__)


def mel_distance(
    reference: Float[np.ndarray, "clips samples"],
    estimate: Float[np.ndarray, "clips samples"],
    sample_rate: int,
    lengths: Int[np.ndarray, " clips"] | None = None,
) -> float:
    """Mel distance as the Descript Audio Codec defines it (Kumar et al. 2023, arXiv:2306.06546, 3.5), mean over clips.

    Sum over windows of 32, 64 ... 2048 samples (periodic Hann, hops of a quarter, centred frames, reflected edges) of
    the mean absolute difference of log10 mel magnitudes, in 5, 10 ... 320 bands (Slaney scale and norm) clamped below
    at 1e-5. DAC's windows are the same at every sample rate. Clips under half a window are filled up with silence.
    """
    pairs = _clips(reference, estimate, lengths)
    return float(np.mean([_mel_distance(a, b, sample_rate) for a, b in pairs]))


def si_sdr(
    reference: Float[np.ndarray, "clips samples"],
    estimate: Float[np.ndarray, "clips samples"],
    lengths: Int[np.ndarray, " clips"] | None = None,
) -> float:
    """Scale-invariant signal-to-distortion ratio in dB, mean over clips (Le Roux et al. 2019, arXiv:1811.02508).

    Means are removed first. It compares waveforms, so a codec that makes its own phases scores low however it sounds.
    Clips whose reference is silent are left out; NaN if all are.
    """
    values = [_si_sdr(a - a.mean(), b - b.mean()) for a, b in _clips(reference, estimate, lengths) if np.ptp(a) > 0]
    return float(np.mean(values)) if values else float("nan")


def stoi(
    reference: Float[np.ndarray, "clips samples"],
    estimate: Float[np.ndarray, "clips samples"],
    sample_rate: int,
    lengths: Int[np.ndarray, " clips"] | None = None,
) -> float:
    """Short-time objective intelligibility (Taal et al. 2011) by pystoi: about 0 to 1, mean over stretches of 3 s.

    It needs about 0.4 s of speech, which a spoken word may not have, so clips are joined in order and cut into
    stretches of at least 3 s. NaN if the clips together are shorter.

    Raises:
        OmniError: pystoi is not installed.
    """
    try:
        import pystoi
    except ImportError:
        raise OmniError('STOI needs pystoi: pip install "omni-any-to-any[quickstart]"') from None
    pairs = list(_clips(reference, estimate, lengths))
    a, b = (np.concatenate(side) for side in zip(*pairs, strict=True))
    pieces = len(a) // (_STOI_SECONDS * sample_rate)
    if not pieces:
        return float("nan")
    stretches = zip(np.array_split(a, pieces), np.array_split(b, pieces), strict=True)
    return float(np.mean([pystoi.stoi(x, y, sample_rate) for x, y in stretches]))


def pesq(
    reference: Float[np.ndarray, "clips samples"],
    estimate: Float[np.ndarray, "clips samples"],
    sample_rate: int,
    lengths: Int[np.ndarray, " clips"] | None = None,
) -> float:
    """Perceptual evaluation of speech quality, wideband (ITU-T P.862.2), by the package pesq: 1 to 4.64, mean of clips.

    Both are resampled to 16 kHz. Clips in whose reference PESQ finds no speech, or that are shorter than 0.25 s, are
    left out and their number is logged; NaN if all are. Silence in place of speech, of which PESQ makes no number,
    counts as 1.

    Raises:
        OmniError: pesq is not installed.
    """
    try:
        import pesq as package
    except ImportError:
        raise OmniError('PESQ needs the package pesq: pip install "omni-any-to-any[speech]"') from None
    scores = [_pesq(package, a, b, sample_rate) for a, b in _clips(reference, estimate, lengths)]
    measured = [score for score in scores if score is not None]
    if len(measured) < len(scores):
        logger.warning("PESQ: %d of %d clips hold no speech and are left out", len(scores) - len(measured), len(scores))
    return float(np.mean(measured)) if measured else float("nan")


def codebook_usage(
    codes: Int[np.ndarray, "clips codebooks frames"],
    sizes: tuple[int, ...],
    frames: Int[np.ndarray, " clips"] | None = None,
) -> list[dict[str, float]]:
    """For each codebook: "usage", the share of its codes that occur, and "perplexity", exp of their entropy.

    Over the whole set given, not a mean over batches; `frames` = how many frames of each clip count (None = all).
    """
    codes = np.asarray(codes)
    frames = np.full(len(codes), codes.shape[2]) if frames is None else np.asarray(frames)
    inside = np.arange(codes.shape[2]) < frames[:, None]
    return [codebook_use(codes[:, level][inside], size) for level, size in enumerate(sizes)]


def _clips(reference, estimate, lengths) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of clips cut to their lengths, in float64."""
    reference, estimate = np.asarray(reference, np.float64), np.asarray(estimate, np.float64)
    if reference.ndim != 2 or reference.shape != estimate.shape or not reference.size:
        raise OmniError(
            f"expected two arrays [clips, samples] of one shape, got {reference.shape} and {estimate.shape}"
        )
    lengths = [reference.shape[1]] * len(reference) if lengths is None else lengths
    return ((a[:n], b[:n]) for a, b, n in zip(reference, estimate, lengths, strict=True))


def _mel_distance(reference: np.ndarray, estimate: np.ndarray, sample_rate: int) -> float:
    pairs = zip(DAC_WINDOWS, DAC_MELS, strict=True)
    logs = [[_log10_mel(audio, sample_rate, *pair) for audio in (reference, estimate)] for pair in pairs]
    return sum(float(np.abs(a - b).mean()) for a, b in logs)


def _log10_mel(audio: np.ndarray, sample_rate: int, window: int, mels: int) -> Float[np.ndarray, "frames mels"]:
    audio = np.pad(audio, (0, max(0, window // 2 + 1 - len(audio))))
    audio = np.pad(audio, window // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(audio, window)[:: window // 4]
    mel = np.abs(np.fft.rfft(frames * hann(window))) @ mel_filterbank(sample_rate, window, mels)
    return np.log10(np.maximum(mel, 1e-5))


def _si_sdr(reference: np.ndarray, estimate: np.ndarray) -> float:
    target = reference * (estimate @ reference) / (reference @ reference)
    noise = estimate - target
    return 10 * np.log10((target @ target + 1e-12) / (noise @ noise + 1e-12))


def _pesq(package, reference: np.ndarray, estimate: np.ndarray, sample_rate: int) -> float | None:
    """The score of a clip; None if its reference holds no speech."""
    audible = np.abs(estimate).max(initial=0) > _INAUDIBLE
    # With silence in the estimate's place the reference is compared with itself, to learn whether it holds speech.
    pair = (reference, estimate if audible else reference)
    if not np.any(reference):
        return None
    try:
        score = package.pesq(_PESQ_RATE, *(soxr.resample(side, sample_rate, _PESQ_RATE) for side in pair), "wb")
    except (package.NoUtterancesError, package.BufferTooShortError):
        return None
    return score if audible else _PESQ_WORST
