"""A user's own files as examples: which are held out, what comes out, and what is said of those that are no use."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import omni_tokenizers
from omni.data.files import Files, PictureFiles, SoundFiles
from omni.experiment import load_experiment, override
from omni.parts import Audio, Image
from omni.train.metrics import read_metrics
from omni_tokenizers.errors import OmniError, UsageError

COLOURS = range(0, 240, 6)


@pytest.fixture
def pictures(tmp_path):
    """Forty pictures of one colour each, some of them in a directory below, and a text."""
    (tmp_path / "below").mkdir()
    for place, colour in enumerate(COLOURS):
        name = f"below/{colour}.JPG" if place % 2 else f"{colour}.png"
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image(np.full((40, 60, 3), colour, np.uint8)).to_pil().save(tmp_path / name, quality=100)
    (tmp_path / "notes.txt").write_text("no picture")
    return PictureFiles(Files(str(tmp_path), held_out_share=0.3), size=16)


def colours(images) -> set[int]:
    return {int(np.rint(image.mean() / 6) * 6) for image in images}


def held_out_pictures(examples) -> np.ndarray:
    batches = examples.held_out()
    assert max(len(batch["image"]) for batch in batches) <= 8
    return np.concatenate([batch["image"] for batch in batches])


def epoch(examples, seed=0) -> list[dict]:
    dataset = examples.dataset(seed)
    return [dataset[index] for index in range(len(COLOURS))]


def test_no_picture_is_on_both_sides(pictures):
    """All files are on one side or the other, whatever the seed, and more files move none of them."""
    held_out = held_out_pictures(pictures)
    trained = colours(example["image"] for example in epoch(pictures))
    assert held_out.shape[1:] == (16, 16, 3) and held_out.dtype == np.uint8
    assert colours(held_out) | trained == set(COLOURS) and not colours(held_out) & trained
    assert 4 <= len(held_out) <= 20
    for path in list(pictures.files.split([".png"])[0]):
        path.unlink()
    np.testing.assert_array_equal(held_out_pictures(pictures), held_out)


def test_what_is_measured_comes_from_everywhere_and_stays(tmp_path):
    """The most that are measured are few of many directories; a new file takes the place of at most one."""
    for name in (f"{group}/{index}.png" for group in "abcdefgh" for index in range(20)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    files = Files(str(tmp_path), held_out_share=0.5, held_out_files=24)
    trained, measured = files.split([".png"])
    assert len(measured) == 24 and len({path.parent for path in measured}) >= 6 and not set(trained) & set(measured)
    for index in range(20):
        (tmp_path / f"new{index}.png").touch()
        before, (_, measured) = measured, files.split([".png"])
        assert len(set(before) - set(measured)) <= 1


def test_crops_are_new_each_time_and_the_same_for_a_seed(tmp_path):
    """Places, sizes and mirrors are random; the seed decides."""
    gradient = np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None].repeat(48, 0).repeat(3, 2)
    Image(gradient).save(tmp_path / "a.png")
    examples = PictureFiles(Files(str(tmp_path), held_out_share=0.0), size=8, smallest=0.25)
    crops = [example["image"].astype(int) for example in epoch(examples)]
    slopes = [crop[0, -1, 0] - crop[0, 0, 0] for crop in crops]
    assert min(slopes) < 0 < max(slopes) and len({crop.tobytes() for crop in crops}) > 30
    assert max(map(abs, slopes)) > 2 * min(map(abs, slopes))
    assert all((a["image"] == b).all() for a, b in zip(epoch(examples), crops, strict=True))
    assert any((a["image"] != b).any() for a, b in zip(epoch(examples, 1), crops, strict=True))
    assert examples.held_out() is None


def test_sounds_are_resampled_and_mixed(tmp_path):
    """48 kHz stereo becomes mono at 24 kHz; what is short is padded, and its length said."""
    moments = np.arange(24000) / 48000
    tone = np.stack([np.sin(2 * np.pi * 440 * moments), np.zeros(24000)]).astype(np.float32) / 2
    Audio(tone, 48000).save(tmp_path / "tone.wav")
    Audio(tone[:, :2400], 48000).save(tmp_path / "short.flac")
    examples = SoundFiles(Files(str(tmp_path), held_out_share=0.0), samples=4800)
    by_length = {int(example["length"]): example["audio"] for example in epoch(examples)}
    assert by_length.keys() == {4800, 1200}
    assert not by_length[1200][1200:].any() and by_length[1200].shape == (4800,)
    spectrum = np.abs(np.fft.rfft(by_length[4800]))
    assert spectrum.argmax() == 88  # 440 Hz in steps of 5 Hz
    assert np.abs(by_length[4800]).max() == pytest.approx(0.25, abs=0.01)


def test_what_is_no_use_is_said(pictures, tmp_path):
    """A damaged file is named; an empty directory, one that is not there, and shares that cannot be are refused."""
    damaged = pictures.files.split([".png"])[0][0]
    damaged.write_bytes(damaged.read_bytes()[:60])
    with pytest.raises(OmniError, match=damaged.name):
        epoch(pictures)
    with pytest.raises(OmniError, match="no file to train on there, out of 0"):
        SoundFiles(pictures.files).dataset(0)
    with pytest.raises(OmniError, match="absent: no file"):
        PictureFiles(Files(str(tmp_path / "absent"))).dataset(0)
    with pytest.raises(UsageError, match="held_out_share"):
        dataclasses.replace(pictures.files, held_out_share=1.0)
    with pytest.raises(UsageError, match="smallest"):
        dataclasses.replace(pictures, smallest=0.0)
    with pytest.raises(UsageError, match="samples"):
        SoundFiles(pictures.files, samples=0)


SMALL = """--steps 2 --batch-size 2 --checkpoint-every 1 --task.data.size 32 --task.tokenizer.image-size 32
--task.tokenizer.channels 32 --task.tokenizer.multipliers 1 1 --task.tokenizer.residual-blocks 1
--task.tokenizer.quantizer.codebook-size 32 --task.adversary.start 1
--task.adversary.discriminator.channels 32 --task.adversary.discriminator.layers 2"""


@pytest.mark.slow
def test_the_recipe_of_256_pixels_runs_small(pictures, tmp_path):
    """The experiment as it stands but for its sizes, by the keys of its command line, leaves a tokenizer that loads."""
    path = Path(__file__).parents[2] / "experiments" / "tokenizers" / "image_256.py"
    places = ["--output", str(tmp_path / "run"), "--task.data.files.directory", pictures.files.directory]
    override(load_experiment(path), [*SMALL.split(), *places], "omni tokenizer train").run()
    tokenizer = omni_tokenizers.load(tmp_path / "run")
    assert tokenizer.encode(np.zeros((1, 256, 256, 3), np.uint8)).shape == (1, 128, 128)
    assert read_metrics(tmp_path / "run")[-1]["critic/loss"] > 0
