"""Streams of video equal the whole: any pieces, rows that begin and end when they like, memory that stays, refusals."""

import dataclasses
import gc
import tracemalloc

import jax
import numpy as np
import pytest
import streaming_cases
import video_cases
from flax import nnx
from hypothesis import given, settings
from streaming_cases import ROWS

from omni_tokenizers.carried import Carried
from omni_tokenizers.emu3 import Emu3Tokenizer
from omni_tokenizers.errors import OmniError, UsageError
from omni_tokenizers.quantizers import FSQConfig
from omni_tokenizers.video import VideoTokenizerConfig

MOST = 14
"""Frames of a video, or of codes, at the most."""
FRAMES = {"one stage": 1, "two stages": 2, "every frame": 3, "emu3": 2}
"""What a step takes."""
CASES = [pytest.param(name, marks=[] if name == "one stage" else pytest.mark.slow, id=name) for name in FRAMES]
THOROUGH = settings(max_examples=25, derandomize=True)
EVENTS = streaming_cases.events([0, 0, 1, 2, 3, 5, 9])


@pytest.mark.parametrize("name", CASES)
@given(EVENTS)
@THOROUGH
def test_encoding_equals_the_whole_for_any_pieces(name, events):
    """Codes of a row's pieces are those of its video: from the first frame to the last, whose codes may be begun."""
    tokenizer = video_cases.tokenizer(name)
    encoder = tokenizer.stream(ROWS, frames=FRAMES[name]).encoder

    def source(seed):
        return video_cases.videos(MOST, seed=seed)[0]

    for video, codes in streaming_cases.streamed(encoder, source, events, MOST, axis=0):
        assert codes.dtype == np.int32 and codes.shape[1:] == tokenizer.grid
        if len(video):
            np.testing.assert_array_equal(codes, tokenizer.encode(video[None]).ids[0])
        else:
            assert not len(codes)


@pytest.mark.parametrize("name", CASES)
@given(EVENTS)
@THOROUGH
def test_decoding_equals_the_whole_for_any_pieces(name, events):
    """Frames of a row's pieces are those of its codes, to within a level."""
    tokenizer = video_cases.tokenizer(name)
    decoder = tokenizer.stream(ROWS, frames=FRAMES[name]).decoder

    def source(seed):
        return np.random.default_rng(seed).integers(0, 125, (MOST, 2, 2)).astype(np.int32)

    for codes, video in streaming_cases.streamed(decoder, source, events, MOST, axis=0):
        assert video.dtype == np.uint8 and video.shape[1:] == (8, 8, 3)
        if len(codes):
            whole = tokenizer.decode(codes[None])[0]
            assert len(video) == len(whole) and np.abs(video.astype(int) - whole).max() <= 1
        else:
            assert not len(video)


@pytest.mark.slow
def test_emu3_is_no_constant():
    """The one of these tests, or none of them would show anything."""
    codes = video_cases.tokenizer("emu3").encode(video_cases.videos(32, 2, seed=5))
    assert len(np.unique(codes.ids)) > 20 and video_cases.tokenizer("emu3").decode(codes).std() > 10


def test_codes_and_frames_come_as_soon_as_they_can():
    """The first frame's codes with it, all others with the last of their four frames; all frames of codes at once."""
    encoder, decoder = video_cases.tokenizer().stream()
    video = video_cases.videos(9)[0]
    codes = [encoder.push([frame[None]])[0] for frame in video]
    assert [len(each) for each in codes] == [1, 0, 0, 0, 1, 0, 0, 0, 1]
    assert [len(decoder.push([each])[0]) for each in codes] == [1, 0, 0, 0, 4, 0, 0, 0, 4]
    assert len(encoder.finish()) == len(decoder.finish()) == decoder.delay == 0


def test_streams_leave_the_tokenizer_as_it_is():
    """Weights are shared, nothing is carried outside of a stream, and streams of one shape share what is compiled."""
    tokenizer = video_cases.random_tokenizer(video_cases.CONFIGS["one stage"])
    for _ in range(2):
        tokenizer.stream().encoder.push([video_cases.videos(5)[0]])
    assert not jax.tree.leaves(nnx.filter_state(tokenizer.state, Carried))
    step = tokenizer.step("encode", 1)
    assert step.run._cache_size() == 1
    shared = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tokenizer.state)}
    assert {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(step.weights)} <= shared


