"""What all parts share: names of files in messages, extensions, arrays of whatever stands for one."""

import base64
import os

import numpy as np

from omni_tokenizers.errors import OmniError, UsageError

SHOWN_PIXELS = 192
"""Notebooks enlarge pictures whose longer side is smaller, by a whole factor."""


def from_file(path, make, *values):
    """A part from a file's values; what its constructor refuses is told with the file's name."""
    try:
        return make(*values)
    except UsageError as error:
        raise OmniError(f"{path}: {error}") from error


def as_array(value, name: str) -> np.ndarray:
    """What numpy makes of it, floats of JAX's types as float32; UsageError, which begins with `name`, if nothing."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name}: {type(value).__name__} is not an array ({error})") from error
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array  # numpy does not count it as a float


def extension_of(path: str | os.PathLike, known, what: str) -> str:
    """The extension in small letters; UsageError if it is none of those that name `what`."""
    extension = os.path.splitext(os.fspath(path))[1].lower()
    if extension not in known:
        found = f"extension {extension!r}" if extension else "no extension"
        raise UsageError(f"{path}: {found} does not name {what}; known: {', '.join(known)}")
    return extension


def context_note(part) -> str:
    """What a repr says of a part that is context."""
    return ", context" if part.context else ""


def enlargement(height: int, width: int) -> int:
    """How many times notebooks enlarge a picture of so many pixels."""
    return max(1, SHOWN_PIXELS // max(height, width))


def data_url(mime_type: str, data: bytes) -> str:
    """A file as the address of itself."""
    return f"data:{mime_type};base64,{base64.b64encode(data).decode('ascii')}"
