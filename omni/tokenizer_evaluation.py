"""How well a tokenizer brings back the pictures, videos or sounds of files: what `omni tokenizer eval` prints.

Pictures and videos are read, coded and compared a few at a time, so that memory does not grow with their number.
"""

from __future__ import annotations

import collections
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Float, UInt8

import omni_tokenizers
from omni.parts import Image, Part, Video, read_part
from omni.tokenizer_tools import prepared, say
from omni_tokenizers import audio_metrics, inception
from omni_tokenizers.codes import codebook_use
from omni_tokenizers.errors import OmniError, UsageError
from omni_tokenizers.image import normalized
from omni_tokenizers.image_metrics import ms_ssim, psnr, ssim
from omni_tokenizers.losses import perceptual

_TOGETHER = 16  # pictures
_FEW_PICTURES = 10_000
"""Below which a Fréchet distance says little."""

logger = logging.getLogger(__name__)


def evaluate_files(
    directory: str,
    files: Sequence[str],
    *,
    fps: float | None = None,
    lpips_weights: str | None = None,
    inception_weights: str | None = None,
) -> dict:
    """Reconstruction quality over files and codebook usage: PSNR, SSIM, MS-SSIM; mel distance, SI-SDR, STOI, PESQ.

    Videos are measured frame by frame. What cannot be measured (a package is missing, pictures are small, nothing is
    said) is None, and the log says why.

    Args:
        fps: frames a second that are taken of videos; default: all frames.
        lpips_weights: safetensors file of LPIPS (see `PerceptualDistance`); with it, LPIPS of pictures.
        inception_weights: safetensors file of Inception v3 (see `InceptionFeatures`); with it, rFID of pictures: the
            Fréchet distance of reconstructions from originals.
    Raises:
        UsageError: files of another modality, or weights with files that hold no pictures.
        OmniError: damaged files or weights.
    """
    tokenizer = omni_tokenizers.load(directory)
    if tokenizer.modality == "text":
        raise UsageError(f"{directory} is a tokenizer of text, which is exact; eval measures pictures, sound and video")
    first = read_part(files[0], fps)
    if first.modality not in tokenizer.modalities:
        raise UsageError(f"{files[0]} holds {first.modality}; {directory} is a tokenizer of {tokenizer.modality}")
    if not isinstance(first, Image) and (lpips_weights or inception_weights):
        raise UsageError(f"LPIPS and rFID compare pictures; {files[0]} holds {first.modality}")
    parts = _read(files, first.modality, fps)
    changes: collections.Counter[str] = collections.Counter()
    if isinstance(first, Image):
        networks = _Networks(lpips_weights, inception_weights)
        result = _evaluate_images(tokenizer, (prepared(tokenizer, x, changes, same_size=True) for x in parts), networks)
    elif isinstance(first, Video):
        result = _evaluate_videos(tokenizer, (prepared(tokenizer, part, changes) for part in parts), files)
    else:
        result = _evaluate_audio(tokenizer, [prepared(tokenizer, part, changes) for part in parts])
    say(changes, len(files))
    return result


def _read(files: Sequence[str], modality: str, fps: float | None) -> Iterator[Part]:
    """One part after the other, all of one modality."""
    for file in files:
        part = read_part(file, fps)
        if part.modality != modality:
            raise UsageError(f"{file} holds {part.modality}, {files[0]} {modality}; measure them apart")
        yield part


class _Means:
    """Means of measures over pictures; None where one cannot be had, of which the log tells once."""

    def __init__(self):
        self.sums: dict[str, float | None] = {}
        self.count = 0

    def add(self, measures: Sequence[Callable[..., float]], reference: np.ndarray, estimate: np.ndarray) -> None:
        """Measures some more pictures."""
        for measure in measures:
            before = self.sums.setdefault(measure.__name__, 0.0)
            if before is not None:
                value = _measured(measure, reference, estimate)
                self.sums[measure.__name__] = None if value is None else before + len(reference) * value
        self.count += len(reference)

    def values(self) -> dict[str, float | None]:
        """Each measure by name."""
        finite = {name: None if total is None else _finite(name, total) for name, total in self.sums.items()}
        return {name: None if total is None else total / self.count for name, total in finite.items()}


class _Networks:
    """The user's networks, which are read before anything else."""

    def __init__(self, lpips_weights: str | None, inception_weights: str | None):
        self.distance = perceptual.PerceptualDistance.read(lpips_weights) if lpips_weights else None
        if self.distance and not self.distance.is_lpips:
            raise OmniError(f"{lpips_weights}: holds no linI.model.1.weight, without which the distance is no LPIPS")
        self.features = inception.InceptionFeatures.read(inception_weights) if inception_weights else None
        self._found: list[list[np.ndarray]] = [[], []]
        self._apart = jax.jit(lambda *pair: self.distance(*map(normalized, pair)))

    def lpips(self, reference: UInt8[np.ndarray, "n height width 3"], estimate: np.ndarray) -> float:
        """Mean over pictures."""
        return float(np.mean([self._apart(b[None], a[None])[0] for a, b in zip(reference, estimate, strict=True)]))

    def see(self, reference: UInt8[np.ndarray, "n height width 3"], estimate: np.ndarray) -> None:
        """Keeps what rFID needs of some pictures."""
        for found, pictures in zip(self._found, (reference, estimate), strict=True):
            found.append(self.features(pictures))

    def rfid(self) -> float | None:
        """The Fréchet distance of all that was seen; it falls with the number of pictures, so that is said."""
        originals, decoded = map(np.concatenate, self._found)
        if len(originals) < _FEW_PICTURES:
            count = len(originals)
            logger.warning("rFID of %d pictures is far above that of many; published ones are of 50,000", count)
        return _measured(inception.frechet_distance, originals, decoded)


