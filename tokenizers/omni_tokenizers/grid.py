"""Tokenizers of pictures whose nets are convolutions, so that a picture of any size becomes a grid of codes."""

from __future__ import annotations

from typing import ClassVar

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int, UInt8

from omni_tokenizers.base import NetTokenizer
from omni_tokenizers.codes import Codes, as_codes
from omni_tokenizers.errors import OmniError

PIXELS = 1 << 19
"""How many go through a net together: two pictures of 512 x 512."""


class GridTokenizer(NetTokenizer):
    """Pictures of any size, uint8 [batch, height, width, 3], to codes int32 [batch, rows, columns] and back.

    Subclasses' nets have `encode`, `decode` and `code_vectors`, their configurations `strides`, `image_size` and
    `codebook_size`.
    """

    modality = "image"
    takes_any_size = True
    """Whether pictures may have another size than `image_size`, for which the net was trained."""
    axes: ClassVar[tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]] = ((("height", "width"), ("rows", "columns")),)
    """Names of the axes of what it takes, and of their codes."""

    def __init__(self, config, net: nnx.Module):
        super().__init__(config, net)
        self.image_size = config.image_size
        self.grid = tuple(-(-config.image_size // stride) for stride in config.strides[-2:])
        self.codebook_sizes = (config.codebook_size,)
        self._encode = jax.jit(lambda state, pixels: nnx.merge(self.graphdef, state).encode(pixels))
        self._decode = jax.jit(lambda state, codes: nnx.merge(self.graphdef, state).decode(codes))

    @property
    def code_vectors(self) -> tuple[Float[np.ndarray, "codes code_dim"]]:
        """The vectors of the codes, float32."""
        return (np.asarray(self.net.code_vectors()),)

    def encode(self, x: UInt8[np.ndarray, "batch ... 3"]) -> Codes:
        """Codes; a size that is no multiple of the stride is padded by repeating the edge, and kept in `sizes`.

        Raises:
            OmniError: not uint8, of another shape, or empty pictures.
        """
        x = np.asarray(x)
        if x.dtype != np.uint8:
            raise OmniError(f"images must be uint8 (0 to 255), got {x.dtype}; convert them first")
        return self._codes(x)

    def encode_values(self, x: Float[np.ndarray, "batch ... 3"]) -> Codes:
        """As `encode`, of what the net sees of pixels: floating point, about within [-1, 1]."""
        return self._codes(np.asarray(x, np.float32))

    def _codes(self, x: np.ndarray) -> Codes:
        sizes = np.array(x.shape[1:-1], np.int32)
        if x.ndim - 2 not in [len(names) for names, _ in self.axes] or x.shape[-1] != 3 or not sizes.all():
            wanted = " or ".join(f"[batch, {', '.join(names)}, 3]" for names, _ in self.axes)
            raise OmniError(f"images must be {wanted} and not empty, got {list(x.shape)}")
        missing = -sizes % self.config.strides[-len(sizes) :]
        padded_sizes = sizes + missing
        x = np.pad(x, [(0, 0), *((0, more) for more in missing), (0, 0)], mode="edge")
        ids = self._in_chunks(self._encode, x, rows=_rows(padded_sizes))
        return Codes(ids, sizes=np.tile(sizes, (len(x), 1)) if missing.any() else None)

    def decode(self, codes: Codes | Int[np.ndarray, "batch ..."]) -> UInt8[np.ndarray, "batch ... 3"]:
        """Pictures of codes, each of its own size where the codes know it (then black), else of whole rows and columns.

        Raises:
            OmniError: not codes of this tokenizer.
        """
        dimensions = np.ndim(codes) - 1
        grids = [names for _, names in self.axes]
        names = next((names for names in grids if len(names) == dimensions), grids[0])
        codes = as_codes(codes, axes=("batch", *names), size=self.codebook_sizes[0])
        whole = np.array(codes.ids.shape[1:]) * self.config.strides[-dimensions:]
        if not whole.all():
            raise OmniError(f"codes must not be empty, got the shape {list(codes.ids.shape)}")
        pixels = self._in_chunks(self._decode, codes.ids, rows=_rows(whole))
        return pixels if codes.sizes is None else cropped(pixels, codes.sizes)


def _rows(sizes: Int[np.ndarray, " axes"]) -> int:
    """How many pictures of this size go through a net together: a power of two."""
    return 1 << max(PIXELS // int(np.prod(sizes, dtype=np.int64)), 1).bit_length() - 1


def cropped(pixels: UInt8[np.ndarray, "batch ... 3"], sizes) -> UInt8[np.ndarray, "batch ... 3"]:
    """Pixels up to the largest of `sizes`, black beyond each picture's own; an OmniError if they are no such sizes."""
    sizes, whole = np.asarray(sizes), np.array(pixels.shape[1:-1])
    if sizes.shape != (len(pixels), len(whole)) or sizes.dtype.kind not in "iu":
        raise OmniError(f"sizes must be {len(pixels)} x {len(whole)} integers, got {sizes.dtype} {list(sizes.shape)}")
    if ((sizes < 1) | (sizes > whole)).any():
        raise OmniError(
            f"sizes must lie in 1 to {whole.tolist()}, got {sizes.min(0).tolist()} to {sizes.max(0).tolist()}"
        )
    for axis, size in enumerate(sizes.max(0, initial=0), 1):
        inside = np.arange(size) < sizes[:, axis - 1, None]
        pixels = pixels[(slice(None),) * axis + (slice(size),)]
        if not inside.all():
            pixels = pixels * np.expand_dims(inside, [other for other in range(1, pixels.ndim) if other != axis])
    return pixels
