"""What `omni import`, `omni export` and `omni tokenizer` do with one tokenizer, without a transformer."""

from __future__ import annotations

import collections
import json
import logging
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from etils import epath
from jaxtyping import Float, UInt8

import omni_tokenizers
from omni.parts import Audio, Image, Part, Text, Video, read_part
from omni_tokenizers.base import DESCRIPTION
from omni_tokenizers.codes import as_codes, codebook_use
from omni_tokenizers.errors import OmniError, UsageError

_BESIDES = ("lengths", "scales", "sizes")
"""What `Codes` may hold besides ids."""
_MOST_PIXELS = 2048 * 2048
"""Of a picture that goes through a net as it is: some 2 GB in a layer of 128 channels."""
_MOST_VIDEO_PIXELS = 16 * _MOST_PIXELS
"""Of all frames of a video, which is encoded as a whole: 200 MB; nets see a few frames at a time."""
_FEW_PICTURES = 10_000
"""Below which a Fréchet distance says little."""

logger = logging.getLogger(__name__)


def import_tokenizer(
    source: str, directory: Path, *, image_size: int | None = None, torch_reader: bool = False
) -> None:
    """Writes the tokenizer of a public checkpoint, a directory or a file, as this package's own directory.

    Arguments and errors are those of `omni_tokenizers.checkpoints.import_checkpoint`.
    """
    from omni_tokenizers.checkpoints import import_checkpoint

    import_checkpoint(source, image_size=image_size, torch_reader=torch_reader).save(directory)


def is_tokenizer(directory: str) -> bool:
    """Whether a directory holds a tokenizer of this package, rather than a model."""
    return (epath.Path(directory) / DESCRIPTION).exists()


def export_tokenizer(source: str, directory: Path, *, file_format: str, dtype: str) -> None:
    """Writes a tokenizer as this package's own directory ("omni") or as one that transformers loads ("transformers").

    Raises:
        OmniError: transformers has no such tokenizer.
        UsageError: a dtype for what has no weights, or is written in float32 alone.
    """
    tokenizer = omni_tokenizers.load(source)
    if file_format == "transformers":
        from omni_tokenizers.checkpoints import export_checkpoint

        if dtype != "float32":
            raise UsageError("transformers' directories are written in float32: leave --dtype out")
        export_checkpoint(tokenizer, directory)
    elif tokenizer.modality == "text":
        if dtype != "float32":
            raise UsageError("a tokenizer of text has no weights: leave --dtype out")
        tokenizer.save(directory)
    else:
        tokenizer.save(directory, dtype=dtype)


def modalities(tokenizer) -> tuple[str, ...]:
    """What a tokenizer takes: its modality, and videos where its pictures may have an axis of time, as Emu3's."""
    axes = [names for names, _ in getattr(tokenizer, "axes", ())]
    return (tokenizer.modality, "video") if ("time", "height", "width") in axes else (tokenizer.modality,)


def encode_part(directory: str, part: Part) -> dict:
    """Codes of one part as JSON: "modality", "codes", and what `Codes` holds besides for their exact decoding.

    That is `lengths` in samples, `scales`, and `sizes`: (height, width), of a video (time, height, width). A video has
    its "timestamps" in seconds, too, which no tokenizer knows of.
    """
    tokenizer = omni_tokenizers.load(directory)
    if part.modality not in modalities(tokenizer):
        raise UsageError(f"{directory} is a tokenizer of {tokenizer.modality}; it was given {part.modality}")
    if isinstance(part, Text):
        return {"modality": "text", "codes": np.asarray(tokenizer.encode(part.text)).tolist()}
    codes = tokenizer.encode(prepared(tokenizer, [part])[0][None])
    besides = {name: getattr(codes, name) for name in _BESIDES}
    besides["timestamps"] = part.timestamps if isinstance(part, Video) else None
    return {"modality": part.modality, "codes": np.asarray(codes).tolist()} | {
        name: np.asarray(value).tolist() for name, value in besides.items() if value is not None
    }


def prepared(tokenizer, parts: Sequence[Image | Audio | Video], *, same_size: bool = False) -> list[np.ndarray]:
    """Each part's array as the tokenizer takes it: pixels, or samples at its rate; what that changes is said once.

    A tokenizer of pictures that takes videos, too, is given parts of one of them.

    Args:
        same_size: scale and crop pictures to the tokenizer's own size even where it takes any.
    Raises:
        OmniError: a picture or a video that is too large to go through a net as it is.
    """
    changes: collections.Counter[str] = collections.Counter()
    if tokenizer.modality == "audio":
        arrays = [_samples(tokenizer, part, changes) for part in parts]
    elif all(isinstance(part, Video) for part in parts):
        arrays = [_frames(part, None if tokenizer.takes_any_size else tokenizer.image_size, changes) for part in parts]
    else:
        side = tokenizer.image_size if same_size or not tokenizer.takes_any_size else None
        arrays = [_pixels(part, side, changes) for part in parts]
    for change, count in changes.items():
        logger.warning("%s%s", change, f" ({count} of {len(parts)})" if len(parts) > 1 else "")
    return arrays


