"""Videos: arrays, files, sampling by rate and by count, and what notebooks show."""

import base64
import io
import logging
import re
import struct
import sys
import tracemalloc

import numpy as np
import pytest
import videos
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PillowImage
from videos import FRAMES, Pixel, indices, refusal

from omni import video_files
from omni.parts import Image, Video, as_part, read_part
from omni_tokenizers.errors import UsageError

# --- arrays


def test_arrays_become_frames_and_times():
    """Right arrays are kept; grey, alpha and floats become RGB as in pictures; no times stand for 25 a second."""
    video = Video(FRAMES, np.arange(10) / 8)
    assert np.shares_memory(video.frames, FRAMES) and video.timestamps.dtype == np.float64
    assert (video.height, video.width, video.fps, video.seconds) == (48, 64, 8.0, 1.125)
    np.testing.assert_array_equal(Video(FRAMES).timestamps, np.arange(10) / 25)
    np.testing.assert_array_equal(Video(FRAMES / 255).frames, FRAMES)
    np.testing.assert_array_equal(Video(FRAMES[..., :1]).frames, FRAMES[..., :1].repeat(3, -1))
    clear = np.zeros((2, 1, 1, 4), np.uint8)
    assert (Video(clear).frames == 255).all()
    assert Video(FRAMES[:1]).fps is None and Video(FRAMES[:3], [0, 0.1, 0.5]).fps is None
    assert Video(FRAMES[:3], [0, 0.033, 0.067]).fps == pytest.approx(2 / 0.067)  # to a millisecond


@pytest.mark.parametrize(
    ("frames", "times"),
    [
        (FRAMES[0], None),
        (FRAMES[:0], None),
        (FRAMES.astype(np.int32), None),
        (FRAMES / 100, None),
        (np.moveaxis(FRAMES, -1, 1), None),
        ("x", None),
        (FRAMES, np.arange(9)),
        (FRAMES, np.zeros(10)),
        (FRAMES, np.arange(10) - 1),
        (FRAMES, [*range(9), np.inf]),
        (FRAMES, ["a"] * 10),
        (FRAMES, "now"),
    ],
)
def test_wrong_arrays_are_refused(frames, times):
    assert refusal(Video, frames, times, kind=UsageError).startswith("video: ")


def test_repr_is_short_and_as_part_knows_videos(tmp_path):
    assert repr(Video.at_rate(FRAMES, 30, context=True)) == "Video(64x48, 10 frames, 30 fps, context)"
    assert repr(Video(FRAMES[:1])) == "Video(64x48, 1 frames)"
    video = as_part(FRAMES)
    assert isinstance(video, Video) and as_part(video) is video
    video.save(tmp_path / "a.mkv")
    assert isinstance(as_part(tmp_path / "a.mkv"), Video)
    assert len(read_part(tmp_path / "a.mkv", fps=5).frames) == 2
    assert "Video" in refusal(as_part, FRAMES[None], kind=UsageError)


def test_resample_shows_what_is_shown_at_each_moment():
    """By hand: frames at 0, 0.1, 0.5 and 0.6 s, four moments a second and forty."""
    video = Video(FRAMES[:4], [2.0, 2.1, 2.5, 2.6])
    assert indices(video.resample(4)) == [0, 1, 2]
    np.testing.assert_array_equal(video.resample(4).timestamps, [0, 0.25, 0.5])
    assert indices(video.resample(40)) == [0] * 4 + [1] * 16 + [2] * 4 + [3]
    assert indices(Video.at_rate(FRAMES, 7).resample(7)) == list(range(10))
    for fps in (0, -1, np.nan, np.inf, 1e9, "fast", True):
        refusal(video.resample, fps, kind=UsageError)


def test_resize_crop_is_that_of_pictures():
    video = Video(FRAMES[:2]).resize_crop(20, 20)
    np.testing.assert_array_equal(video.frames[1], Image(FRAMES[1]).resize_crop(20, 20).pixels)
    np.testing.assert_array_equal(video.timestamps, Video(FRAMES[:2]).timestamps)


# --- files


