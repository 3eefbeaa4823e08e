"""A stream equals the whole: any chunks, rows that begin and end when they like, memory that stays, refusals.

The check is independent of how streams work: it only cuts sound and codes, and compares with `encode` and `decode`.
"""

import jax
import numpy as np
import pytest
import streaming_cases
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omni_tokenizers.codes import Codes
from omni_tokenizers.dac import DacConfig, DacTokenizer
from omni_tokenizers.encodec import EncodecConfig, EncodecTokenizer
from omni_tokenizers.errors import OmniError, UsageError
from omni_tokenizers.image import ImageTokenizer, ImageTokenizerConfig

ROWS = 3
MOST = 24
"""Frames of a sound at the most."""
QUICK = ("encodec", "mimi", "spectral six hops")
CASES = [
    pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow, id=name) for name in streaming_cases.CONFIGS
]

# What happens to a stream: each row gets a piece of so many steps of time (a step is a fraction of a frame), or a row
# ends and another sound begins in it.
EVENTS = st.lists(
    st.one_of(st.lists(st.sampled_from([0, 0, 1, 2, 5, 13, 40]), min_size=ROWS, max_size=ROWS), st.integers(0, ROWS - 1)),
    max_size=30,
)
THOROUGH = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def streamed(half, sources, events, most: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Runs events; of each sound that a row had, what was pushed and what came out.

    Args:
        sources: number of a sound -> an array [axes, most] to cut pieces from.
    """
    done, current = [], {}

    def begin(row):
        current[row] = [sources(len(done) + row), 0, []]

    def end(row):
        source, taken, outputs = current[row]
        outputs.append(half.finish(row))
        done.append((source[:, :taken], np.concatenate(outputs, 1)))
        half.reset(row)
        begin(row)

    for row in range(ROWS):
        begin(row)
    for event in [*events, *range(ROWS)]:
        if isinstance(event, int):
            end(event)
            continue
        pieces = []
        for row, size in enumerate(event):
            source, taken, _ = current[row]
            current[row][1] = min(taken + size, most)
            pieces.append(source[:, taken : current[row][1]])
        for row, output in enumerate(half.push(pieces)):
            current[row][2].append(output)
    return done


def batched(pieces: list[np.ndarray], most: int) -> tuple[np.ndarray, np.ndarray]:
    """Pieces in one array padded to `most`, four at a time at the least, so that one shape compiles; and their lengths."""
    lengths = np.array([piece.shape[1] for piece in pieces], np.int32)
    padded = [np.pad(piece, ((0, 0), (0, most - piece.shape[1]))) for piece in pieces]
    return np.stack(padded), lengths


@pytest.mark.parametrize("name", CASES)
@given(EVENTS)
@THOROUGH
def test_encoding_equals_the_whole_for_any_pieces(name, events):
    """Codes of a row's pieces are those of its sound: to the last frame, which may be a part, and to the first ones."""
    tokenizer = streaming_cases.tokenizer(name)
    most = MOST * tokenizer.samples_per_frame
    done = streamed(tokenizer.stream(ROWS).encoder, lambda seed: streaming_cases.noise(most, seed), events, most)
    assert all(codes.dtype == np.int32 for _, codes in done)
    assert all(not codes.size for sound, codes in done if not sound.size)
    for sound, codes in done:
        if sound.size:
            audio, lengths = batched([sound], most)
            whole = tokenizer.encode(audio, lengths).ids[0, :, : -(-sound.shape[1] // tokenizer.samples_per_frame)]
            np.testing.assert_array_equal(codes, whole)


@pytest.mark.parametrize("name", CASES)
@given(EVENTS)
@THOROUGH
def test_decoding_equals_the_whole_for_any_pieces(name, events):
    """Sound of a row's pieces is that of its codes, whole frames of it, within 1e-4."""
    tokenizer = streaming_cases.tokenizer(name)

    def source(seed):
        return np.random.default_rng(seed).integers(0, 16, (tokenizer.codebooks, MOST)).astype(np.int32)

    for codes, sound in streamed(tokenizer.stream(ROWS).decoder, source, events, MOST):
        assert sound.dtype == np.float32
        assert sound.shape == (1, codes.shape[1] * tokenizer.samples_per_frame)
        if codes.size:
            ids, lengths = batched([codes], MOST)
            whole = tokenizer.decode(Codes(ids, lengths * tokenizer.samples_per_frame))[0]
            np.testing.assert_allclose(sound, whole[:, : sound.shape[1]], atol=1e-4)