def _samples(tokenizer, part: Audio, changes: collections.Counter[str]) -> Float[np.ndarray, "channels samples"]:
    channels = tokenizer.channels
    if part.channels != channels:
        changes[f"sound is mixed from {part.channels} to {channels} channels"] += 1
        part = part.mono()
    if part.sample_rate != tokenizer.sample_rate:
        changes[f"sound is resampled from {part.sample_rate} to {tokenizer.sample_rate} Hz"] += 1
        part = part.resample(tokenizer.sample_rate)
    return np.broadcast_to(part.samples, (channels, part.samples.shape[1]))


def _pixels(part: Image, side: int | None, changes: collections.Counter[str]) -> UInt8[np.ndarray, "height width 3"]:
    if side is not None:
        if (part.height, part.width) != (side, side):
            changes[f"pictures are scaled and cropped to {side}x{side} pixels"] += 1
        return part.resize_crop(side, side).pixels
    _check_size(part.height, part.width)
    return part.pixels


def _frames(part: Video, side: int | None, changes: collections.Counter[str]) -> UInt8[np.ndarray, "time h w 3"]:
    if side is not None:
        if (part.height, part.width) != (side, side):
            changes[f"videos are scaled and cropped to {side}x{side} pixels"] += 1
        part = part.resize_crop(side, side)
    _check_size(part.height, part.width, len(part.frames))
    return part.frames


def _check_size(height: int, width: int, frames: int = 1) -> None:
    """An OmniError for a picture or a video that would not fit the memory of most machines."""
    if int(height) * int(width) > _MOST_PIXELS:
        raise OmniError(
            f"{width}x{height} pixels are more than {_MOST_PIXELS / 1e6:.1f} million: scale the picture down"
        )
    if int(height) * int(width) * int(frames) > _MOST_VIDEO_PIXELS:
        most = f"{_MOST_VIDEO_PIXELS / 1e6:.0f} million pixels"
        raise OmniError(
            f"{frames} frames of {width}x{height} are more than {most}: cut the video, scale it, lower its fps"
        )


def decode_to_file(directory: str, codes: str, output: str) -> None:
    """Decodes what `encode_part` wrote (a JSON file, or `-` for standard input) to a file.

    Raises:
        OmniError: not JSON of codes, or codes that do not fit the tokenizer.
        UsageError: no such file, codes of another modality, or an output whose extension is not known.
    """
    tokenizer = omni_tokenizers.load(directory)
    modality, found, timestamps = _read_codes(codes)
    if modality not in (None, *modalities(tokenizer)):
        raise UsageError(f"{codes} holds codes of {modality}; {directory} is a tokenizer of {tokenizer.modality}")
    try:
        part = _decoded(tokenizer, found, timestamps)
    except OmniError as error:
        raise OmniError(f"{codes}: {error}") from None
    part.save(output)


def _read_codes(path: str) -> tuple[str | None, omni_tokenizers.Codes, list | None]:
    """The modality that a file of codes names, if any, its arrays as they stand there, and a video's time stamps."""
    try:
        entry = json.loads(sys.stdin.read() if path == "-" else Path(path).read_text())
        besides = {name: np.asarray(entry[name]) for name in _BESIDES if entry.get(name) is not None}
        codes = omni_tokenizers.Codes(np.asarray(entry["codes"]), **besides)
        return entry.get("modality"), codes, entry.get("timestamps")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise OmniError(f"{path}: not codes written by omni tokenizer encode ({error})") from None


