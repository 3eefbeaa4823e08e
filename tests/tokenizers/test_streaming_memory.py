"""Sixty seconds as a stream: memory stays, nothing is compiled again, codes and sound are those of the whole."""

import gc
from pathlib import Path

import jax
import numpy as np
import pytest
import streaming_cases

SECONDS = 60
STATUS = Path("/proc/self/statm")
CASES = ["spectral", *(pytest.param(name, marks=pytest.mark.slow) for name in ("encodec", "mimi"))]
FRAMES = {"encodec": 8, "mimi": 1, "spectral": 5}
"""What a step takes."""


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    return int(STATUS.read_text().split()[1]) * 4096 if STATUS.exists() else 0


def arrays() -> int:
    """Bytes of all arrays of JAX."""
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())


class Compilations:
    """Counts what is compiled."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self.listen)

    def listen(self, event: str, duration: float, **_):
        self.count += event == "/jax/core/compile/backend_compile_duration"


COMPILATIONS = Compilations()


@pytest.mark.parametrize("name", CASES)
def test_sixty_seconds_in_the_memory_of_thirty(name, capsys):
    """Arrays and the process are as large at the end as halfway, no step is compiled later than that, and codes and
    sound (within 1e-4) are those of the whole clip.

    The process's allocator takes some 10 MB in the first 20 s of a large codec, and then no more in 300 s.
    """
    tokenizer = streaming_cases.random_tokenizer(streaming_cases.RELEASED[name])
    step, second = tokenizer.samples_per_frame, tokenizer.sample_rate
    audio = streaming_cases.noise(SECONDS * second + 77)
    frames = -(-audio.shape[1] // step)
    ids, sound = np.full((tokenizer.codebooks, frames), 1, np.int32), np.full((1, frames * step), 1, np.float32)
    encoder, decoder = tokenizer.stream(frames=FRAMES[name])
    coded = heard = 0
    for start in range(0, audio.shape[1], second // 5):
        last = start + second // 5 >= audio.shape[1]
        codes = encoder.push([audio[:, start : start + second // 5]])[0]
        codes = np.concatenate([codes, encoder.finish()], 1) if last else codes
        again = decoder.push([codes])[0]
        again = np.concatenate([again, decoder.finish()], 1) if last else again
        ids[:, coded : coded + codes.shape[1]], sound[:, heard : heard + again.shape[1]] = codes, again
        coded, heard = coded + codes.shape[1], heard + again.shape[1]
        if start == SECONDS // 2 * second:
            early = arrays(), resident(), COMPILATIONS.count
    late = arrays(), resident(), COMPILATIONS.count
    with capsys.disabled():
        print(f"\n{name}: arrays {early[0]} then {late[0]} bytes, process {early[1]} then {late[1]}")
    assert late[0] == early[0]
    assert late[1] - early[1] < 1 << 22
    assert late[2] == early[2]

    assert (coded, heard) == (frames, frames * step)
    whole = tokenizer.encode(audio[None]).ids[0]
    difference = np.abs(sound - tokenizer.decode(ids[None])[0]).max() / np.sqrt(np.square(sound).mean())
    with capsys.disabled():
        print(f"{(ids != whole).sum()} of {ids.size} codes differ; sound by {difference:.1e} of its level")
    assert difference < 1e-4
    assert np.array_equal(ids, whole)
