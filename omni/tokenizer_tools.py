"""What `omni tokenizer eval`, `encode` and `decode` do: one tokenizer, without a transformer."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

import omni_tokenizers
from omni.parts import Audio, Image, Part, Text, read_part
from omni_tokenizers.errors import OmniError, UsageError

logger = logging.getLogger(__name__)


def encode_part(directory: str, part: Part) -> dict:
    """Codes of one part as JSON: `{"modality", "codes"}`, for sound also `lengths` in samples."""
    tokenizer = omni_tokenizers.load(directory)
    if part.modality != tokenizer.modality:
        raise UsageError(f"{directory} is a tokenizer of {tokenizer.modality}; it was given {part.modality}")
    if isinstance(part, Text):
        return {"modality": "text", "codes": np.asarray(tokenizer.encode(part.text)).tolist()}
    codes = tokenizer.encode(_array(tokenizer, part))
    entry = {"modality": part.modality, "codes": np.asarray(codes).tolist()}
    if codes.lengths is not None:
        entry["lengths"] = np.asarray(codes.lengths).tolist()
    return entry


def _array(tokenizer, part: Image | Audio) -> np.ndarray:
    """A batch of one, at the tokenizer's size or rate."""
    if isinstance(part, Image):
        return part.resize_crop(tokenizer.image_size, tokenizer.image_size).pixels[None]
    return part.mono().resample(tokenizer.sample_rate).samples[None]


def decode_to_file(directory: str, codes: str, output: str) -> None:
    """Decodes what `encode_part` wrote (a JSON file, or `-` for standard input) to a file."""
    tokenizer = omni_tokenizers.load(directory)
    try:
        entry = json.loads(sys.stdin.read() if codes == "-" else Path(codes).read_text())
        ids = np.asarray(entry["codes"], np.int64)
    except FileNotFoundError:
        raise UsageError(f"{codes}: no such file") from None
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise OmniError(f"{codes}: not codes written by omni tokenizer encode ({error})") from None
    if tokenizer.modality == "text":
        Text(tokenizer.decode(ids)).save(output)
        return
    lengths = entry.get("lengths")
    decoded = tokenizer.decode(omni_tokenizers.Codes(ids, None if lengths is None else np.asarray(lengths)))[0]
    (Image(decoded) if tokenizer.modality == "image" else Audio(decoded, tokenizer.sample_rate)).save(output)


def evaluate_files(directory: str, files: Sequence[str]) -> dict:
    """Reconstruction quality over files and codebook usage: PSNR, SSIM, MS-SSIM; mel distance, SI-SDR, STOI, PESQ.

    What cannot be measured (a package is missing, pictures are small, nothing is said) is None, and the log says why.
    """
    tokenizer = omni_tokenizers.load(directory)
    if tokenizer.modality == "text":
        raise UsageError(f"{directory} is a tokenizer of text, which is exact; eval measures pictures and sound")
    parts = [read_part(file) for file in files]
    for file, part in zip(files, parts, strict=True):
        if part.modality != tokenizer.modality:
            raise UsageError(f"{file} holds {part.modality}; {directory} is a tokenizer of {tokenizer.modality}")
    arrays = [_array(tokenizer, part)[0] for part in parts]
    return (
        _evaluate_images(tokenizer, np.stack(arrays))
        if tokenizer.modality == "image"
        else _evaluate_audio(tokenizer, arrays)
    )


def _evaluate_images(tokenizer, pixels: UInt8[np.ndarray, "n height width 3"]) -> dict:
    from omni_tokenizers import image_metrics

    codes = tokenizer.encode(pixels)
    decoded = tokenizer.decode(codes)
    use = image_metrics.codebook_use(np.asarray(codes), tokenizer.codebook_sizes[0])
    names = ("psnr", "ssim", "ms_ssim")
    quality = {name: _measured(getattr(image_metrics, name), pixels, decoded) for name in names}
    return {"pictures": len(pixels), **quality, **use}


def _evaluate_audio(tokenizer, clips: list[Float[np.ndarray, "1 samples"]]) -> dict:
    from omni_tokenizers import audio_metrics

    lengths = np.array([clip.shape[1] for clip in clips])
    batch = np.zeros((len(clips), 1, lengths.max()), np.float32)
    for row, clip in zip(batch, clips, strict=True):
        row[:, : clip.shape[1]] = clip
    codes = tokenizer.encode(batch, lengths=lengths)
    reference, estimate = batch[:, 0], tokenizer.decode(codes)[:, 0]
    frames = -(-lengths // tokenizer.samples_per_frame)
    pair, rate = (reference, estimate), tokenizer.sample_rate
    return {
        "sounds": len(clips),
        "mel_distance": audio_metrics.mel_distance(*pair, rate, lengths),
        "si_sdr": _measured(audio_metrics.si_sdr, *pair, lengths),
        "stoi": _measured(audio_metrics.stoi, *pair, rate, lengths),
        "pesq": _measured(audio_metrics.pesq, *pair, rate, lengths),
        "codebooks": audio_metrics.codebook_usage(np.asarray(codes), tuple(tokenizer.codebook_sizes), frames),
    }


def _measured(measure: Callable[..., float], *arguments) -> float | None:
    """A measure's value, None where it has none."""
    try:
        value = measure(*arguments)
    except OmniError as error:
        logger.warning("not measured: %s", error)
        return None
    if math.isnan(value):
        logger.warning("not measured: %s, too short or silent", measure.__name__)
        return None
    return value
