"""`omni bench tokenizers`: its arguments, its judgement of results, its table, and a tiny comparison end to end."""

import importlib
import json
import os
import signal
import time

import numpy as np
import pytest

from omni.bench import tokenizers
from omni.bench.families import FAMILIES, Family
from omni.bench.processes import Remote
from omni.bench.report import as_markdown, check_agreement, describe_machine
from omni.bench.tokenizers import Options, difference, example
from omni.cli import main
from omni_tokenizers.errors import OmniError, UsageError

MACHINE = {
    "date": "2026-01-02",
    "processor": "Abacus",
    "cores": 2,
    "python": "3.11.0",
    "sides": {
        "ours": {"backend": "cpu", "device": "cpu", "precision": "float32", "versions": {"jax": "0.10"}},
        "torch": {"backend": "cpu", "device": "cpu", "precision": "float32, TF32 off", "versions": {"torch": "2.13"}},
    },
}


def timed(median: float, first: float) -> dict:
    turns = [0.9 * median, median, 1.5 * median]
    return {"median": median, "turns": turns, "work": [2 * turn for turn in turns], "first": first}


def results(**cell) -> dict:
    whole = {"tokenizer": "Mimi", "verb": "encode", "batch": 8, "input": [8, 1, 24000]}
    whole |= {"ours": timed(0.2, 3.2), "torch": timed(0.3, 0.4), "ratio": 1.5, "difference": 0.0, "agrees": True}
    return {"machine": MACHINE, "options": {"seconds": 1.0, "rounds": 3}, "cells": [whole | cell]}


def test_the_table_says_what_was_measured_and_on_what():
    text = as_markdown(results())
    assert "| Mimi | encode | 8 | 200 (180 to 300) | 300 (270 to 450) | 1.50 | 1.50 | 3.0 |" in text
    assert "2026-01-02, Abacus, 2 cores" in text and "torch 2.13" in text and "TF32 off" in text
    assert "| 12.0 (10.8 to 18.0) |" in as_markdown(results(ours=timed(0.012, 1)))


def test_what_differs_is_marked_and_refused():
    check_agreement(results())
    wrong = results(agrees=False)
    assert "results differ" in as_markdown(wrong)
    with pytest.raises(OmniError, match="Mimi encode 8"):
        check_agreement(wrong)


def test_without_torch_only_ours_is_in_the_table():
    alone = results()
    for key in ("torch", "ratio", "difference", "agrees"):
        del alone["cells"][0][key]
    del alone["machine"]["sides"]["torch"]
    assert "| 200 (180 to 300) |  |  |  |" in as_markdown(alone)
    check_agreement(alone)


def agrees(ours, theirs, **kind) -> bool:
    error, limit = difference(np.asarray(ours), np.asarray(theirs), **kind)
    return error <= limit


def test_results_agree_up_to_ties_and_rounding():
    """A frame with a tie differs in many of its codes, so frames count; 1 of 20 may be one, and 2 may not."""
    codes = np.zeros((1, 8, 40), np.int32)
    one, many = codes.copy(), codes.copy()
    one[:, 3:, :2] = 1
    many[:, 3:, :3] = 1
    assert agrees(codes, one, is_sound=True) and not agrees(codes, many, is_sound=True)
    assert not agrees(codes, codes[..., :39], is_sound=True)
    sound = np.linspace(-2, 2, 50, dtype=np.float32)
    assert agrees(sound + np.float32(1e-4), sound, is_sound=True)
    assert not agrees(sound + np.float32(1e-3), sound, is_sound=True)
    pixels = np.full((1, 4, 4, 3), 254, np.uint8)
    assert agrees(pixels + np.uint8(1), pixels, is_sound=False) and not agrees(pixels - 2, pixels, is_sound=False)


def test_inputs_have_the_shapes_that_a_tokenizer_takes():
    sound = {"sample_rate": 2000, "channels": 2, "codebooks": 3, "samples_per_frame": 300, "codebook_size": 7}
    assert example("encode", sound, 4, 0.5).shape == (4, 2, 1000)
    codes = example("decode", sound, 4, 0.5)
    assert codes.shape == (4, 3, 4) and codes.min() == 0 and codes.max() == 6
    picture = {"downsampling": 16, "codebook_size": 9}
    assert example("encode", picture, 2, 1).shape == (2, 256, 256, 3)
    assert example("decode", picture, 2, 1).shape == (2, 16, 16)