@pytest.mark.parametrize(("name", "most"), [("a.mkv", 0), ("a.mp4", 5), ("a.webm", 5), ("a.GIF", 5)])
def test_files_give_back_frames_and_times(tmp_path, name, most):
    """Irregular times come back to the format's resolution; .mkv gives the very pixels, others about these."""
    times = np.array([0, 0.1, 0.2, 0.5, 0.51, 0.6, 0.7, 1.0, 1.2, 3.0])
    Video(FRAMES, times).save(tmp_path / name)
    video = Video.read(tmp_path / name)
    np.testing.assert_allclose(video.timestamps, times, atol=1e-9)
    error = np.abs(video.frames[:, None].astype(int) - FRAMES).mean((2, 3, 4))  # of each frame to each original
    assert error.diagonal().max() <= most and error.argmin(1).tolist() == list(range(10))


def test_write_is_save_and_gif_stays_a_picture(tmp_path):
    Video(FRAMES).write(tmp_path / "a.gif")
    assert isinstance(read_part(tmp_path / "a.gif"), Image)
    assert "known: .mp4, .webm, .mkv, .gif" in refusal(Video(FRAMES).save, tmp_path / "a.avi", kind=UsageError)
    assert "cannot be written" in refusal(Video(FRAMES).save, tmp_path / "nowhere" / "a.mp4")
    close = Video(FRAMES[:2], [0, 0.0001])
    for name, least in (("a.mkv", "1/1000 s"), ("a.gif", "1/100 s")):
        assert least in refusal(close.save, tmp_path / name)


@pytest.mark.parametrize(("name", "size"), [("a.mp4", (48, 64)), ("a.webm", (48, 64)), ("a.mkv", (47, 63))])
def test_odd_sizes(tmp_path, caplog, name, size):
    """Formats of even sides are padded, which is said, at the right and below; the lossless one keeps the size."""
    Video(FRAMES[:, :47, :63]).save(tmp_path / name)
    video = Video.read(tmp_path / name)
    assert video.frames.shape[1:3] == size
    assert np.abs(video.frames[:, :46, :62].astype(int) - FRAMES[:, :46, :62]).mean() < 5
    assert [record.message for record in caplog.records] == (
        [] if size == (47, 63) else [f"{tmp_path / name}: padded to even sides, 64x48 pixels"]
    )


def test_one_frame_and_a_late_first_frame(tmp_path):
    """A single frame is a video; times count from the first frame."""
    Video(FRAMES[:1]).save(tmp_path / "a.mp4")
    assert Video.read(tmp_path / "a.mp4").timestamps.tolist() == [0]
    assert len(Video.read(tmp_path / "a.mp4", fps=3).frames) == len(Video.read(tmp_path / "a.mp4", count=1).frames) == 1
    assert "one frame" in refusal(Video.read, tmp_path / "a.mp4", count=2)
    Video(FRAMES[:2], [7.5, 8]).save(tmp_path / "b.mkv")
    np.testing.assert_allclose(Video.read(tmp_path / "b.mkv").timestamps, [0, 0.5])


@pytest.mark.parametrize("name", ["a.avi", "a.mov"])
def test_formats_that_are_only_read(tmp_path, name):
    videos.write(tmp_path / name, FRAMES, list(np.arange(10) / 10), codec="mpeg4", pixels="yuv420p", ticks=10)
    video = read_part(tmp_path / name)
    np.testing.assert_allclose(video.timestamps, np.arange(10) / 10, atol=1e-9)
    assert np.abs(video.frames.astype(int) - FRAMES).mean() < 10


