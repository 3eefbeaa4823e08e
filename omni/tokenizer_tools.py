"""What `omni import`, `omni export` and `omni tokenizer encode` and `decode` do with one tokenizer."""

from __future__ import annotations

import collections
import json
import logging
import sys
from pathlib import Path

import numpy as np
from etils import epath
from jaxtyping import Float, UInt8

import omni_tokenizers
from omni.parts import Audio, Image, Part, Text, Video
from omni_tokenizers.base import DESCRIPTION, is_checkpoint
from omni_tokenizers.codes import as_codes
from omni_tokenizers.errors import OmniError, UsageError

_BESIDES = ("lengths", "scales", "sizes")
"""What `Codes` may hold besides ids."""
_MOST_PIXELS = 2048 * 2048
"""Of a picture that goes through a net as it is: some 2 GB in a layer of 128 channels."""
_MOST_VIDEO_PIXELS = 16 * _MOST_PIXELS
"""Of all frames of a video, which is encoded as a whole: 200 MB; nets see a few frames at a time."""

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
    """Whether a directory holds a tokenizer of this package, rather than a model or what another package wrote."""
    directory = epath.Path(directory)
    return (directory / DESCRIPTION).exists() and not is_checkpoint(directory)


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


def encode_part(directory: str, part: Part) -> dict:
    """Codes of one part as JSON: "modality", "codes", and what `Codes` holds besides for their exact decoding.

    That is `lengths` in samples, `scales`, and `sizes`: (height, width), of a video (time, height, width). A video has
    its "timestamps" in seconds, too, which no tokenizer knows of.
    """
    tokenizer = omni_tokenizers.load(directory)
    if part.modality not in tokenizer.modalities:
        raise UsageError(f"{directory} is a tokenizer of {tokenizer.modality}; it was given {part.modality}")
    if isinstance(part, Text):
        return {"modality": "text", "codes": np.asarray(tokenizer.encode(part.text)).tolist()}
    changes: collections.Counter[str] = collections.Counter()
    codes = tokenizer.encode(prepared(tokenizer, part, changes)[None])
    say(changes, 1)
    besides = {name: getattr(codes, name) for name in _BESIDES}
    besides["timestamps"] = part.timestamps if isinstance(part, Video) else None
    return {"modality": part.modality, "codes": np.asarray(codes).tolist()} | {
        name: np.asarray(value).tolist() for name, value in besides.items() if value is not None
    }


def prepared(
    tokenizer, part: Image | Audio | Video, changes: collections.Counter[str], *, same_size: bool = False
) -> np.ndarray:
    """A part's array as the tokenizer takes it: pixels, or samples at its rate; `changes` counts what that changes.

    Args:
        same_size: scale and crop a picture to the tokenizer's own size even where it takes any.
    Raises:
        OmniError: a picture or a video that is too large to go through a net as it is.
    """
    if isinstance(part, Audio):
        return _samples(tokenizer, part, changes)
    if isinstance(part, Video):
        return _frames(part, None if tokenizer.takes_any_size else tokenizer.image_size, changes)
    return _pixels(part, None if tokenizer.takes_any_size and not same_size else tokenizer.image_size, changes)


def say(changes: collections.Counter[str], parts: int) -> None:
    """Logs each change once, and of how many parts."""
    for change, count in changes.items():
        logger.warning("%s%s", change, f" ({count} of {parts})" if parts > 1 else "")


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
    if modality not in (None, *tokenizer.modalities):
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
    if codes.ids.ndim > 3 and "video" not in tokenizer.modalities:
        raise OmniError("codes of a video, of a tokenizer of pictures alone")
    if tokenizer.takes_any_size and codes.ids.ndim in (3, 4):
        frames, height, width = np.multiply((1, *codes.shape[1:])[-3:], (1, *tokenizer.config.strides)[-3:])
        _check_size(height, width, frames)
    pixels = tokenizer.decode(codes)[0]
    return Image(pixels) if pixels.ndim == 3 else Video(pixels, timestamps)
