"""Measures image tokenizers on held-out crops of the photos, beside k-means over raw patches and WebP.

    python -m omni.recipes.photos_evaluation runs/photos docs/results/tokenizers/photos.json

The baselines know as much as the tokenizer does: they see the same training photos, and what is left open (patches of
augmented crops or of the photos as they are) is chosen on the validation photo.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import UInt8

from omni.recipes import photos
from omni.recipes.measuring import measuring_command
from omni.recipes.photos_baselines import KMeansConfig, fit_k_means, quantized, webp_nearest
from omni_tokenizers.codes import codebook_use
from omni_tokenizers.image import ImageTokenizer
from omni_tokenizers.image_metrics import psnr, ssim

QUALITY = {"psnr": psnr, "ssim": ssim}


def measure(tokenizer: ImageTokenizer, pictures: UInt8[np.ndarray, "n height width 3"]) -> dict[str, float]:
    """PSNR in dB, SSIM, and use of the codebook over all pictures."""
    codes = tokenizer.encode(pictures)
    decoded = tokenizer.decode(codes)
    quality = {name: measured(pictures, decoded) for name, measured in QUALITY.items()}
    return quality | codebook_use(np.asarray(codes), tokenizer.codebook_sizes[0])


def measure_k_means(config: KMeansConfig, codes: int, patch: int, size: int, seed: int = 0) -> dict:
    """The better of both choices of patches on the validation photo, measured on the held-out photos."""
    validation, held_out = photos.fixed_crops("validation", size), photos.fixed_crops("held_out", size)
    choices = {}
    for name, augmented in {"augmented crops": True, "photos as they are": False}.items():
        codebook = fit_k_means(config, codes, patch, size, seed, augmented=augmented)
        choices[name] = (psnr(validation, quantized(validation, codebook, patch)), codebook)
    best = max(choices, key=lambda name: choices[name][0])
    decoded = quantized(held_out, choices[best][1], patch)
    return {
        **{name: measured(held_out, decoded) for name, measured in QUALITY.items()},
        "patches_of": best,
        "validation_psnr": {name: score for name, (score, _) in choices.items()},
        "settings": dataclasses.asdict(config),
    }


def bits_per_pixel(tokenizer: ImageTokenizer) -> float:
    """What codes of equal length take."""
    return math.log2(tokenizer.codebook_sizes[0]) / tokenizer.config.downsampling**2


def evaluate(tokenizer: ImageTokenizer, k_means: KMeansConfig) -> dict:
    """The tokenizer, k-means and WebP on the held-out photos, as JSON."""
    size, rate = tokenizer.image_size, bits_per_pixel(tokenizer)
    held_out = photos.fixed_crops("held_out", size)
    return {
        "crops": len(held_out),
        "size": size,
        "bits_per_pixel": rate,
        "tokenizer": measure(tokenizer, held_out),
        "validation_psnr": measure(tokenizer, photos.fixed_crops("validation", size))["psnr"],
        "k_means": measure_k_means(k_means, tokenizer.codebook_sizes[0], tokenizer.config.downsampling, size),
        "webp": webp_nearest(held_out, rate),
    }


def main() -> None:
    """Writes the results of a trained tokenizer."""
    measuring_command(__doc__.splitlines()[0], lambda tokenizer: evaluate(tokenizer, KMeansConfig()))


if __name__ == "__main__":
    main()