@pytest.mark.parametrize("turned", [90, -90, 180])
def test_turned_frames_are_read_upright(tmp_path, turned):
    """The display matrix turns what is stored counterclockwise by so many degrees."""
    videos.write(tmp_path / "a.mp4", FRAMES, [0, 0.1, 0.2], codec="libx264", pixels="yuv420p", turned=turned)
    video = Video.read(tmp_path / "a.mp4")
    upright = np.rot90(FRAMES[:3], turned // 90, axes=(1, 2))
    assert video.frames.shape == upright.shape and np.abs(video.frames.astype(int) - upright).mean() < 8


@pytest.mark.parametrize("matrix", [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)])
@pytest.mark.parametrize("crossed", [False, True])
def test_display_matrices_turn_and_reflect(tmp_path, matrix, crossed):
    """A stored pixel (x, y) is shown at (a x + c y, b x + d y), by the definition of MP4's track headers."""
    a, b, c, d = (0, matrix[0], matrix[3], 0) if crossed else matrix
    videos.write(tmp_path / "a.mp4", FRAMES, [0, 0.1], codec="libx264", pixels="yuv420p")
    set_matrix(tmp_path / "a.mp4", a, b, c, d)
    y, x = np.indices(FRAMES.shape[1:3])
    column, row = a * x + c * y, b * x + d * y
    upright = np.empty((2, *((64, 48) if crossed else (48, 64)), 3), np.uint8)
    upright[:, row - row.min(), column - column.min()] = FRAMES[:2]
    for video in (Video.read(tmp_path / "a.mp4"), Video.read(tmp_path / "a.mp4", fps=10)):
        assert video.frames.shape == upright.shape and np.abs(video.frames.astype(int) - upright).mean() < 8


@pytest.mark.parametrize("matrix", [(0.8, 0.6, -0.6, 0.8), (1, 0, 0.5, 1), (0, 0, 0, 0), (1, 0, 0, 0)])
def test_other_display_matrices_are_refused(tmp_path, matrix):
    videos.write(tmp_path / "a.mp4", FRAMES, [0, 0.1], codec="libx264", pixels="yuv420p")
    set_matrix(tmp_path / "a.mp4", *matrix)
    assert "display matrix" in refusal(Video.read, tmp_path / "a.mp4")


def set_matrix(path, a, b, c, d) -> None:
    """Overwrites the matrix of the only track's header."""
    content = path.read_bytes()
    at = content.index(b"tkhd") + 44
    rows = [int(value * 65536) for value in (a, b, 0, c, d, 0, 0, 0)]
    path.write_bytes(content[:at] + struct.pack(">9i", *rows, 1 << 30) + content[at + 36 :])


def test_frames_with_exif_are_read(tmp_path):
    """PyAV does not list what comes with such a frame; turns are known all the same (here by 90 degrees clockwise)."""
    import av

    exif = PillowImage.Exif()
    exif[0x0112] = 6
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        video = container.add_stream("mjpeg", rate=10)
        video.height, video.width, video.pix_fmt = 48, 64, "yuvj420p"
        container.start_encoding()
        for number, frame in enumerate(FRAMES[:2]):
            content = io.BytesIO()
            PillowImage.fromarray(frame).save(content, "JPEG", quality=95, subsampling="4:2:0", exif=exif)
            packet = av.Packet(content.getvalue())
            packet.stream, packet.pts, packet.dts, packet.is_keyframe = video, number, number, True
            packet.time_base = video.time_base
            container.mux(packet)
    video = Video.read(tmp_path / "a.avi")
    upright = np.rot90(FRAMES[:2], -1, axes=(1, 2))
    assert video.frames.shape == upright.shape and np.abs(video.frames.astype(int) - upright).mean() < 8


# --- sampling


@pytest.fixture
def steady(tmp_path):
    return videos.write_steady(tmp_path / "steady.mkv")


