"""Untrusted video files: cut, trimmed, foreign, damaged and absurd ones are one line, or are read as they should be."""

import struct

import numpy as np
import pytest
import videos
from videos import FRAMES, Pixel, indices, refusal

from omni import media, video_files
from omni.parts import Image, Video, read_part
from omni_tokenizers.errors import OmniError, UsageError


@pytest.fixture
def steady(tmp_path):
    return videos.write_steady(tmp_path / "steady.mkv")


@pytest.mark.parametrize("name", ["a.mkv", "a.webm", "a.mp4"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
def test_cut_files_are_refused(tmp_path, name, share):
    """Wherever it is cut, with its name; Matroska's readers would return what is left."""
    Video.at_rate(FRAMES, 30).save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / f"cut-{name}").write_bytes(content[: int(share * len(content))])
    for sampling in ({}, {"fps": 5}, {"count": 2}):
        assert f"cut-{name}" in refusal(Video.read, tmp_path / f"cut-{name}", **sampling)


def test_a_cut_mp4_whose_index_comes_first_is_refused(tmp_path):
    """Such files open, and decoding would return what is left."""
    import av

    with av.open(str(tmp_path / "a.mp4"), "w", options={"movflags": "faststart"}) as container:
        video = container.add_stream("mpeg4", rate=30)
        video.height, video.width, video.pix_fmt = 48, 64, "yuv420p"
        for frame in FRAMES:
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(video.encode())
    assert len(Video.read(tmp_path / "a.mp4").frames) == 10
    content = (tmp_path / "a.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    with av.open(str(tmp_path / "a.mp4")) as container:
        last = max(packet.pos for packet in container.demux(container.streams.video[0]) if packet.size)
    for end, message in ((len(content) - 1, "truncated or damaged"), (last, "bytes are stated")):
        (tmp_path / "b.mp4").write_bytes(content[:end])
        assert message in refusal(Video.read, tmp_path / "b.mp4")


LONG = videos.moving_crops(24, 96, 128)


def write_mp4(path, *, head: int, shown: int, options=None) -> list[int]:
    """24 frames at 30 a second, of which an edit list, as phones write it, shows `shown` from the one numbered `head`.

    The file's index comes first. Returns where each packet begins.
    """
    import av

    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        video = container.add_stream("libx264", rate=30, options=options or {"g": "6", "bf": "0"})
        video.height, video.width, video.pix_fmt = 96, 128, "yuv420p"
        for frame in LONG:
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(video.encode())
    content = path.read_bytes()
    with av.open(str(path)) as container:
        positions = sorted(packet.pos for packet in container.demux(container.streams.video[0]) if packet.size)
        ticks = container.streams.video[0].time_base.denominator
    at = content.index(b"elst") + 12
    seconds, delay = struct.unpack(">Ii", content[at : at + 8])
    edit = struct.pack(">Ii", round(seconds * shown / 24), delay + ticks * head // 30)
    path.write_bytes(content[:at] + edit + content[at + 8 :])
    return positions


OPEN = {
    "x264-params": "open-gop=1:keyint=12:min-keyint=12:bframes=3:scenecut=0:b-pyramid=normal"
}  # frames refer over key frames


@pytest.mark.parametrize("options", [{}, {"g": "6", "bf": "2"}, OPEN])
@pytest.mark.parametrize(("head", "shown"), [(0, 6), (6, 18), (8, 8), (13, 6), (14, 10)])
def test_trimmed_files_are_read(tmp_path, head, shown, options):
    """An edit list leaves out frames, whole groups of them, too, and the file still holds them."""
    write_mp4(tmp_path / "a.mp4", head=head, shown=shown, options=options)
    video = Video.read(tmp_path / "a.mp4")
    error = np.abs(video.frames[:, None].astype(int) - LONG).mean((2, 3, 4))
    assert error.argmin(1).tolist() == list(range(head, head + len(video.frames)))
    assert len(video.frames) in (shown, shown + 1)  # the last may begin within the rounding of the list's length
    np.testing.assert_allclose(video.timestamps, np.arange(len(video.frames)) / 30, atol=1e-4)


@pytest.mark.parametrize(("head", "shown"), [(0, 6), (8, 8), (0, 24)])
def test_cut_trimmed_files_are_refused(tmp_path, head, shown):
    """Wherever they are cut: within a packet, between two, among frames that are not shown."""
    positions = write_mp4(tmp_path / "a.mp4", head=head, shown=shown)
    content = (tmp_path / "a.mp4").read_bytes()
    for end in (len(content) - 1, positions[23], positions[20] + 3, positions[12], positions[3]):
        (tmp_path / "b.mp4").write_bytes(content[:end])
        assert "truncated" in refusal(Video.read, tmp_path / "b.mp4")


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nother.mp4\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"This is no video at all.\n" * 50, "not a video"),
        (b"\x00" * 5000, "not a video"),
        (PLAYLIST, "not a video"),
        (b"ffconcat version 1.0\nfile other.mp4\n", "not a video"),
    ],
)
def test_what_is_no_video_is_one_line(tmp_path, content, message):
    """Playlists, too, which name other files to be opened."""
    Video(FRAMES).save(tmp_path / "other.mp4")
    (tmp_path / "a.mp4").write_bytes(content)
    found = refusal(Video.read, tmp_path / "a.mp4")
    assert message in found and "a.mp4" in found