def _decoded(tokenizer, codes: omni_tokenizers.Codes, timestamps: list | None = None) -> Part:
    if tokenizer.modality == "text":
        return Text(tokenizer.decode(as_codes(codes, axes=("length",), size=tokenizer.vocabulary_size)))
    if codes.ids.ndim and len(codes) != 1:
        raise OmniError(f"codes of {len(codes)} parts, of which a file holds one")
    if tokenizer.modality == "audio":
        return Audio(tokenizer.decode(codes)[0], tokenizer.sample_rate)
    if codes.ids.ndim > 3 and "video" not in modalities(tokenizer):
        raise OmniError("codes of a video, of a tokenizer of pictures alone")
    if tokenizer.takes_any_size and codes.ids.ndim in (3, 4):
        frames, height, width = np.multiply((1, *codes.shape[1:])[-3:], (1, *tokenizer.config.strides)[-3:])
        _check_size(height, width, frames)
    pixels = tokenizer.decode(codes)[0]
    return Image(pixels) if pixels.ndim == 3 else Video(pixels, timestamps)


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
    parts = [read_part(file, fps) for file in files]
    for file, part in zip(files, parts, strict=True):
        if part.modality not in modalities(tokenizer):
            raise UsageError(f"{file} holds {part.modality}; {directory} is a tokenizer of {tokenizer.modality}")
        if part.modality != parts[0].modality:
            raise UsageError(f"{file} holds {part.modality}, {files[0]} {parts[0].modality}; measure them apart")
    if parts[0].modality != "image" and (lpips_weights or inception_weights):
        raise UsageError(f"LPIPS and rFID compare pictures; {files[0]} holds {parts[0].modality}")
    if isinstance(parts[0], Video):
        return _evaluate_videos(tokenizer, prepared(tokenizer, parts), files)
    arrays = prepared(tokenizer, parts, same_size=True)
    return (
        _evaluate_images(tokenizer, np.stack(arrays), lpips_weights, inception_weights)
        if tokenizer.modality == "image"
        else _evaluate_audio(tokenizer, arrays)
    )


def _evaluate_images(
    tokenizer, pixels: UInt8[np.ndarray, "n height width 3"], lpips_weights: str | None, inception_weights: str | None
) -> dict:
    from omni_tokenizers import image_metrics

    codes = tokenizer.encode(pixels)
    decoded = tokenizer.decode(codes)
    use = codebook_use(np.asarray(codes), tokenizer.codebook_sizes[0])
    names = ("psnr", "ssim", "ms_ssim")
    quality = {name: _measured(getattr(image_metrics, name), pixels, decoded) for name in names}
    if lpips_weights:
        quality |= _lpips(lpips_weights, pixels, decoded)
    if inception_weights:
        quality |= _rfid(inception_weights, pixels, decoded)
    return {"pictures": len(pixels), **quality, **use}


def _evaluate_videos(tokenizer, videos: list[UInt8[np.ndarray, "time height width 3"]], files: Sequence[str]) -> dict:
    """Means over all frames of all videos, and the measures of each frame by file."""
    from omni_tokenizers import image_metrics

    codes = [tokenizer.encode(frames[None]) for frames in videos]
    pairs = [(frames, tokenizer.decode(each)[0]) for frames, each in zip(videos, codes, strict=True)]
    every = np.concatenate([np.asarray(each).ravel() for each in codes])
    by_frame = {
        name: {
            file: _measured_frames(getattr(image_metrics, name), *pair) for file, pair in zip(files, pairs, strict=True)
        }
        for name in ("psnr", "ssim", "ms_ssim")
    }
    quality = {name: _mean([x for values in found.values() for x in values]) for name, found in by_frame.items()}
    use = codebook_use(every, tokenizer.codebook_sizes[0])
    return {"videos": len(videos), "frames": sum(map(len, videos)), **quality, **use, "by_frame": by_frame}


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


def _lpips(path: str, pixels: UInt8[np.ndarray, "n height width 3"], decoded: np.ndarray) -> dict:
    """The mean over pictures, signed with the weights' hash."""
    import jax

    from omni_tokenizers.image import normalized
    from omni_tokenizers.losses.perceptual import PREPROCESSING, PerceptualDistance

    distance = PerceptualDistance.read(path)
    if not distance.is_lpips:
        raise OmniError(f"{path}: holds no linI.model.1.weight, without which the distance is no LPIPS")
    apart = jax.jit(lambda *pair: distance(*map(normalized, pair)))
    scores = [float(apart(a[None], b[None])[0]) for a, b in zip(decoded, pixels, strict=True)]
    signature = {"sha256": distance.sha256, "preprocessing": PREPROCESSING}
    return {"lpips": float(np.mean(scores)), "lpips_weights": signature}


def _rfid(path: str, pixels: UInt8[np.ndarray, "n height width 3"], decoded: np.ndarray) -> dict:
    """The Fréchet distance, signed with the weights' hash; it falls with the number of pictures, so that is said."""
    from omni_tokenizers.inception import PREPROCESSING, InceptionFeatures, frechet_distance

    if len(pixels) < _FEW_PICTURES:
        logger.warning("rFID of %d pictures is far above that of many; published ones are of 50,000", len(pixels))
    features = InceptionFeatures.read(path)
    signature = {"sha256": features.sha256, "preprocessing": PREPROCESSING}
    return {"rfid": frechet_distance(features(pixels), features(decoded)), "rfid_weights": signature}


def _evaluate_audio(tokenizer, clips: list[Float[np.ndarray, "channels samples"]]) -> dict:
    from omni_tokenizers import audio_metrics

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
    if not math.isfinite(value):  # which JSON has no number for
        why = "too short or silent" if math.isnan(value) else "nothing was lost"
        logger.warning("not measured: %s, %s", measure.__name__, why)
        return None
    return value
