"""A stream equals the whole: any chunks, rows that begin and end when they like, memory that stays, refusals.

The check is independent of how streams work: it only cuts sound and codes, and compares with `encode` and `decode`.
"""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
import streaming_cases
from flax import nnx
from hypothesis import given, settings
from streaming_cases import ENCODEC, ROWS

from omni_tokenizers.audio import AudioTokenizer, AudioTokenizerConfig
from omni_tokenizers.carried import Carried
from omni_tokenizers.codes import Codes
from omni_tokenizers.dac import DacConfig, DacTokenizer
from omni_tokenizers.encodec import EncodecConfig, EncodecTokenizer
from omni_tokenizers.errors import OmniError, UsageError
from omni_tokenizers.image import ImageTokenizer, ImageTokenizerConfig

PAGE = Path(__file__).parents[2] / "docs" / "tokenizers.md"
MOST = 24
"""Frames of a sound at the most."""
QUICK = ("spectral six hops",)
SETTINGS = {"encodec": {"codebooks": 2}, "encodec replicate": {"frames": 2}, "spectral": {"frames": 3}}
CASES = [
    pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow, id=name) for name in streaming_cases.CONFIGS
]

EVENTS = streaming_cases.events([0, 0, 1, 2, 5, 13, 40])
THOROUGH = settings(max_examples=25, derandomize=True)