@pytest.mark.parametrize(
    ("half", "piece", "message"),
    [
        ("encoder", np.zeros((8, 8, 3), np.uint8), r"row 1: a piece must be \[time, height, width, 3\]"),
        ("encoder", np.zeros((2, 8, 8, 3), np.float32), "row 1: .*uint8"),
        ("encoder", np.zeros((2, 8, 9, 3), np.uint8), "row 1: .*resize"),
        ("decoder", np.zeros((2, 2), np.int32), r"row 1: codes must be \[frames, rows, columns\]"),
        ("decoder", np.full((1, 2, 2), 125), "row 1: code 125 is outside"),
        ("decoder", np.zeros((1, 3, 2), int), "row 1: .*2, 2"),
    ],
)
def test_bad_pieces_are_refused_whole(half, piece, message):
    """The row is named, and no row took anything: the stream goes on as if nothing had been pushed."""
    stream, clean = (getattr(video_cases.tokenizer().stream(2), half) for _ in range(2))
    good = video_cases.videos(3)[0] if half == "encoder" else np.ones((2, 2, 2), np.int32)
    with pytest.raises(OmniError, match=message):
        stream.push([good, piece])
    for ours, theirs in zip(stream.push([good, None]), clean.push([good, None]), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_streams_that_cannot_be_are_refused():
    """Of no rows, as for sound; of frames that have no whole number of codes."""
    with pytest.raises(UsageError, match="at least 1 row"):
        video_cases.tokenizer().stream(0)
    config = dataclasses.replace(video_cases.EMU3, image_size=9)
    tokenizer = streaming_cases.made(Emu3Tokenizer, config, lambda _, x: np.zeros(x.shape, x.dtype))
    with pytest.raises(UsageError, match="image_size, which is 9 and no multiple of 4"):
        tokenizer.stream()


def sizes() -> dict[str, int]:
    """Bytes of JAX's arrays and of what Python and NumPy hold."""
    gc.collect()
    return {"arrays": sum(x.nbytes for x in jax.live_arrays()), "python": tracemalloc.get_traced_memory()[0]}


LONG = {
    "video": (VideoTokenizerConfig(64, 8, 4, 32, (1,), 1, FSQConfig((8, 8, 8))), 149, 301),
    "emu3": (dataclasses.replace(video_cases.EMU3, image_size=32), 148, 300),
}
"""Configuration, and frames of half a video and of a whole one."""


@pytest.mark.slow
@pytest.mark.parametrize(("config", "half", "whole"), LONG.values(), ids=LONG)
def test_three_hundred_frames_in_the_memory_of_half(config, half, whole, capsys, monkeypatch):
    """As a stream, arrays and Python's memory are as large after 300 frames as after 150. Both give what the whole
    gives, for which `video` takes as much beside its frames and codes (Emu3's does not go in steps).

    A step of a whole video has 16 frames, 0.2 MB or less, here: an input or two of steps before may still be held, all
    of them would be much more.
    """
    size = config.image_size
    monkeypatch.setattr("omni_tokenizers.video_streaming.PIXELS", 16 * size * size)
    tokenizer = video_cases.random_tokenizer(config)
    video = video_cases.videos(whole, size=size)
    encoder, decoder = tokenizer.stream(frames=2)
    side = size // config.downsampling
    ids, pixels, coded, shown = np.ones((1, 76, side, side), np.int32), np.ones_like(video), 0, 0
    tracemalloc.start()
    for start in range(0, whole, 7):
        codes = encoder.push([video[0, start : start + 7]])[0]
        again = decoder.push([codes])[0]
        ids[0, coded : coded + len(codes)], pixels[0, shown : shown + len(again)] = codes, again
        coded, shown = coded + len(codes), shown + len(again)
        if start == 147:
            early = sizes()
    late = sizes()
    peaks, _ = {}, tokenizer.decode(tokenizer.encode(video[:, :half]))  # compiles
    for time in (half, whole):
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        codes = tokenizer.encode(video[:, :time])
        encoded = tracemalloc.get_traced_memory()[1] - before - codes.ids.nbytes
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        decoded = tokenizer.decode(codes)
        peaks[time] = {"encode": encoded, "decode": tracemalloc.get_traced_memory()[1] - before - decoded.nbytes}
    tracemalloc.stop()
    with capsys.disabled():
        print(f"\nat 154 frames {early}, at {whole} {late}; whole, beside frames and codes: {peaks}")
    assert late["arrays"] == early["arrays"] and late["python"] - early["python"] < 1 << 16
    if config is LONG["video"][0]:
        assert all(peaks[whole][name] - peaks[half][name] < 1 << 19 for name in ("encode", "decode"))
    rest = encoder.finish()
    more = np.concatenate([decoder.push([rest])[0], decoder.finish()])
    assert (coded + len(rest), shown + len(more)) == (codes.ids.shape[1], whole)
    np.testing.assert_array_equal(ids[:, :coded], codes.ids[:, :coded])
    assert np.abs(pixels[:, :shown].astype(int) - decoded[:, :shown]).max() <= 1