def test_a_failure_elsewhere_is_one_line_here():
    with Remote("ours", list, "ab") as remote:
        assert remote.call("pop") == "b"
        with pytest.raises(OmniError, match=r"^ours: IndexError: pop index out of range$"):
            remote.call("pop", 7)
        assert remote.call("pop") == "a"  # it goes on
    with Remote("ours", importlib.import_module, "os") as remote, pytest.raises(OmniError, match="exit 3"):
        remote.call("_exit", 3)
    with Remote("ours", importlib.import_module, "os") as remote:
        os.kill(remote.call("getpid"), signal.SIGKILL)  # between two calls, as where memory ran short
        while remote._process.is_alive():
            time.sleep(0.01)
        with pytest.raises(OmniError, match="exit -9"):
            remote.call("getpid")
    with pytest.raises(OmniError, match="ours: ModuleNotFoundError"):
        Remote("ours", importlib.import_module, "no_such_module")


def test_sides_on_different_devices_are_no_comparison():
    class Named:
        def __init__(self, name: str, backend: str):
            self.name, self.backend = name, backend

        def call(self, _):
            return {"backend": self.backend}

    with pytest.raises(UsageError, match="torch runs on gpu"):
        describe_machine([Named("ours", "cpu"), Named("torch", "gpu")])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--families", "mini"], "unknown tokenizer 'mini'"),
        (["--batch", "one"], "write whole numbers"),
        (["--batch", "0"], "at least 1"),
        (["--rounds", "0"], "at least 1"),
        (["--seconds", "nan"], "0.1 to 600"),
    ],
)
def test_wrong_arguments_are_refused(capsys, settings, message):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "tokenizers", *settings])
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_ours_alone_where_there_is_no_torch(monkeypatch, capsys):
    """From the command line to the JSON, with the smallest of tokenizers."""
    tiny = {"filters": 4, "decoder_filters": 32, "strides": (2, 3), "codebooks": 2, "sample_rate": 2400}
    monkeypatch.setitem(FAMILIES, "dac", Family("DAC", "DacModel", FAMILIES["dac"].tokenizer, ours=tiny))
    monkeypatch.setattr(tokenizers, "_has_torch", lambda: False)
    main(["bench", "tokenizers", "--families", "dac", "--batch", "2", "--rounds", "2", "--device", "cpu", "--json"])
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert [cell["verb"] for cell in cells] == ["encode", "decode"]
    assert all(len(cell["ours"]["turns"]) == 2 and min(cell["ours"]["work"]) > 0 for cell in cells)
    assert all("torch" not in cell for cell in cells)


@pytest.mark.parity
@pytest.mark.parametrize("name", FAMILIES)
def test_ours_and_theirs_agree_on_a_tiny_one(name, monkeypatch):
    """Both sides compute the same of the same weights, in every cell, and of more than one code."""
    pytest.importorskip("transformers", reason="needs transformers: pip install 'omni-any-to-any[parity]'")
    sound = {"sampling_rate": 2400, "codebook_size": 16}
    seanet = sound | {"upsampling_ratios": [4, 3], "num_filters": 4, "hidden_size": 16}
    picture = {"base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1, "num_embeddings": 32}
    settings = {
        "encodec": seanet | {"target_bandwidths": [0.8, 1.6]},
        "mimi": seanet
        | {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "codebook_dim": 8}
        | {"vector_quantization_hidden_dimension": 8, "upsample_groups": 16, "num_quantizers": 3},
        "dac": sound | {"downsampling_ratios": [2, 4], "encoder_hidden_size": 4, "decoder_hidden_size": 32},
        "chameleon": picture | {"resolution": 32},
        "janus": picture | {"num_patches": 16},
    }
    family = FAMILIES[name]
    tiny = Family(family.title, family.model, family.tokenizer, family.verbs, theirs=settings[name])
    monkeypatch.setitem(FAMILIES, name, tiny)
    monkeypatch.setattr(tokenizers, "PICTURE", 32)
    found = tokenizers.compare(Options((name,), (2,), seconds=0.5, rounds=1, device="cpu"))
    check_agreement(found)
    assert [cell["verb"] for cell in found["cells"]] == list(family.verbs)
    assert all(cell["ratio"] > 0 for cell in found["cells"])
