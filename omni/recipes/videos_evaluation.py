"""Measures video tokenizers on camera moves over the held-out photos, beside k-means over raw boxes at the same bits.

    python -m omni.recipes.videos_evaluation runs/videos docs/results/tokenizers/videos.json

k-means sees the moves that the tokenizer is trained on, cut into the boxes that a code stands for. Both are measured on
longer ones, which are slower.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from omni.recipes import videos
from omni.recipes.measuring import measuring_command
from omni.recipes.videos_recipe import FRAMES
from omni_tokenizers.codes import codebook_use
from omni_tokenizers.errors import OmniError
from omni_tokenizers.image_metrics import psnr
from omni_tokenizers.video import VideoTokenizer, from_patches, patches


@dataclass(frozen=True)
class KMeansConfig:
    """Vector quantisation of raw boxes (Gersho and Gray 1992)."""

    boxes: int = 30_000
    """Training boxes."""
    starts: int = 1
    """Fits from different k-means++ starts, of which that with the least error counts."""
    iterations: int = 50
    """Most iterations of Lloyd's algorithm of each fit."""


def measure(tokenizer: VideoTokenizer, moves: UInt8[np.ndarray, "n frames size size 3"]) -> dict[str, float]:
    """PSNR in dB, the mean over all frames and over first frames, and use of the codebook."""
    codes = tokenizer.encode(moves)
    return compare(moves, tokenizer.decode(codes)) | codebook_use(np.asarray(codes), tokenizer.codebook_sizes[0])


def measure_k_means(
    config: KMeansConfig, tokenizer: VideoTokenizer, moves: UInt8[np.ndarray, "n frames size size 3"]
) -> dict:
    """As `measure`, with raw boxes in place of latents."""
    try:
        from sklearn.cluster import KMeans
        from sklearn.metrics import pairwise_distances_argmin
    except ImportError:
        raise OmniError("k-means needs scikit-learn: pip install 'omni-any-to-any[quickstart]'") from None
    codes = tokenizer.codebook_sizes[0]
    training = _training_boxes(config.boxes, tokenizer, FRAMES)
    fit = KMeans(codes, n_init=config.starts, max_iter=config.iterations, random_state=0).fit(training)
    cut = boxes(moves, tokenizer)
    nearest = pairwise_distances_argmin(cut.reshape(-1, cut.shape[-1]), fit.cluster_centers_)
    quantized = fit.cluster_centers_[nearest].reshape(cut.shape)
    lead = tokenizer.lead
    decoded = np.asarray(from_patches(quantized, tokenizer.config.strides[0], tokenizer.config.downsampling))[:, lead:]
    return compare(moves, decoded.round().clip(0, 255).astype(np.uint8)) | {"settings": dataclasses.asdict(config)}


def compare(moves: UInt8[np.ndarray, "n frames size size 3"], decoded: np.ndarray) -> dict[str, float]:
    """PSNR of all frames and of first frames."""
    pictures = (each.reshape(-1, *each.shape[2:]) for each in (moves, decoded))
    return {"psnr": psnr(*pictures), "psnr_of_first_frames": psnr(moves[:, 0], decoded[:, 0])}


def boxes(
    moves: UInt8[np.ndarray, "n frames size size 3"], tokenizer: VideoTokenizer
) -> Float[np.ndarray, "n code_frames rows columns values"]:
    """What each code stands for, as the tokenizer cuts it: the first frame counts as many."""
    led = np.concatenate([moves[:, :1].repeat(tokenizer.lead, 1), moves], 1)
    return np.asarray(patches(led.astype(np.float32), tokenizer.config.strides[0], tokenizer.config.downsampling))


def evaluate(tokenizer: VideoTokenizer, config: KMeansConfig, frames: int = 17, each: int = 8) -> dict:
    """The tokenizer and k-means on the same held-out moves, as JSON."""
    held_out = videos.fixed_moves("held_out", tokenizer.image_size, frames, each)
    codes = tokenizer.frames(frames) * math.prod(tokenizer.grid)
    return {
        "videos": len(held_out),
        "frames": frames,
        "size": tokenizer.image_size,
        "bits_per_pixel": codes * math.log2(tokenizer.codebook_sizes[0]) / (frames * tokenizer.image_size**2),
        "tokenizer": measure(tokenizer, held_out),
        "k_means": measure_k_means(config, tokenizer, held_out),
    }


def _training_boxes(number: int, tokenizer: VideoTokenizer, frames: int) -> Float[np.ndarray, "number values"]:
    """A quarter of the boxes of each move, drawn at random, so that they come from many moves."""
    moves, rng = videos.CameraMoves(tokenizer.image_size, frames).dataset(0), np.random.default_rng(0)
    each = max(1, tokenizer.frames(frames) * math.prod(tokenizer.grid) // 4)
    drawn = []
    for index in range(-(-number // each)):
        cut = boxes(moves[index]["video"][None], tokenizer)
        drawn.append(rng.permutation(cut.reshape(-1, cut.shape[-1]))[:each])
    return np.concatenate(drawn)[:number]


def main() -> None:
    """Writes the results of a trained tokenizer."""
    measuring_command(__doc__.splitlines()[0], lambda tokenizer: evaluate(tokenizer, KMeansConfig()))


if __name__ == "__main__":
    main()
