"""`omni bench data`: both sides are measured, small, and what is printed is what was found."""

import json

import pytest

from omni.bench.data import ReaderOptions, TokenizeOptions, as_text, measure


def test_both_are_measured(tiny_tokenizers, tmp_path, run):
    """Documents of about 1,024 tokens; files beside memory, by a tokenizer that is named; as a line and as JSON."""
    tiny_tokenizers["image"].save(tmp_path / "image")
    found = measure(
        {
            "reader": ReaderOptions(tokens=200_000, row_length=4096, rounds=2),
            "tokenize": TokenizeOptions(str(tmp_path / "image"), pictures=16, batch_size=4, rounds=2),
        }
    )
    reader, side = found["reader"], found["tokenize"]
    assert reader["mean_length"] == pytest.approx(1024, rel=0.1) and len(reader["rounds"]["waited"]) == 2
    assert reader["tokens_per_second"]["work"] > 100_000
    assert len(side["rounds"]["files"]["waited"]) == 2 and 0 < side["share"]["work"] < 1.5 and side["size"] == 8
    assert "million tokens/s on one core" in as_text(found) and "pictures/s from files" in as_text(found)
    code, out, _ = run("bench", "data", "--only", "reader", "--tokens", "110000", "--rounds", "1", "--json")
    assert code == 0 and json.loads(out).keys() == {"machine", "reader"}


def test_what_cannot_be_measured_is_said(run):
    """Too few tokens, or pictures, for a measure."""
    assert run("bench", "data", "--tokens", "5")[0] == 2
    code, _, err = run("bench", "data", "--pictures", "3")
    assert code == 2 and "pictures two batches" in err
