"""Codes: what an encoder returns and a decoder takes."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from omni_tokenizers.errors import OmniError


@dataclasses.dataclass(frozen=True, eq=False)
class Codes:
    """Integer codes with what exact decoding needs besides; ``np.asarray(codes)`` gives the ids."""

    ids: Int[np.ndarray, "batch ..."]
    """int32: images [batch, rows, columns], video [batch, frames, rows, columns], sound [batch, codebooks, frames]"""
    lengths: Int[np.ndarray, " batch"] | None = None
    """Sound: true lengths in samples; None where every item fills its frames."""
    scales: Float[np.ndarray, "batch chunks"] | None = None
    """Sound whose loudness is kept apart from its ids: what each chunk was divided by (0 for chunks past a clip's end).

    Without them a tokenizer that divides (EnCodec at 48 kHz) cannot decode; None for all others."""
    sizes: Int[np.ndarray, "batch axes"] | None = None
    """Images: true (height, width), video (time, height, width); None where every item fills its rows and columns."""

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.array(self.ids, dtype=dtype, copy=True) if copy else np.asarray(self.ids, dtype=dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the ids."""
        return self.ids.shape

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        besides = [name for name in ("lengths", "scales", "sizes") if getattr(self, name) is not None]
        return f"Codes({', '.join([f'ids=int32{list(self.ids.shape)}', *besides])})"


def as_codes(codes, *, axes: tuple[str, ...], size: int) -> Codes:
    """Codes or any integer array as checked `Codes`.

    Args:
        axes: names of the axes, for the error message and the number of dimensions.
        size: codebook size; every id must lie in 0 .. size - 1.
    Raises:
        OmniError: not integers, another number of dimensions, or an id out of range.
    """
    ids = np.asarray(codes)
    if ids.dtype.kind not in "iu":
        raise OmniError(f"codes must be integers, got {ids.dtype}; pass what encode returned")
    if ids.ndim != len(axes):
        raise OmniError(f"codes must have the axes [{', '.join(axes)}], got the shape {list(ids.shape)}")
    outside = (ids < 0) | (ids >= size)
    if outside.any():
        raise OmniError(f"code {ids[outside][0]} is outside the codebook, which holds 0 to {size - 1}")
    ids = ids.astype(np.int32)
    return dataclasses.replace(codes, ids=ids) if isinstance(codes, Codes) else Codes(ids)


def codebook_use(codes: Int[np.ndarray, " ..."], size: int) -> dict[str, float]:
    """Over a whole set of codes: "usage", the share of `size` codes that occur, "perplexity", exp of their entropy."""
    counts = np.bincount(np.asarray(codes).ravel(), minlength=size)
    share = counts[counts > 0] / max(counts.sum(), 1)
    return {"usage": float((counts > 0).mean()), "perplexity": float(np.exp(-(share * np.log(share)).sum()))}
