"""The photos, their crops, and what tokenizers are compared with on them."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import omni_tokenizers
from omni.cli import main
from omni.recipes import photos, photos_baselines, photos_evaluation, photos_recipe
from omni.train.metrics import read_metrics, training_seconds
from omni.train.optimizer import OptimizerConfig
from omni_tokenizers.errors import OmniError, UsageError
from omni_tokenizers.image import ImageTokenizer, ImageTokenizerConfig, ImageVQ
from omni_tokenizers.image_metrics import psnr

pytest.importorskip("skimage")
pytest.importorskip("sklearn")

EXPERIMENTS = Path(__file__).parents[2] / "experiments" / "tokenizers"
TINY = ImageTokenizerConfig(image_size=32, patch_size=8, channels=8, multipliers=(1,), codebook_size=16, code_dim=4)


def test_no_photo_is_on_two_sides():
    """15 photos in colour or grey; the two views of the motorcycle are on one side."""
    splits = {split: photos.load(split) for split in photos.PHOTOS}
    names = [name for split in splits.values() for name in split]
    assert len(names) == len(set(names)) == 15
    assert {"motorcycle_left", "motorcycle_right"} <= set(splits["train"])
    assert set(splits["held_out"]) == {"chelsea", "coffee", "china"}
    for photo in (photo for split in splits.values() for photo in split.values()):
        assert photo.dtype == np.uint8 and photo.shape[2] == 3 and photo.std() > 5
    smallest = min(side for split in splits.values() for photo in split.values() for side in photo.shape[:2])
    assert smallest == photos.SMALLEST_SIDE
    with pytest.raises(UsageError, match="held_out"):
        photos.load("test")


def test_crops_are_reduced_and_lie_in_eight_ways():
    """On a slope of one grey level a pixel, the slope of a crop is its scale, and its direction how it lies."""
    rows, columns = np.mgrid[:200, :240]
    photo = np.stack([rows, columns, 0 * rows], -1).astype(np.uint8)
    rng = np.random.default_rng(0)
    crops = [photos.random_crop(photo, 32, rng).astype(float) for _ in range(400)]
    # [crop, channel, axis]: how much the place in the photo changes from pixel to pixel
    slopes = np.array([[np.diff(crop, axis=axis)[8:-8, 8:-8, :2].mean((0, 1)) for axis in (0, 1)] for crop in crops])
    slopes = slopes.swapaxes(1, 2).reshape(-1, 4)
    scales = np.abs(slopes).max(1)
    assert len({tuple(way) for way in np.rint(slopes / scales[:, None])}) == 8
    assert abs((np.abs(scales - 1) < 1e-9).mean() - 0.5) < 0.1, "half of the crops keep the photo's own pixels"
    assert 2.8 < scales.max() < 3.1 and scales.min() > 0.97


@pytest.mark.parametrize("size", [0, 301])
def test_crops_fit_into_every_photo(size):
    """The smallest photo gives crops of its whole height; larger ones, and none, are refused."""
    assert all(len(photos.fixed_crops(split, 300)) for split in photos.PHOTOS)
    assert photos.PhotoCrops(300).dataset(0)[0]["image"].shape == (300, 300, 3)
    with pytest.raises(UsageError, match=f"size is {size}; .* 1 to 300"):
        photos.PhotoCrops(size)


def test_examples_depend_on_seed_and_index_alone():
    """Example i is the same from a fresh dataset read at i directly; another pass or seed gives another."""
    dataset = photos.PhotoCrops(32).dataset(5)
    first = [dataset[index]["image"] for index in range(24)]
    assert all(image.shape == (32, 32, 3) and image.dtype == np.uint8 for image in first)
    np.testing.assert_array_equal(photos.PhotoCrops(32).dataset(5)[13]["image"], first[13])
    assert not np.array_equal(photos.PhotoCrops(32).dataset(6)[13]["image"], first[13])
    assert len({image.tobytes() for image in first}) == 24


def test_fixed_crops_tile_the_photos():
    """Crops without overlap, in order, at the photos' own resolution."""
    crops, photo = photos.fixed_crops("validation", 64), photos.load("validation")["astronaut"]
    assert crops.shape == (64, 64, 64, 3)
    np.testing.assert_array_equal(crops[9], photo[64:128, 64:128])
    assert len(photos.fixed_crops("held_out", 64)) == 4 * 7 + 6 * 9 + 6 * 10


