"""What an image tokenizer has to beat on the photos: k-means over raw patches at the same bits, and WebP."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
import PIL.Image
from jaxtyping import Float, UInt8

from omni.recipes import photos
from omni_tokenizers.errors import OmniError
from omni_tokenizers.image_metrics import psnr

WEBP_CONTAINER = 20  # bytes of RIFF and chunk headers: what says that a file is a WebP, not what the picture is


@dataclass(frozen=True)
class KMeansConfig:
    """Vector quantisation of raw patches (Gersho and Gray 1992), fitted as well as the photos allow."""

    patches: int = 200_000
    """Training patches."""
    starts: int = 4
    """Fits from different k-means++ starts, of which that with the least error on its patches counts."""
    iterations: int = 100
    """Most iterations of Lloyd's algorithm of each fit."""


def fit_k_means(
    config: KMeansConfig, codes: int, patch: int, size: int, seed: int, *, augmented: bool
) -> Float[np.ndarray, "codes values"]:
    """The best of several codebooks of patch x patch x 3 values, 0 to 255.

    Args:
      augmented: patches of the crops that a tokenizer is trained on, of `size` pixels; else of the photos as they are.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        raise OmniError("k-means needs scikit-learn: pip install 'omni-any-to-any[quickstart]'") from None
    rng = np.random.default_rng(seed)
    source = _augmented_crops(config.patches, patch, size, seed) if augmented else photos.fixed_crops("train", size)
    patches = to_patches(source, patch).astype(np.float32)
    patches = patches[rng.permutation(len(patches))[: config.patches]]
    return (
        KMeans(codes, n_init=config.starts, max_iter=config.iterations, random_state=seed).fit(patches).cluster_centers_
    )


def _augmented_crops(patches: int, patch: int, size: int, seed: int) -> UInt8[np.ndarray, "n size size 3"]:
    """Four times as many patches as are asked for, so that they come from many crops."""
    crops = photos.PhotoCrops(size).dataset(seed)
    return np.stack([crops[i]["image"] for i in range(4 * patches // (size // patch) ** 2)])


def quantized(
    pictures: UInt8[np.ndarray, "n height width 3"], codebook: Float[np.ndarray, "codes values"], patch: int
) -> UInt8[np.ndarray, "n height width 3"]:
    """Pictures with each patch replaced by the nearest in the codebook."""
    from sklearn.metrics import pairwise_distances_argmin

    nearest = pairwise_distances_argmin(to_patches(pictures, patch).astype(np.float32), codebook)
    return from_patches(np.rint(codebook).clip(0, 255).astype(np.uint8)[nearest], pictures.shape, patch)


def to_patches(pictures: np.ndarray, patch: int) -> np.ndarray:
    """[n, height, width, 3] as [patches, patch * patch * 3]."""
    n, height, width, channels = pictures.shape
    grid = pictures.reshape(n, height // patch, patch, width // patch, patch, channels)
    return grid.swapaxes(2, 3).reshape(-1, patch * patch * channels)


def from_patches(patches: np.ndarray, shape: tuple[int, ...], patch: int) -> np.ndarray:
    """Inverse of `to_patches` for pictures of a shape."""
    n, height, width, channels = shape
    grid = patches.reshape(n, height // patch, width // patch, patch, patch, channels)
    return grid.swapaxes(2, 3).reshape(shape)


def webp_nearest(pictures: UInt8[np.ndarray, "n height width 3"], bits_per_pixel: float) -> dict[str, float]:
    """WebP (lossy, its slowest method) at the one quality whose mean rate is nearest to a rate.

    The rate leaves out the 20 bytes of each file's container; `bits_per_pixel_of_files` has them in.
    """
    pixels = math.prod(pictures.shape[1:3])
    found = []
    for quality in range(0, 101, 2):
        files = [_webp(picture, quality) for picture in pictures]
        whole = 8 * np.mean([len(file) for file in files]) / pixels
        rate = whole - 8 * WEBP_CONTAINER / pixels
        found.append((abs(rate - bits_per_pixel), quality, rate, whole, files))
        if rate > bits_per_pixel:  # the rate rises with the quality
            break
    _, quality, rate, whole, files = min(found, key=lambda each: each[0])
    decoded = np.stack([np.asarray(PIL.Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
    return {
        "quality": quality,
        "psnr": psnr(pictures, decoded),
        "bits_per_pixel": float(rate),
        "bits_per_pixel_of_files": float(whole),
    }


def _webp(picture: UInt8[np.ndarray, "height width 3"], quality: int) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(picture).save(file, "WEBP", quality=quality, method=6)
    return file.getvalue()
