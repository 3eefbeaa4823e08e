"""Whether a public checkpoint is here what it is in transformers: both on the user's own files, side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Float, Int, UInt8

from omni.parts import Image
from omni_tokenizers.errors import OmniError, UsageError
from omni_tokenizers.text_public import PublicTextTokenizer

if TYPE_CHECKING:
    from omni.bundle import Model

TOLERANCE = 1e-4
"""Largest difference of a logit, as a share of the largest logit."""
SAME_VALUE = 1e-6
"""Largest difference of a value of a scaled picture."""
SAME_CODES = 0.99
"""Share of a picture's codes that must be the same: where two codes are about equally near, rounding decides."""
SHAPES = ((1, 1), (3, 7), (1, 48))
"""Batches and lengths of ids for which logits are compared."""
_SAFE = {"local_files_only": True, "trust_remote_code": False}
"""Nothing is downloaded, and no code of the directory is run."""
PIXELS = 64
"""Rows and columns of the picture whose codes are compared."""
TEXTS = (
    "One two  three.\tFour\n\n five",
    "Ünïcödé, 中文的句子, русский текст, العربية, हिन्दी, ไทย, 한국어, 日本語の文",
    "def f(x):\n    return {'a': [x ** 2, -1.5e-3]}  # 0x1F",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u00a0 \u2019\u201c\u2014\u201d",
)
"""What is told in ids: spaces, scripts, code, emoji and combining marks."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that was compared.

    Attributes:
      name: what.
      passed: None where it could not be compared.
      found: how far they are apart, or why nothing was compared.
    """

    name: str
    passed: bool | None
    found: str


def verify(model: Model, directory: epath.PathLike) -> Iterator[Check]:
    """Compares a model with what transformers makes of the directory that it was loaded from, piece by piece.

    The weights lie in memory twice, in float32.

    Args:
      model: in float32.

    Raises:
      UsageError: torch or transformers is missing, or transformers has no such model.
    """
    theirs = _theirs(directory)
    yield _logits(model, theirs)
    yield _text(model, directory)
    yield _pixels(model, directory)
    yield _codes(model, theirs)
    if model.config.vision:
        yield _features(model, theirs)


def as_table(checks: list[Check]) -> str:
    """A line for each check."""
    words = {True: "pass", False: "FAIL", None: "none"}
    width = max(len(check.name) for check in checks)
    return "\n".join(f"{words[check.passed]}  {check.name:<{width}}  {check.found}" for check in checks)


def _theirs(directory: epath.PathLike) -> Any:
    """transformers' model of a directory, float32, in evaluation; nothing but safetensors is read."""
    try:
        import torch
        import transformers
    except ImportError as error:
        needed = f"--verify compares with transformers, and {error.name} is missing"
        raise UsageError(f"{needed}: pip install 'omni-any-to-any[parity]'") from None
    try:
        config = transformers.AutoConfig.from_pretrained(str(directory), **_SAFE)
        pictured = type(config) in transformers.AutoModelForImageTextToText._model_mapping
        kind = transformers.AutoModelForImageTextToText if pictured else transformers.AutoModelForCausalLM
        model = kind.from_pretrained(str(directory), use_safetensors=True, dtype=torch.float32, **_SAFE)
    except (ValueError, KeyError, OSError) as error:
        line = str(error).strip().splitlines()[0]
        raise UsageError(
            f"{directory}: transformers does not load it, so there is nothing to compare ({line})"
        ) from None
    return model.eval().requires_grad_(False)


def _logits(model: Model, theirs: Any) -> Check:
    published, errors = theirs.get_input_embeddings().weight.shape[0], []
    for batch, length in SHAPES:
        ids = np.random.default_rng(length).integers(0, published, (batch, length))
        expected = _their_logits(theirs, ids)
        with jax.default_matmul_precision("highest"):
            found = model.logits(ids)[..., :published]
        errors.append(np.abs(found - expected).max() / np.abs(expected).max())
    error = max(errors)
    return Check("logits", bool(error <= TOLERANCE), f"largest difference {error:.1e}, of at most {TOLERANCE:.0e}")


def _their_logits(theirs: Any, ids: Int[np.ndarray, "batch length"]) -> Float[np.ndarray, "batch length vocabulary"]:
    """Before any mask that a family lays over them."""
    import torch

    stream = theirs.base_model(input_ids=torch.tensor(ids)).last_hidden_state
    return theirs.get_output_embeddings()(stream).numpy()


