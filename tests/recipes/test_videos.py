"""Camera moves over the photos, and what video tokenizers are compared with on them."""

import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import omni_tokenizers
from omni.cli import main
from omni.recipes import photos, videos, videos_evaluation
from omni.train.metrics import read_metrics
from omni_tokenizers.errors import UsageError
from omni_tokenizers.quantizers import FSQConfig
from omni_tokenizers.video import VideoAutoencoder, VideoTokenizer, VideoTokenizerConfig

pytest.importorskip("skimage")
pytest.importorskip("sklearn")

EXPERIMENTS = Path(__file__).parents[2] / "experiments" / "tokenizers"
TINY = VideoTokenizerConfig(16, 8, 2, 8, (1,), 1, FSQConfig((4, 4)))


def test_examples_depend_on_seed_and_index_alone():
    """Example i is the same from a fresh dataset read at i directly; another index or seed gives another."""
    dataset = videos.CameraMoves(24, 5).dataset(3)
    first = [dataset[index]["video"] for index in range(24)]
    assert all(video.shape == (5, 24, 24, 3) and video.dtype == np.uint8 for video in first)
    np.testing.assert_array_equal(videos.CameraMoves(24, 5).dataset(3)[13]["video"], first[13])
    assert not np.array_equal(videos.CameraMoves(24, 5).dataset(4)[13]["video"], first[13])
    assert len({video.tobytes() for video in first}) == 24


def test_videos_are_of_the_photos_of_their_split(monkeypatch):
    """What trains, what is shown on the page and what is measured come from three splits."""
    asked, load = [], photos.load
    monkeypatch.setattr(photos, "load", lambda split: asked.append(split) or load(split))
    videos.CameraMoves(24, 5).dataset(0)
    (shown,) = videos.CameraMoves(24, 5).held_out()
    moves = videos.fixed_moves("held_out", 24, 5, 2)
    assert asked == ["train", "validation", "held_out"]
    assert shown["video"].shape == (8, 5, 24, 24, 3) and moves.shape == (6, 5, 24, 24, 3)
    np.testing.assert_array_equal(moves, videos.fixed_moves("held_out", 24, 5, 2))


