"""What `omni tokenizer eval`, `encode` and `decode` do: one tokenizer, without a transformer."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

import omni_tokenizers
from omni.parts import Audio, Image, Part, Text, read_part
from omni_tokenizers.errors import OmniError, UsageError


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
    """Reconstruction quality over files and codebook usage: PSNR and SSIM, or mel distance and SI-SDR."""
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
    quality = {"psnr": image_metrics.psnr(pixels, decoded), "ssim": image_metrics.ssim(pixels, decoded)}
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
    return {
        "sounds": len(clips),
        "mel_distance": audio_metrics.mel_distance(reference, estimate, tokenizer.sample_rate, lengths),
        "si_sdr": audio_metrics.si_sdr(reference, estimate, lengths),
        "codebooks": audio_metrics.codebook_usage(np.asarray(codes), tuple(tokenizer.codebook_sizes), frames),
    }