def test_missing_files_and_files_of_sound_alone(tmp_path):
    assert "no such file" in refusal(Video.read, tmp_path / "a.mp4", kind=UsageError)
    assert "folder" in refusal(Video.read, tmp_path, kind=UsageError)
    videos.write(tmp_path / "a.mp4", FRAMES, None, sound=True)
    assert "holds no video, only sound" in refusal(Video.read, tmp_path / "a.mp4")
    videos.write(tmp_path / "b.mp4", FRAMES, [0, 0.1], codec="libx264", pixels="yuv420p", sound=True)
    assert len(Video.read(tmp_path / "b.mp4").frames) == 2
    videos.write(tmp_path / "c.avi", FRAMES, [], codec="mpeg4", pixels="yuv420p", ticks=10)
    assert "holds no frames" in refusal(Video.read, tmp_path / "c.avi")


@pytest.mark.parametrize("sampling", [{}, {"fps": 1}, {"count": 3}])
def test_absurd_times_are_refused(tmp_path, sampling):
    videos.write(tmp_path / "a.mkv", FRAMES, [0, 1, 1e9])
    assert "lasts 1000000000 s" in refusal(Video.read, tmp_path / "a.mkv", **sampling)


def test_times_that_do_not_rise_are_refused(tmp_path):
    """Matroska's simple blocks have a time of their own each, which is wrong here; there are no checksums."""
    Video.at_rate(FRAMES[:3], 10).save(tmp_path / "a.mkv")
    content = (tmp_path / "a.mkv").read_bytes().replace(b"\xbf\x84", b"\xec\x84")  # padding
    assert content.count(b"\x81\x00\x64") == 1  # track 1, 100 ms
    (tmp_path / "b.mkv").write_bytes(content.replace(b"\x81\x00\x64", b"\x81\x00\x00"))
    assert "do not rise" in refusal(Video.read, tmp_path / "b.mkv")


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [
        ("MAX_FRAME_PIXELS", 3071, "no size, or one above 0 million pixels"),
        ("MAX_FRAMES", 9, "more than 9"),
        ("MAX_BYTES", FRAMES.nbytes - 1, "take fewer"),
    ],
)
def test_limits_hold_before_anything_is_decoded(steady, monkeypatch, limit, value, message):
    monkeypatch.setattr(video_files, "_decoded", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr(video_files, limit, value)
    assert message in refusal(Video.read, steady)


@pytest.mark.parametrize(("sampling", "frames"), [({}, 10), ({"fps": 60}, 19), ({"count": 5}, 5)])
def test_a_caller_may_take_only_so_many_frames(steady, monkeypatch, sampling, frames):
    """More are refused before any is decoded, by both numbers."""
    assert len(Video.read(steady, max_frames=frames, **sampling).frames) == frames
    monkeypatch.setattr(video_files, "_decoded", lambda *_: pytest.fail("decoded"))
    message = refusal(Video.read, steady, max_frames=frames - 1, **sampling)
    assert message == f"{steady}: {frames} frames, of which at most {frames - 1} can be taken; cut the video"


def test_read_part_takes_only_so_many_frames(steady, tmp_path):
    assert len(read_part(steady, 15, max_frames=5).frames) == 5
    assert "5 frames, of which at most 4" in refusal(read_part, steady, 15, max_frames=4)
    Image(FRAMES[0]).save(tmp_path / "a.png")
    assert isinstance(read_part(tmp_path / "a.png", max_frames=1), Image)
    for wrong in (0, 2.5, "3"):
        assert "max_frames" in refusal(Video.read, steady, max_frames=wrong, kind=UsageError)


def test_packets_of_several_frames_are_counted_when_they_are_decoded(monkeypatch):
    """More frames than packets, all of which are held; the limits hold here, too."""
    shown = [(i / 10, Pixel(i)) for i in range(30)]
    pixels, times = video_files._all(shown, 4, 30, "a.avi")
    assert pixels[:, 0, 0, 0].tolist() == list(range(30)) and len(times) == 30
    for most in range(4, 30):
        assert f"at most {most} " in refusal(video_files._all, shown, 4, most, "a.avi")
    monkeypatch.setattr(video_files, "MAX_BYTES", 89)
    assert "take fewer" in refusal(video_files._all, shown, 4, None, "a.avi")


def test_frames_larger_than_the_header_says_are_refused(tmp_path, monkeypatch):
    """The header of the container is damaged to 8 x 48 pixels, the stream of H.264 has 264 x 48."""
    wide = np.pad(FRAMES, ((0, 0), (0, 0), (0, 200), (0, 0)))
    videos.write(tmp_path / "a.mkv", wide, [0, 0.1], codec="libx264", pixels="yuv420p")
    content = (tmp_path / "a.mkv").read_bytes()
    assert content.count(b"\xb0\x82\x01\x08") == 1  # PixelWidth
    (tmp_path / "b.mkv").write_bytes(content.replace(b"\xb0\x82\x01\x08", b"\xb0\x82\x00\x08"))
    monkeypatch.setattr(video_files, "MAX_FRAME_PIXELS", 48 * 64)
    assert "b.mkv" in refusal(Video.read, tmp_path / "b.mkv")


def test_a_stream_of_unknown_size_is_read(tmp_path):
    """Programs that write to a pipe do not know how long a Matroska file will be."""
    Video(FRAMES).save(tmp_path / "a.mkv")
    content = (tmp_path / "a.mkv").read_bytes()
    at = content.index(b"\x18\x53\x80\x67") + 4
    assert content[at] == 1  # a size of eight bytes
    (tmp_path / "a.mkv").write_bytes(content[:at] + b"\x01" + b"\xff" * 7 + content[at + 8 :])
    assert indices(Video.read(tmp_path / "a.mkv")) == list(range(10))


def test_fewer_frames_fit_where_all_do_not(steady, monkeypatch):
    monkeypatch.setattr(video_files, "MAX_BYTES", FRAMES.nbytes // 2)
    assert len(Video.read(steady, count=5).frames) == 5
    assert "take fewer" in refusal(Video.read, steady, fps=20)
    monkeypatch.setattr(media, "MAX_SECONDS", 0.2)
    assert "more than 0" in refusal(Video.read, steady, count=2)


def test_damage_in_our_lossless_files_is_refused(tmp_path):
    """All of it: what Matroska holds has checksums, which FFmpeg writes but does not compare."""
    Video.at_rate(FRAMES, 30).save(tmp_path / "a.mkv")
    content = (tmp_path / "a.mkv").read_bytes()
    for seed in range(24):
        rng = np.random.default_rng(seed)
        start, length = int(rng.integers(100, len(content) - 50)), int(rng.choice([1, 40]))
        flipped = bytes(byte ^ int(rng.integers(1, 256)) for byte in content[start : start + length])
        (tmp_path / "b.mkv").write_bytes(content[:start] + flipped + content[start + length :])
        message = refusal(Video.read, tmp_path / "b.mkv", fps=10)
        assert "b.mkv" in message and "damaged" in message


@pytest.mark.parametrize(
    ("name", "codec", "least"), [("a.mp4", "mpeg4", 20), ("a.avi", "mjpeg", 10), ("a.mov", "libx264", 0)]
)
def test_damage_in_files_with_loss_is_one_line_or_concealed(tmp_path, name, codec, least):
    """Of 24 bursts of damage to frames the decoder notices some, at least so many; the rest give a video."""
    pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    videos.write(tmp_path / name, LONG, list(np.arange(24) / 30), codec=codec, pixels=pixels, ticks=30)
    assert len(Video.read(tmp_path / name).frames) == 24
    content, refused = (tmp_path / name).read_bytes(), 0
    marks = (b"movi", b"idx1") if codec == "mjpeg" else (b"mdat", b"moov")
    for seed in range(24):
        rng = np.random.default_rng(seed)
        start = int(rng.integers(content.index(marks[0]) + 30, content.index(marks[1]) - 80))
        (tmp_path / f"b-{name}").write_bytes(content[:start] + rng.bytes(64) + content[start + 64 :])
        try:
            assert Video.read(tmp_path / f"b-{name}").frames.size
        except OmniError as error:
            assert f"b-{name}" in str(error) and "\n" not in str(error)
            refused += 1
    assert refused >= least