def _evaluate_images(tokenizer, pictures: Iterator[UInt8[np.ndarray, "height width 3"]], networks: _Networks) -> dict:
    means, codes = _Means(), []
    measures = [psnr, ssim, ms_ssim, *([networks.lpips] if networks.distance else [])]
    while chunk := list(itertools.islice(pictures, _TOGETHER)):
        pixels = np.stack(chunk)
        found = tokenizer.encode(pixels)
        decoded = tokenizer.decode(found)
        codes.append(np.asarray(found).ravel())
        means.add(measures, pixels, decoded)
        if networks.features:
            networks.see(pixels, decoded)
    result = {"pictures": means.count, **means.values()}
    if networks.distance:
        signature = {"sha256": networks.distance.sha256, "preprocessing": perceptual.PREPROCESSING}
        result["lpips_weights"] = signature
    if networks.features:
        signature = {"sha256": networks.features.sha256, "preprocessing": inception.PREPROCESSING}
        result |= {"rfid": networks.rfid(), "rfid_weights": signature}
    return result | codebook_use(np.concatenate(codes), tokenizer.codebook_sizes[0])


def _evaluate_videos(
    tokenizer, videos: Iterator[UInt8[np.ndarray, "time height width 3"]], files: Sequence[str]
) -> dict:
    """Means over all frames of all videos, and the measures of each frame by file."""
    measures, codes = (psnr, ssim, ms_ssim), []
    by_frame: dict[str, dict[str, list]] = {measure.__name__: {} for measure in measures}
    for file, frames in zip(files, videos, strict=True):
        found = tokenizer.encode(frames[None])
        decoded = tokenizer.decode(found)[0]
        codes.append(np.asarray(found).ravel())
        for measure in measures:
            by_frame[measure.__name__][file] = _measured_frames(measure, frames, decoded)
    quality = {name: _mean([x for values in found.values() for x in values]) for name, found in by_frame.items()}
    use = codebook_use(np.concatenate(codes), tokenizer.codebook_sizes[0])
    count = sum(map(len, by_frame["psnr"].values()))
    return {"videos": len(files), "frames": count, **quality, **use, "by_frame": by_frame}


def _measured_frames(measure: Callable[..., float], frames, decoded) -> list[float | None]:
    """A measure of each frame; all None, which is said once, where it cannot be measured."""
    try:
        values = [measure(a[None], b[None]) for a, b in zip(frames, decoded, strict=True)]
    except OmniError as error:
        logger.warning("not measured: %s", error)
        return [None] * len(frames)
    if lossless := sum(map(math.isinf, values)):
        logger.warning("not measured: %s of %d frames, in which nothing was lost", measure.__name__, lossless)
    return [value if math.isfinite(value) else None for value in values]


def _mean(values: list[float | None]) -> float | None:
    """The mean of what could be measured; None where there is none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _evaluate_audio(tokenizer, clips: list[Float[np.ndarray, "channels samples"]]) -> dict:
    lengths = np.array([clip.shape[1] for clip in clips])
    batch = np.zeros((len(clips), tokenizer.channels, lengths.max()), np.float32)
    for row, clip in zip(batch, clips, strict=True):
        row[:, : clip.shape[1]] = clip
    codes = tokenizer.encode(batch, lengths=lengths)
    frames = tokenizer.frames(lengths)
    # Each channel is compared by itself.
    reference, estimate = (x.reshape(-1, x.shape[2]) for x in (batch, tokenizer.decode(codes)))
    lengths = np.repeat(lengths, tokenizer.channels)
    pair, rate = (reference, estimate), tokenizer.sample_rate
    measures = {
        "si_sdr": (audio_metrics.si_sdr, *pair, lengths),
        "stoi": (audio_metrics.stoi, *pair, rate, lengths),
        "pesq": (audio_metrics.pesq, *pair, rate, lengths),
    }
    return {
        "sounds": len(clips),
        "mel_distance": audio_metrics.mel_distance(*pair, rate, lengths),
        **{name: _finite(name, _measured(*measure)) for name, measure in measures.items()},
        "codebooks": audio_metrics.codebook_usage(np.asarray(codes), tuple(tokenizer.codebook_sizes), frames),
    }


def _measured(measure: Callable[..., float], *arguments) -> float | None:
    """A measure's value, None where it cannot be measured."""
    try:
        return measure(*arguments)
    except OmniError as error:
        logger.warning("not measured: %s", error)
        return None


def _finite(name: str, value: float | None) -> float | None:
    """A value that JSON has a number for, or None."""
    if value is not None and not math.isfinite(value):
        why = "too short or silent" if math.isnan(value) else "nothing was lost"
        logger.warning("not measured: %s, %s", name, why)
        return None
    return value