def _text(model: Model, directory: epath.PathLike) -> Check:
    import transformers

    ours = model.tokenizers.get("text")
    if not isinstance(ours, PublicTextTokenizer):
        return Check("text", None, "no tokenizer of text lies there")
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(str(directory), **_SAFE)
    except (ValueError, KeyError, OSError) as error:
        return Check("text", None, f"transformers does not load the tokenizer ({str(error).splitlines()[0]})")
    options = {"add_special_tokens": False, "split_special_tokens": True}

    def same(text: str) -> bool:
        try:
            return ours.ids[ours.encode(text)].tolist() == theirs.encode(text, **options)
        except OmniError:  # a piece that the vocabulary here does not have
            return False

    wrong = [text for text in TEXTS if not same(text)]
    found = f"ids of {len(TEXTS) - len(wrong)} of {len(TEXTS)} texts are the same"
    return Check("text", not wrong, found + (f"; not those of {wrong[0]!r}" if wrong else ""))


def _pixels(model: Model, directory: epath.PathLike) -> Check:
    import transformers

    name, processor = "pixels of a picture", model.processor.image_processor
    if processor is None or "image" not in model.tokenizers:
        return Check(name, None, "this model scales pictures by no family's settings")
    try:
        theirs = transformers.AutoImageProcessor.from_pretrained(str(directory), use_fast=False, **_SAFE)
    except (ValueError, KeyError, OSError, ImportError) as error:
        return Check(name, None, f"transformers does not load the processor ({str(error).splitlines()[0]})")
    picture = Image(np.ascontiguousarray(_picture(3 * PIXELS)[: 2 * PIXELS]))
    ours = processor.values(processor.resized(picture).pixels[None])[0]
    expected = np.asarray(theirs(picture.to_pil(), return_tensors="np")["pixel_values"])[0].transpose(1, 2, 0)
    if ours.shape != expected.shape:
        return Check(name, False, f"they are {ours.shape[:2]}, and {expected.shape[:2]} there")
    error = float(np.abs(ours - expected).max())
    return Check(name, error <= SAME_VALUE, f"largest difference of a value {error:.1e}, of at most {SAME_VALUE:.0e}")


def _codes(model: Model, theirs: Any) -> Check:
    import torch

    tokenizer = model.tokenizers.get("image")
    if tokenizer is None or not hasattr(theirs.base_model, "get_image_tokens"):
        why = "no tokenizer of pictures lies there" if tokenizer is None else "transformers' model makes none"
        return Check("codes of a picture", None, why)
    pixels = _picture(PIXELS)
    ours = model.vocabulary.block("image")[np.asarray(tokenizer.encode(pixels[None]))[0]]
    scaled = torch.tensor(pixels.transpose(2, 0, 1)[None] / 127.5 - 1, dtype=torch.float32)
    sizes = [torch.tensor([[PIXELS, PIXELS]])] if theirs.config.model_type == "emu3" else []
    expected = theirs.base_model.get_image_tokens(scaled, *sizes).numpy().reshape(len(ours), -1)
    same = float((ours == expected[:, : ours.shape[1]]).mean())  # Emu3's rows have an end
    return Check(
        "codes of a picture", same >= SAME_CODES, f"{same:.2%} of {ours.size} are the same, of {SAME_CODES:.0%}"
    )


def _features(model: Model, theirs: Any) -> Check:
    import torch

    picture, processor = Image(_picture(PIXELS)), model.processor.image_processor
    scaled = processor.values(processor.resized(picture).pixels[None])
    expected = theirs.base_model.get_image_features(torch.tensor(scaled.transpose(0, 3, 1, 2))).pooler_output.numpy()
    with jax.default_matmul_precision("highest"):
        found = model.processor.see([picture])
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    words = f"largest difference {error:.1e}, of at most {TOLERANCE:.0e}"
    return Check("features of a picture", error <= TOLERANCE, words)


def _picture(size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Waves of several lengths and directions."""
    y, x = np.mgrid[:size, :size] / size
    waves = sum(np.sin(2 * np.pi * (a * x + b * y)) / (a + abs(b)) for a, b in ((1, 2), (3, -1), (8, 20)))
    return np.stack([np.roll(128 + 96 * waves, channel * size // 3) for channel in range(3)], -1).astype(np.uint8)
