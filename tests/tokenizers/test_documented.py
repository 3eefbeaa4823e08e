"""Figures of docs/tokenizers.md are those of the results that it points to."""

import json
from pathlib import Path

from omni.recipes.photos_recipe import QUANTIZERS

DOCS = Path(__file__).parents[2] / "docs"


def test_half_of_each_codebook():
    """Every family that was measured has its row, and the table has no others."""
    families = json.loads((DOCS / "results" / "tokenizers" / "half_of_each_codebook.json").read_text())["families"]
    expected = []
    for name, found in families.items():
        of = f"{found['seconds']} s" if "seconds" in found else f"{found['pictures']}"
        plain = f"{found['differ']} of {found['codes']:,}"
        scaled = f"{found['scaled_differ']} of {found['scaled_codes']:,}" if "scaled_codes" in found else "not scaled"
        expected.append(f"| {name} | {of} | {plain} | {scaled} | {found['least_used']:.0%} |")
        assert found["least_used"] >= 0.5
    _, _, table = (DOCS / "tokenizers.md").read_text().partition("| family | sound or pictures | codes that differ |")
    assert table.split("\n\n")[0].splitlines()[2:] == expected


def test_quantizers():
    """Each quantiser of the comparison has its row."""
    results = json.loads((DOCS / "results" / "tokenizers" / "quantizers.json").read_text())
    assert list(results["quantizers"]) == list(QUANTIZERS)
    expected = [
        f"| {name} | {found['psnr']:.2f} | {found['ssim']:.3f} | {found['usage']:.1%} | {found['perplexity']:.0f} |"
        for name, found in results["quantizers"].items()
    ]
    _, _, table = (DOCS / "tokenizers.md").read_text().partition("| quantiser | PSNR, dB |")
    assert table.split("\n\n")[0].splitlines()[2:] == expected


def test_videos():
    """The recipe's row and that of k-means."""
    results = json.loads((DOCS / "results" / "tokenizers" / "videos.json").read_text())
    _, _, table = (DOCS / "tokenizers.md").read_text().partition("| 24 moves of 17 frames over held-out photos")
    rows = table.split("\n\n")[0].splitlines()[2:]
    for row, found in zip(rows, (results["tokenizer"], results["k_means"]), strict=True):
        figures = f"{results['bits_per_pixel']:.3f} | {found['psnr']:.2f} | {found['psnr_of_first_frames']:.2f} |"
        assert row.endswith(figures)
