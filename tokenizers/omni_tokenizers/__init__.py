"""Tokenizers for images, sound, video and text: continuous or written data to integer codes and back.

``omni_tokenizers.load(directory)`` opens any saved tokenizer. Names are imported when first used, so that importing
the package costs nothing.
"""

import importlib

_HOMES = {
    "load": "base",
    "Tokenizer": "base",
    "Codes": "codes",
    "OmniError": "errors",
    "UsageError": "errors",
    "ImageTokenizer": "image",
    "AudioTokenizer": "audio",
    "TextTokenizer": "text",
    "VideoTokenizer": "video",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