def test_reading_by_rate_takes_the_frame_that_is_shown(steady, tmp_path):
    assert indices(Video.read(steady, fps=30)) == list(range(10))
    assert indices(Video.read(steady, fps=15)) == [0, 2, 4, 6, 8]
    assert indices(Video.read(steady, fps=20)) == [0, 1, 3, 4, 6, 7, 9]
    assert indices(Video.read(steady, fps=60)) == [i // 2 for i in range(19)]
    assert Video.read(steady, fps=20).fps == pytest.approx(20)
    times = np.array([0, 0.1, 0.5, 0.6])
    Video(FRAMES[:4], times).save(tmp_path / "b.mkv")
    for fps in (3, 4, 10, 24, 40):  # one rule for files and arrays
        expected, found = Video(FRAMES[:4], times).resample(fps), Video.read(tmp_path / "b.mkv", fps=fps)
        assert indices(found) == indices(expected)
        np.testing.assert_allclose(found.timestamps, expected.timestamps)


@given(st.lists(st.integers(1, 2000), max_size=30), st.floats(0.2, 120))
def test_files_arrays_and_the_definition_choose_alike(gaps, fps):
    """At each moment up to the last frame's, the last frame that begins up to it or within a millisecond after."""
    times = np.cumsum([0, *gaps]) / 1000
    video = Video(np.arange(len(times), dtype=np.uint8)[:, None, None, None].repeat(3, -1), times)
    moments = [k / fps for k in range(int((times[-1] + video_files.TICK) * fps) + 1)]
    expected = [max(i for i, time in enumerate(times) if time - video_files.TICK <= moment) for moment in moments]
    found = video.resample(fps)
    np.testing.assert_array_equal(found.timestamps, moments)
    assert found.frames[:, 0, 0, 0].tolist() == expected
    read = video_files._at(zip(times, map(Pixel, range(len(times))), strict=True), found.timestamps, "a.mkv")
    assert read[:, 0, 0, 0].tolist() == expected


def test_reading_by_count_spreads_over_the_whole(steady):
    video = Video.read(steady, count=4)
    assert indices(video) == [0, 3, 6, 9]
    np.testing.assert_allclose(video.timestamps, [0, 0.1, 0.2, 0.3])
    assert indices(Video.read(steady, count=1)) == [0] and indices(Video.read(steady, count=2)) == [0, 9]
    assert indices(Video.read(steady, count=10)) == list(range(10))
    assert indices(Video.read(steady, count=19)) == [i // 2 for i in range(19)]


@pytest.mark.parametrize(
    "sampling",
    [{"fps": 1, "count": 1}, {"fps": 0}, {"fps": np.nan}, {"fps": 1e6}, {"count": 0}, {"count": 2.5}, {"count": 10**9}],
)
def test_wrong_sampling_is_refused(steady, sampling):
    assert refusal(Video.read, steady, kind=UsageError, **sampling).startswith("video: ")


def test_sampling_holds_few_frames(tmp_path):
    """Of 300 frames of 108 kB, 32 MB, two are asked for: numpy never holds a tenth of them. All are held once."""
    frames = np.broadcast_to(np.uint8([1, 2, 3]), (300, 150, 240, 3))
    Video.at_rate(frames, 30).save(tmp_path / "a.mkv")
    tracemalloc.start()
    try:
        assert len(Video.read(tmp_path / "a.mkv", count=2).frames) == 2
        _, sampled = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        assert len(Video.read(tmp_path / "a.mkv").frames) == 300
        _, whole = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sampled < frames.nbytes / 10 < frames.nbytes < whole < frames.nbytes * 1.2


def test_without_pyav_one_line_says_what_to_install(tmp_path, monkeypatch):
    Video(FRAMES).save(tmp_path / "a.mkv")
    monkeypatch.setitem(sys.modules, "av", None)
    wanted = 'video files need PyAV: pip install "omni-any-to-any[video]"'
    assert refusal(Video.read, tmp_path / "a.mkv") == wanted
    assert refusal(Video(FRAMES).save, tmp_path / "b.mp4") == wanted
    Video(FRAMES).save(tmp_path / "b.gif")  # by Pillow
    assert PillowImage.open(tmp_path / "b.gif").n_frames == 10
    assert 'src="data:image/gif;base64,' in Video(FRAMES)._repr_html_()


# --- notebooks


def test_notebooks_play_it(tmp_path, caplog):
    """The page holds an MP4 file of the frames; without H.264 an animated picture."""
    caplog.set_level(logging.INFO)
    page = Video.at_rate(FRAMES, 12)._repr_html_()
    assert page.startswith("<video controls") and 'width="192" height="144"' in page
    (tmp_path / "a.mp4").write_bytes(base64.b64decode(re.search(r"base64,([^\"]+)", page)[1]))
    video = Video.read(tmp_path / "a.mp4")
    assert video.fps == pytest.approx(12) and np.abs(video.frames.astype(int) - FRAMES).mean() < 5
    assert not caplog.records


def test_without_x264_files_are_mpeg_4_and_pages_animated_pictures(tmp_path, monkeypatch):
    import av

    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
    assert Video(FRAMES)._repr_html_().startswith("<img")
    Video(FRAMES).save(tmp_path / "a.mp4")
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"
    assert np.abs(Video.read(tmp_path / "a.mp4").frames.astype(int) - FRAMES).mean() < 8
