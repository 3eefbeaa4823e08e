"""The model that comes with the package: whole, small enough, and the one that its figures were measured on."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

import omni
from omni.bundle import MODELS
from omni.cli import main
from omni.evaluate.cells import model_hash

DIGITS = Path(MODELS) / "digits"


@pytest.fixture(scope="module")
def model():
    return omni.load("digits")


def test_its_figures_belong_to_its_files():
    """made.json names the hash of every other file, and all of them take at most 4.5 MB."""
    made = json.loads((DIGITS / "made.json").read_text())
    files = {str(p.relative_to(DIGITS)): p for p in DIGITS.rglob("*") if p.is_file() and p.name != "made.json"}
    assert {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()} == made["sha256"]
    assert sum(path.stat().st_size for path in files.values()) <= 4_500_000
    assert made["results"]["limit"] is None and made["results"]["matrix"]["audio"]["image"]["n"] >= 1000


def test_its_figures_are_of_this_engine(model):
    """They were measured on these weights, and by the engine that users get."""
    signature = json.loads((DIGITS / "made.json").read_text())["results"]["signature"].split("|")
    assert f"model:{model_hash(model)}" in signature and f"engine:{model.engine.version}" in signature


def test_it_answers_by_name(tmp_path, monkeypatch, capsys):
    """`omni generate digits "seven"` gives a picture and a sound from any directory."""
    monkeypatch.chdir(tmp_path)
    main(["generate", "digits", "seven", "--want", "image,audio", "--out", "out"])
    assert sorted(os.listdir(tmp_path / "out")) == ["1.png", "2.wav", "reply.json"]
    assert "wrote out/1.png" in capsys.readouterr().out


@pytest.mark.slow
def test_it_says_again_what_it_drew(model):
    """Words go to pictures and sounds and come back: most of the ten digits survive, whatever the seed."""
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    for modality in ("image", "audio"):
        drawn = model.generate_batch([omni.Request([word], [modality], seed=i) for i, word in enumerate(words)])
        read = model.generate_batch([omni.Request(reply.parts, ["text"]) for reply in drawn])
        assert np.mean([reply.text == word for reply, word in zip(read, words, strict=True)]) >= 0.8


def test_prompt_and_reply_hold_all_three_modalities(model):
    """One prompt with text, picture and sound together, one reply with all three."""
    three = model.generate(["three"], want=["image", "audio"])
    reply = model.generate(["this is three:", *three.parts], want=["text", "image", "audio"])
    assert [part.modality for part in reply.parts] == ["text", "image", "audio"] and reply.well_formed
    assert reply.text == "three"
