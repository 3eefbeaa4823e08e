"""Sixty seconds as a stream: memory stays, nothing is compiled again, codes and sound are those of the whole."""

import gc
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest
import streaming_cases

SECONDS = 60
STATUS = Path("/proc/self/statm")
FRAMES = {"encodec": 8, "mimi": 5, "spectral": 5}
"""What a step takes."""
TIE = 1e-5
"""Codes may differ where two distances do not, relatively: the two sum in another order."""


class Compilations:
    """Counts what is compiled."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self.listen)

    def listen(self, event: str, duration: float, **_):
        self.count += event == "/jax/core/compile/backend_compile_duration"


COMPILATIONS = Compilations()


def sizes() -> dict[str, int]:
    """Bytes of JAX's arrays, of what Python and NumPy hold, and of the process (0 where the system does not say)."""
    gc.collect()
    return {
        "arrays": sum(x.nbytes for x in jax.live_arrays()),
        "python": tracemalloc.get_traced_memory()[0],
        "process": int(STATUS.read_text().split()[1]) * 4096 if STATUS.exists() else 0,
        "compilations": COMPILATIONS.count,
    }


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("name", FRAMES)
def test_sixty_seconds_in_the_memory_of_thirty(name, capsys):
    """Arrays, Python's memory and the process are as large at the end as halfway, nothing is compiled later than that,
    and codes (but for ties) and sound (within 1e-4) are those of the whole clip.

    The allocator of a large codec's process took 10 MB more at 20 s and at 90 s, and then nothing up to 300 s: such
    steps are left to it.
    """
    tokenizer = streaming_cases.random_tokenizer(streaming_cases.RELEASED[name])
    step, second = tokenizer.samples_per_frame, tokenizer.sample_rate
    # Not the sound that the codes are latents of: after half of 32 levels nothing but rounding is left of that.
    audio = streaming_cases.noise(SECONDS * second + 77, seed=1)
    frames = -(-audio.shape[1] // step)
    ids, sound = np.full((tokenizer.codebooks, frames), 1, np.int32), np.full((1, frames * step), 1, np.float32)
    encoder, decoder = tokenizer.stream(frames=FRAMES[name])
    coded = heard = 0
    tracemalloc.start()
    for start in range(0, audio.shape[1], second // 5):
        last = start + second // 5 >= audio.shape[1]
        codes = encoder.push([audio[:, start : start + second // 5]])[0]
        codes = np.concatenate([codes, encoder.finish()], 1) if last else codes
        again = decoder.push([codes])[0]
        again = np.concatenate([again, decoder.finish()], 1) if last else again
        ids[:, coded : coded + codes.shape[1]], sound[:, heard : heard + again.shape[1]] = codes, again
        coded, heard = coded + codes.shape[1], heard + again.shape[1]
        if start == SECONDS // 2 * second:
            early = sizes()
    late = sizes()
    tracemalloc.stop()
    with capsys.disabled():
        print(f"\n{name}: at {SECONDS // 2} s {early}, at {SECONDS} s {late}")
    assert late["arrays"] == early["arrays"]
    assert late["python"] - early["python"] < 1 << 16
    assert late["process"] - early["process"] < 1 << 24
    assert late["compilations"] == early["compilations"]

    assert (coded, heard) == (frames, frames * step)
    whole = tokenizer.encode(audio[None]).ids[0]
    difference = np.abs(sound - tokenizer.decode(ids[None])[0]).max() / np.sqrt(np.square(sound).mean())
    with capsys.disabled():
        differing = (ids != whole).any(0).sum()
        print(f"codes differ after a tie in {differing} of {frames} frames; sound by {difference:.1e} of its level")
    assert difference < 1e-4
    assert streaming_cases.widest_tie(tokenizer, audio, ids, whole) < TIE