def test_cameras_move_smoothly_and_see_nothing_beyond_the_photo():
    """On a slope, bright everywhere, frames change little by little, most videos move, and none has a black corner."""
    rows, columns = np.mgrid[:300, :320]
    photo = np.stack([60 + rows // 2, 60 + columns // 2, 0 * rows + 200], -1).astype(np.uint8)
    rng, moved = np.random.default_rng(0), []
    for _ in range(60):
        video = videos.camera_move([photo], 0, 64, 9, rng).astype(int)
        assert video.min() >= 58 and np.abs(video[..., 2] - 200).max() <= 1, "outside of a photo there is nothing"
        middle = video[:, 32, 32, :2]
        assert np.median(np.abs(np.diff(middle, axis=0))) < 8, "but where a piece comes and goes"
        moved.append(np.abs(video[-1] - video[0]).mean() > 1)
    assert 0.6 < np.mean(moved) <= 1


def test_a_view_is_where_the_camera_is():
    """Unscaled it is the photo's own pixels, turned by a quarter these turned; at scale 2 a slope is twice as steep."""
    photo = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    picture = videos.PIL.Image.fromarray(photo)
    plain = photo[12:20, 16:24]
    np.testing.assert_array_equal(videos._view(picture, 8, 20.0, 16.0, 0.0, 0.0), plain)
    np.testing.assert_array_equal(videos._view(picture, 8, 20.0, 16.0, 0.0, np.pi / 2), np.rot90(plain, 1))
    flat = videos.PIL.Image.fromarray(np.repeat(np.arange(50, dtype=np.uint8)[None], 40, 0))
    slope = np.diff(np.asarray(videos._view(flat, 8, 25.0, 20.0, np.log(2.0), 0.0)).astype(int), axis=1)
    assert (slope == 2).all()


def test_curves_pass_from_the_first_point_to_the_last():
    """By way of the second, and never leave what lies between them."""
    points = np.array([[0.0, 5.0], [8.0, 5.0], [0.0, 9.0]])
    path = videos.curve(points, 9)
    np.testing.assert_allclose(path[[0, 4, 8]], [[0, 5], [4, 6], [0, 9]])
    assert path.shape == (9, 2) and (path >= 0).all() and (path <= 9).all()


@pytest.mark.parametrize(("size", "frames"), [(0, 5), (videos.LARGEST_SIZE + 1, 5), (24, 0)])
def test_moves_fit_into_every_photo(size, frames):
    """The smallest photo has room for frames of the largest size; larger ones, and none, are refused."""
    assert len(videos.fixed_moves("held_out", videos.LARGEST_SIZE, 2, 4)) == 12
    with pytest.raises(UsageError, match=f"size is {size} and frames {frames}"):
        videos.CameraMoves(size, frames)


def test_boxes_are_what_codes_stand_for():
    """The first is the first frame, as often as the stride has frames; a codebook of all boxes leaves no error."""
    tokenizer = VideoTokenizer(TINY, nnx.jit(lambda: VideoAutoencoder(TINY, rngs=nnx.Rngs(0)))())
    moves = videos.fixed_moves("held_out", 16, 5, 1)
    cut = videos_evaluation.boxes(moves, tokenizer)
    assert cut.shape == (3, 3, 2, 2, 2 * 8 * 8 * 3)
    first = cut.reshape(3, 3, 2, 2, 2, 8, 8, 3)[:, 0]
    np.testing.assert_array_equal(first[:, :, :, 0], first[:, :, :, 1])
    np.testing.assert_array_equal(first[0, 1, 0, 0], moves[0, 0, 8:, :8])


def test_results_hold_tokenizer_and_k_means(monkeypatch, tmp_path):
    """`python -m omni.recipes.videos_evaluation RUN FILE` measures both on the same moves at the same bits."""
    tokenizer = VideoTokenizer(TINY, nnx.jit(lambda: VideoAutoencoder(TINY, rngs=nnx.Rngs(0)))())
    tokenizer.save(tmp_path / "run")
    monkeypatch.setattr(
        videos_evaluation, "KMeansConfig", lambda config=videos_evaluation.KMeansConfig: config(400, 1, 5)
    )
    monkeypatch.setattr("sys.argv", ["", str(tmp_path / "run"), str(tmp_path / "results" / "videos.json")])
    videos_evaluation.main()
    results = json.loads((tmp_path / "results" / "videos.json").read_text())
    assert results["videos"] == 24 and results["frames"] == 17
    assert results["bits_per_pixel"] == pytest.approx(9 * 4 * 4 / (17 * 256))
    moves = videos.fixed_moves("held_out", 16, 17, 8)
    decoded = tokenizer.decode(tokenizer.encode(moves))
    assert results["tokenizer"]["psnr"] == videos_evaluation.compare(moves, decoded)["psnr"]
    assert results["k_means"]["psnr"] > results["tokenizer"]["psnr"], "nothing was trained"


@pytest.mark.slow
def test_the_experiment_trains_from_the_command_line(tmp_path):
    """`omni tokenizer train experiments/tokenizers/video.py` with overrides leaves a tokenizer that opens."""
    output = tmp_path / "run"
    sizes = {"tokenizer.channels": 8, "tokenizer.residual-blocks": 1, "tokenizer.quantizer.codebook-size": 16}
    sizes |= {"tokenizer.image-size": 32, "data.size": 32}
    overrides = [text for name, size in sizes.items() for text in (f"--task.{name}", str(size))]
    overrides += ["--optimizer.name", "adamw", "--steps", "2", "--output", str(output)]
    main(["tokenizer", "train", str(EXPERIMENTS / "video.py"), *overrides])
    assert omni_tokenizers.load(output).modality == "video"
    assert {"psnr", "held_out/psnr"} <= set(read_metrics(output)[-1])