def padded(x: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """A batch of `x`, padded to `most` so that one shape compiles, and its length."""
    return np.pad(x, ((0, 0), (0, most - x.shape[1])))[None], np.array([x.shape[1]], np.int32)


@pytest.mark.parametrize("name", CASES)
@given(EVENTS)
@THOROUGH
def test_encoding_equals_the_whole_for_any_pieces(name, events):
    """Codes of a row's pieces are those of its sound: to the last frame, which may be a part, and to the first ones."""
    tokenizer = streaming_cases.tokenizer(name)
    most, encoder = (
        MOST * tokenizer.samples_per_frame,
        tokenizer.stream(ROWS, **SETTINGS.get(name, {})).encoder,
    )
    done = streaming_cases.streamed(encoder, lambda seed: streaming_cases.noise(most, seed), events, most)
    assert all(codes.dtype == np.int32 for _, codes in done)
    assert all(not codes.size for sound, codes in done if not sound.size)
    for sound, codes in done:
        if sound.size:
            audio, lengths = padded(sound, most)
            frames = -(-sound.shape[1] // tokenizer.samples_per_frame)
            whole = tokenizer.encode(audio, lengths).ids[0, : len(codes), :frames]
            np.testing.assert_array_equal(codes, whole)


@pytest.mark.parametrize("name", CASES)
@given(EVENTS)
@THOROUGH
def test_decoding_equals_the_whole_for_any_pieces(name, events):
    """Sound of a row's pieces is that of its codes, whole frames of it, within 1e-4."""
    tokenizer = streaming_cases.tokenizer(name)
    decoder = tokenizer.stream(ROWS, **SETTINGS.get(name, {})).decoder

    def source(seed):
        return np.random.default_rng(seed).integers(0, 16, (decoder.codebooks, MOST)).astype(np.int32)

    for codes, sound in streaming_cases.streamed(decoder, source, events, MOST):
        assert sound.dtype == np.float32
        assert sound.shape == (1, codes.shape[1] * tokenizer.samples_per_frame)
        if codes.size:
            ids, lengths = padded(codes, MOST)
            whole = tokenizer.decode(Codes(ids, lengths * tokenizer.samples_per_frame))[0]
            np.testing.assert_allclose(sound, whole[:, : sound.shape[1]], atol=1e-4)


@pytest.fixture
def codec():
    """The quickest to compile."""
    return streaming_cases.tokenizer("spectral six hops")


def test_reset_forgets_what_a_row_had(codec):
    """A row that is reset in the middle of a sound begins like any other, and its neighbour does not notice."""
    encoder, step = codec.stream(2).encoder, codec.samples_per_frame
    first, other, second = (streaming_cases.noise(9 * step + 3, seed) for seed in range(3))
    outputs = [encoder.push([first, other[:, :50]])[1]]
    encoder.reset(0)
    codes, more = encoder.push([second, other[:, 50:]])
    codes = np.concatenate([codes, encoder.finish(0)], 1)
    outputs += [more, encoder.finish(1)]
    audio = np.stack([second, other])
    np.testing.assert_array_equal([codes, np.concatenate(outputs, 1)], codec.encode(audio).ids)


def test_streams_leave_the_tokenizer_as_it_is(codec):
    """Weights are shared and nothing is carried outside of a stream; streams of one shape share what is compiled."""
    audio = streaming_cases.noise(500)
    before = codec.encode(audio[None]).ids
    for _ in range(2):
        codec.stream().encoder.push([audio])
    assert not jax.tree.leaves(nnx.filter_state(codec.state, Carried))
    np.testing.assert_array_equal(before, codec.encode(audio[None]).ids)
    step = codec.step("encode", 1, codec.codebooks)
    assert step.run._cache_size() == 1
    shared = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(codec.state)}
    assert {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(step.weights)} <= shared


@pytest.mark.parametrize(
    ("half", "pieces", "message"),
    [
        ("encoder", [np.zeros((1, 9), np.float32)], "2 rows"),
        ("encoder", [None, np.zeros(9, np.float32)], r"row 1: sound must be \[channels, samples\]"),
        ("encoder", [None, np.zeros((1, 9), np.int16)], "row 1: .*floating"),
        ("encoder", [np.zeros((1, 9), np.float32), np.full((1, 9), np.nan, np.float32)], "row 1: .*NaN"),
        ("decoder", [None, np.zeros((3, 9), np.int32)], r"row 1: .*2 codebooks, frames.*\[3, 9\]"),
        ("decoder", [np.full((2, 9), 16), None], "row 0: code 16 is outside"),
        ("decoder", [np.full((2, 9), -1), None], "row 0: code -1 is outside"),
        ("decoder", [np.zeros((2, 9), np.float32), None], "row 0: .*integers"),
    ],
)
def test_bad_pieces_are_refused_whole(codec, half, pieces, message):
    """The row is named, and no row took anything: the stream goes on as if nothing had been pushed."""
    stream, clean = (getattr(codec.stream(2), half) for _ in range(2))
    good = [streaming_cases.noise(77), None] if half == "encoder" else [np.ones((2, 9), np.int32), None]
    with pytest.raises(OmniError, match=message):
        stream.push(pieces)
    for ours, theirs in zip(stream.push(good), clean.push(good), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_rows_that_have_ended_take_nothing(codec):
    """Pushing, or finishing twice, says what to do; another row, or none at all, is refused."""
    encoder = codec.stream(2).encoder
    assert encoder.finish(0).shape == (2, 0)
    with pytest.raises(OmniError, match=r"row 0 is finished; reset\(0\)"):
        encoder.push([np.zeros((1, 5), np.float32), None])
    with pytest.raises(OmniError, match="row 0 is finished"):
        encoder.finish(0)
    assert [codes.size for codes in encoder.push([None, streaming_cases.noise(5)])] == [0, 0]
    for row in (2, -1):
        with pytest.raises(OmniError, match="rows 0 to 1"):
            encoder.reset(row)
    with pytest.raises(UsageError, match="at least 1 row"):
        codec.stream(0)
    with pytest.raises(UsageError, match=r"at least 1 frame, got 1 and 0\.5"):
        codec.stream(frames=0.5)
    with pytest.raises(OmniError, match="codebooks"):
        codec.stream(codebooks=1)


def refusing():
    """Tokenizers that cannot stream, and why."""
    image = ImageTokenizerConfig(image_size=8, patch_size=4, channels=8, multipliers=(1,), codebook_size=8, code_dim=4)
    return [
        (ImageTokenizer, image, "image_vq cannot stream"),
        (DacTokenizer, DacConfig(filters=2, decoder_filters=4, strides=(2,)), "what comes after"),
        (EncodecTokenizer, EncodecConfig(**ENCODEC, causal=False), "what comes after"),
        (EncodecTokenizer, EncodecConfig(**ENCODEC, normalize=True, chunk_seconds=1.0), "normalises over"),
        (AudioTokenizer, AudioTokenizerConfig(dim=8), "causal=True can"),
    ]


@pytest.mark.parametrize(("kind", "config", "message"), refusing(), ids=range(5))
def test_what_is_not_causal_says_so(kind, config, message):
    """In one line, which names those that stream."""
    with pytest.raises(OmniError, match=message) as caught:
        streaming_cases.made(kind, config, lambda _, x: np.zeros(x.shape, x.dtype)).stream()
    assert "\n" not in str(caught.value)


def test_the_example_in_the_docs_runs(codec, tmp_path, monkeypatch):
    """What it plays of its first row, to the end, is the whole sound encoded and decoded."""
    codec.save(tmp_path / "mimi")
    monkeypatch.chdir(tmp_path)
    code = re.search(r"## Streaming.*?```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    audio, played = streaming_cases.noise(1000), []
    pieces = [audio[:, :1], None, audio[:, 1:700], audio[:, 700:]]
    exec(code, {"microphone": pieces, "telephone": pieces, "play": lambda sounds: played.append(sounds[0])})
    whole = codec.decode(codec.encode(audio[None]).ids)[0]
    np.testing.assert_allclose(np.concatenate(played, 1), whole, atol=1e-4)