def test_a_missing_package_or_photo_is_an_error(monkeypatch, tmp_path):
    """Nothing is downloaded: what is not installed is named."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else find_spec(name))
    with pytest.raises(OmniError, match=r"scikit-learn.*quickstart"):
        photos.load("held_out")
    monkeypatch.setattr(photos, "_package", lambda name: tmp_path)
    with pytest.raises(OmniError, match=r"astronaut.png: the installed package does not bring"):
        photos.load("validation")


def test_patches_go_back_where_they_were():
    """Cutting and joining are inverse; a codebook of all patches reproduces the pictures."""
    pictures = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 3), np.uint8)
    patches = photos_baselines.to_patches(pictures, 4)
    np.testing.assert_array_equal(patches[4].reshape(4, 4, 3), pictures[0, 4:8, 4:8])
    np.testing.assert_array_equal(photos_baselines.from_patches(patches, pictures.shape, 4), pictures)
    np.testing.assert_array_equal(photos_baselines.quantized(pictures, patches.astype(np.float32), 4), pictures)


@pytest.mark.parametrize("augmented", [True, False])
def test_k_means_finds_the_patches_there_are(monkeypatch, augmented):
    """Photos of eight flat colours are coded without error by eight codes, and worse by four."""
    colours = np.random.default_rng(0).integers(0, 256, (8, 1, 1, 3), np.uint8)
    flat = {str(index): np.broadcast_to(colour, (64, 64, 3)) for index, colour in enumerate(colours)}
    monkeypatch.setattr(photos, "load", lambda split: flat)
    pictures, config = photos.fixed_crops("held_out", 16), photos_baselines.KMeansConfig(patches=512, starts=3)
    codebooks = [photos_baselines.fit_k_means(config, codes, 4, 16, 0, augmented=augmented) for codes in (8, 4)]
    exact, coarse = (photos_baselines.quantized(pictures, codebook, 4) for codebook in codebooks)
    np.testing.assert_array_equal(exact, pictures)
    assert not np.array_equal(coarse, pictures)


def test_webp_is_measured_at_the_nearest_rate():
    """More bits, more quality; the rate is within half a step of what was asked, and leaves out 20 bytes a file."""
    pictures = photos.fixed_crops("validation", 64)[:12]
    low, high = (photos_baselines.webp_nearest(pictures, rate) for rate in (0.5, 1.5))
    assert low["psnr"] + 2 < high["psnr"] and low["quality"] < high["quality"]
    assert low["bits_per_pixel"] == pytest.approx(0.5, abs=0.05)
    assert high["bits_per_pixel"] == pytest.approx(1.5, abs=0.1)
    assert low["bits_per_pixel_of_files"] - low["bits_per_pixel"] == pytest.approx(160 / 4096)


def test_results_hold_tokenizer_and_baselines(monkeypatch, tmp_path):
    """`python -m omni.recipes.photos_evaluation RUN FILE` measures all on the same crops at the same bits."""
    monkeypatch.setattr(photos, "fixed_crops", lambda split, size: pictures[split])
    rng = np.random.default_rng(0)
    pictures = {split: rng.integers(0, 256, (6, 32, 32, 3), np.uint8) for split in photos.PHOTOS}
    ImageTokenizer(TINY, ImageVQ(TINY, rngs=nnx.Rngs(0))).save(tmp_path / "run")
    monkeypatch.setattr(photos_evaluation, "KMeansConfig", lambda: photos_baselines.KMeansConfig(64, 2, 5))
    monkeypatch.setattr("sys.argv", ["", str(tmp_path / "run"), str(tmp_path / "results" / "photos.json")])
    photos_evaluation.main()
    results = json.loads((tmp_path / "results" / "photos.json").read_text())
    assert results["bits_per_pixel"] == 4 / 64 and results["crops"] == 6
    tokenizer = omni_tokenizers.load(tmp_path / "run")
    decoded = tokenizer.decode(tokenizer.encode(pictures["held_out"]))
    assert results["tokenizer"]["psnr"] == psnr(pictures["held_out"], decoded)
    assert {"psnr", "patches_of"} <= set(results["k_means"]) and results["webp"]["psnr"] > 0


def test_a_run_that_is_not_there_is_one_line(monkeypatch, tmp_path, capsys):
    """`python -m omni.recipes.photos_evaluation` exits as `omni` does."""
    monkeypatch.setattr("sys.argv", ["", str(tmp_path / "run"), str(tmp_path / "photos.json")])
    with pytest.raises(SystemExit) as exit:
        photos_evaluation.main()
    line = capsys.readouterr().err
    assert exit.value.code == 1 and line.startswith("omni: ") and line.count("\n") == 1


@pytest.mark.slow
def test_the_experiment_trains_from_the_command_line(tmp_path):
    """`omni tokenizer train experiments/tokenizers/photos.py` with overrides leaves a tokenizer that opens."""
    output = tmp_path / "run"
    sizes = {"channels": 8, "residual-blocks": 1, "quantizer.codebook-size": 16}
    overrides = [text for name, size in sizes.items() for text in (f"--task.tokenizer.{name}", str(size))]
    overrides += ["--optimizer.name", "adamw", "--steps", "2", "--output", str(output)]
    main(["tokenizer", "train", str(EXPERIMENTS / "photos.py"), *overrides])
    assert omni_tokenizers.load(output).modality == "image"
    assert {"psnr", "held_out/psnr"} <= set(read_metrics(output)[-1])


@pytest.mark.slow
def test_quantizers_are_compared_and_the_comparison_goes_on(tmp_path, monkeypatch):
    """One command trains and measures each; again, it trains nothing anew, adds what is new and keeps the rest."""

    def small_training(output, quantizer, steps):
        config = photos_training(output, quantizer, steps)
        tokenizer = dataclasses.replace(config.task.tokenizer, image_size=16, channels=8, residual_blocks=1)
        task = dataclasses.replace(config.task, data=photos.PhotoCrops(16), tokenizer=tokenizer)
        return dataclasses.replace(config, task=task, optimizer=OptimizerConfig())

    photos_training = photos_recipe.photos_training
    monkeypatch.setattr(photos_recipe, "photos_training", small_training)
    monkeypatch.setattr(photos, "fixed_crops", lambda split, size: np.zeros((2, size, size, 3), np.uint8))
    command = ["tokenizer", "train", str(EXPERIMENTS / "compare_quantizers.py"), "--output", str(tmp_path)]
    main([*command, "--steps", "2", "--quantizers", "fsq"])
    trained = (tmp_path / "fsq" / "weights.safetensors").stat().st_mtime_ns
    main([*command, "--steps", "2", "--quantizers", "lfq"])
    assert (tmp_path / "fsq" / "weights.safetensors").stat().st_mtime_ns == trained
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["steps"] == 2 and list(results["quantizers"]) == ["fsq", "lfq"]
    assert {"psnr", "ssim", "usage", "perplexity", "training_seconds"} <= set(results["quantizers"]["lfq"])
    main([*command, "--steps", "3", "--quantizers", "lfq"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["steps"] == 3 and list(results["quantizers"]) == ["lfq"], "no other was trained for as long"
    assert results["quantizers"]["lfq"]["training_seconds"] == round(training_seconds(tmp_path / "lfq")[3], 1)
    assert {quantizer.codebook_size for quantizer in photos_recipe.QUANTIZERS.values()} == {512}
    with pytest.raises(UsageError, match="vq-gan"):
        photos_recipe.QuantizerComparison(quantizers=("vq-gan",))
