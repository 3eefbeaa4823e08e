"""Measures of pictures that need no network: PSNR, SSIM, MS-SSIM and the use of the codebook."""

from __future__ import annotations

import numpy as np
import scipy.ndimage
from jaxtyping import Float, UInt8

from omni_tokenizers.errors import OmniError

_WINDOW, _SIGMA = 11, 1.5  # of SSIM, in pixels
_LUMINANCE, _CONTRAST = (0.01 * 255) ** 2, (0.03 * 255) ** 2  # what keeps SSIM's quotients finite
_SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of MS-SSIM, the finest scale first
SMALLEST_FOR_MS_SSIM = _WINDOW * 2 ** (len(_SCALE_WEIGHTS) - 1)
"""Pixels along each side, so that the coarsest scale still holds a window."""


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
    _check_sides(reference, _WINDOW, "SSIM")
    settings = {"gaussian_weights": True, "sigma": _SIGMA, "use_sample_covariance": False}
    scores = [
        structural_similarity(a, b, channel_axis=-1, data_range=255, **settings)
        for a, b in zip(reference, estimate, strict=True)
    ]
    return float(np.mean(scores))


def ms_ssim(
    reference: UInt8[np.ndarray, "batch height width channels"],
    estimate: UInt8[np.ndarray, "batch height width channels"],
) -> float:
    """Structural similarity at five scales (Wang, Simoncelli and Bovik 2003, equation 7): 1 where equal.

    At each scale the means of contrast times structure, and at the coarsest those of SSIM, raised to the paper's
    weights and multiplied; the next scale is the mean of squares of 2 x 2 pixels. The window is that of `ssim`, within
    the picture alone. A mean below 0 counts as 0, where the power would be no number. Mean over channels and pictures.

    Raises:
        OmniError: pictures are smaller than 176 x 176 pixels, at which the coarsest scale holds one window.
    """
    reference, estimate = _checked(reference, estimate)
    _check_sides(reference, SMALLEST_FOR_MS_SSIM, "MS-SSIM")
    return float(np.mean([_ms_ssim(*pair) for pair in zip(reference, estimate, strict=True)]))


def _checked(reference, estimate) -> tuple[np.ndarray, np.ndarray]:
    reference, estimate = np.asarray(reference), np.asarray(estimate)
    if reference.dtype != np.uint8 or estimate.dtype != np.uint8:
        raise OmniError(f"pictures must be uint8, got {reference.dtype} and {estimate.dtype}")
    if reference.ndim != 4 or reference.shape != estimate.shape or not reference.size:
        raise OmniError(
            f"expected two arrays [batch, H, W, 3] of one shape, got {list(reference.shape)} and {list(estimate.shape)}"
        )
    return reference, estimate


def _check_sides(images: np.ndarray, least: int, measure: str) -> None:
    if min(images.shape[1:3]) < least:
        raise OmniError(f"{measure} needs pictures of at least {least} x {least} pixels, got {list(images.shape[1:3])}")


def _ms_ssim(
    a: UInt8[np.ndarray, "height width channels"], b: UInt8[np.ndarray, "height width channels"]
) -> Float[np.ndarray, " channels"]:
    a, b = a.astype(np.float64), b.astype(np.float64)
    score = np.ones(a.shape[2])
    for weight in _SCALE_WEIGHTS[:-1]:
        _, contrast = _similarity(a, b)
        score *= np.maximum(contrast, 0) ** weight
        a, b = _halved(a), _halved(b)
    whole, _ = _similarity(a, b)
    return score * np.maximum(whole, 0) ** _SCALE_WEIGHTS[-1]


def _similarity(
    a: Float[np.ndarray, "height width channels"], b: Float[np.ndarray, "height width channels"]
) -> tuple[Float[np.ndarray, " channels"], Float[np.ndarray, " channels"]]:
    """Means over all windows of SSIM, and of its part without luminance."""
    mean_a, mean_b = _local_mean(a), _local_mean(b)
    variances = _local_mean(a * a) - mean_a**2 + _local_mean(b * b) - mean_b**2
    contrast = (2 * (_local_mean(a * b) - mean_a * mean_b) + _CONTRAST) / (variances + _CONTRAST)
    luminance = (2 * mean_a * mean_b + _LUMINANCE) / (mean_a**2 + mean_b**2 + _LUMINANCE)
    return (luminance * contrast).mean((0, 1)), contrast.mean((0, 1))


def _local_mean(x: Float[np.ndarray, "height width channels"]) -> Float[np.ndarray, "rows columns channels"]:
    """Gaussian mean of each window that lies within the picture."""
    edge = _WINDOW // 2
    blurred = scipy.ndimage.gaussian_filter(x, _SIGMA, axes=(0, 1), radius=edge)
    return blurred[edge:-edge, edge:-edge]


def _halved(x: Float[np.ndarray, "height width channels"]) -> Float[np.ndarray, "rows columns channels"]:
    """Means of 2 x 2 pixels; an odd last row or column is its own neighbour."""
    height, width = x.shape[:2]
    x = np.pad(x, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    return (x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 4
