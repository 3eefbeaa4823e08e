"""Measures of pictures that need no network: PSNR, SSIM and the use of the codebook."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int, UInt8

from omni_tokenizers.errors import OmniError


def psnr(
    reference: UInt8[np.ndarray, "batch height width channels"],
    estimate: UInt8[np.ndarray, "batch height width channels"],
) -> float:
    """Peak signal-to-noise ratio in dB, data range 255: mean over pictures; infinite where two are equal."""
    reference, estimate = _checked(reference, estimate)
    squared = np.square(reference.astype(np.float64) - estimate).mean((1, 2, 3))
    with np.errstate(divide="ignore"):
        return float((10 * np.log10(255.0**2 / squared)).mean())


def ssim(
    reference: UInt8[np.ndarray, "batch height width channels"],
    estimate: UInt8[np.ndarray, "batch height width channels"],
) -> float:
    """Structural similarity (Wang et al. 2004) by scikit-image: mean over channels and pictures, 1 where equal.

    Gaussian window of 11 pixels (sigma 1.5, population covariance, as the paper has it), data range 255.

    Raises:
        OmniError: scikit-image is missing, or pictures are smaller than the window.
    """
    try:
        from skimage.metrics import structural_similarity
    except ImportError:
        raise OmniError('SSIM needs scikit-image: pip install "omni-any-to-any[quickstart]"') from None
    reference, estimate = _checked(reference, estimate)
    if min(reference.shape[1:3]) < 11:
        raise OmniError(f"SSIM needs pictures of at least 11 x 11 pixels, got {list(reference.shape[1:3])}")
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    scores = [
        structural_similarity(a, b, channel_axis=-1, data_range=255, **settings)
        for a, b in zip(reference, estimate, strict=True)
    ]
    return float(np.mean(scores))


def codebook_use(codes: Int[np.ndarray, " ..."], size: int) -> dict[str, float]:
    """Over a whole set of codes: "usage", the share of `size` codes that occur, "perplexity", exp of their entropy."""
    counts = np.bincount(np.asarray(codes).ravel(), minlength=size)
    share = counts[counts > 0] / max(counts.sum(), 1)
    return {"usage": float((counts > 0).mean()), "perplexity": float(np.exp(-(share * np.log(share)).sum()))}


def _checked(reference, estimate) -> tuple[np.ndarray, np.ndarray]:
    reference, estimate = np.asarray(reference), np.asarray(estimate)
    if reference.dtype != np.uint8 or estimate.dtype != np.uint8:
        raise OmniError(f"pictures must be uint8, got {reference.dtype} and {estimate.dtype}")
    if reference.ndim != 4 or reference.shape != estimate.shape or not reference.size:
        raise OmniError(
            f"expected two arrays [batch, H, W, 3] of one shape, got {list(reference.shape)} and {list(estimate.shape)}"
        )
    return reference, estimate
