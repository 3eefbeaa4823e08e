"""`omni bench streams`: steps are what is timed, and what is printed is what was found."""

import json

import pytest

from omni.bench import streams
from omni.bench.streams import STREAMS, Streamed, as_markdown
from omni_tokenizers.audio import AudioTokenizer, AudioTokenizerConfig


def test_each_step_is_timed(run, monkeypatch):
    """From the command line to the JSON, with the smallest of codecs: both ways, as many steps as the time has, each
    as long as its samples last; the clock starts when a piece gives a step's codes and sound."""
    tiny = AudioTokenizerConfig(*(2400, 8, 16, 8, 12, 1, 1), codebook_size=16, code_dim=4, codebooks=2, causal=True)
    monkeypatch.setitem(STREAMS, "spectral", Streamed("tiny", AudioTokenizer, tiny, 5, 2400))
    made = []
    push = streams.AudioTokenizer.stream

    def stream(self, rows, *, frames):
        encoder, decoder = push(self, rows, frames=frames)
        for half in (encoder, decoder):
            original = half.push
            half.push = lambda pieces, original=original: made.append(original(pieces)) or made[-1]
        return encoder, decoder

    monkeypatch.setattr(AudioTokenizer, "stream", stream)
    code, out, _ = run("bench", "streams", "--families", "spectral", "--rows", "2", "--seconds", "1", "--json")
    assert code == 0
    results = json.loads(out)
    for cell, verb in zip(results["cells"], ("encode", "decode"), strict=True):
        assert (cell["verb"], cell["seconds"], cell["steps"]) == (verb, pytest.approx(80 / 2400), 30)
        assert 0 < cell["median"] <= cell["slow"] and cell["share"] == pytest.approx(cell["median"] * 2400 / 80)
    assert {each[0].shape for each in made[2 * streams._UNTIMED :]} == {(2, 5), (1, 80)}
    row = results["cells"][0]
    assert f"| tiny | encode | 33.3 | {1000 * row['median']:.1f} |" in as_markdown(results)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--families", "dac"], "unknown stream 'dac'; known are encodec, mimi, spectral, video"),
        (["--rows", "0"], "rows is at least 1"),
        (["--seconds", "nan"], "seconds 1 to 3600"),
    ],
)
def test_wrong_arguments_are_refused(run, settings, message):
    code, _, error = run("bench", "streams", *settings)
    assert code == 2 and message in error
