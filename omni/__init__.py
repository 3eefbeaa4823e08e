"""Omni: one transformer that reads and writes text, pictures and sound.

import omni
model = omni.load("runs/quickstart")
reply = model.generate(["seven"], want=["image", "audio"], seed=0)
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_HOMES = {
    "Text": "omni.parts",
    "Image": "omni.parts",
    "Audio": "omni.parts",
    "Video": "omni.parts",
    "Model": "omni.bundle",
    "Request": "omni.prompts",
    "Message": "omni.messages",
    "load": "omni.bundle",
    "MusicGen": "omni.music",
    "Reply": "omni.reply",
    "Event": "omni.streaming",
    "OmniError": "omni_tokenizers.errors",
    "UsageError": "omni_tokenizers.errors",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str):
    """Names of the public face, imported when first used, so that `omni --help` does not wait for jax."""
    if name not in _HOMES:
        raise AttributeError(f"module 'omni' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
