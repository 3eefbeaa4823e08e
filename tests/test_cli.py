"""The command line: what it writes, and that bad input gives one clear line and exit 1 or 2, never a traceback."""

import importlib.metadata
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
from chat_templates import LLAMA, write_llama

import omni
from omni import doctor
from omni.parts import read_part
from omni.verbs import read_arguments

EXPERIMENT = str(Path(__file__).parents[1] / "experiments" / "tokenizers" / "photos.py")


def test_generate_writes_a_mixed_reply(run, tiny_bundle, tmp_path, tone):
    soundfile.write(tmp_path / "in.wav", tone, 16000)
    omni.Image(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "in.png")
    code, out, err = run(
        "generate", tiny_bundle, "this is seven:", tmp_path / "in.wav", tmp_path / "in.png",
        "--want", "image,audio,text", "--out", tmp_path / "out", "--json", "--log-probabilities",
        "--min-p", "0.05", "--repetition-penalty", "text=1.2,audio=1.1",
    )  # fmt: skip
    assert code == 0, err
    reply = json.loads(out)
    assert len(reply["ids"]) == len(reply["log_probabilities"]) > 10
    assert [part["modality"] for part in reply["parts"]] == ["image", "audio", "text"] and reply["well_formed"]
    assert sorted(os.listdir(tmp_path / "out")) == ["1.png", "2.wav", "3.txt", "reply.json"]


@pytest.mark.parametrize("template", [LLAMA, None])
def test_generate_asks_as_a_user(run, tmp_path, template):
    """--chat makes a message of the prompt, which a chat template writes; without one it is a document's turn."""
    directory = write_llama(tmp_path, template)
    command = ("generate", directory, "hello", "there", "--want", "text", "--max-tokens", "4")
    shown = [run(*command, *more, "--json", "--log-probabilities") for more in (["--chat"], [])]
    assert [code for code, _, _ in shown] == [0, 0], shown
    asked, told = (json.loads(out)["ids"] for _, out, _ in shown)
    message = {"role": "user", "content": "hello there"}
    assert asked == omni.load(directory).generate([message], ["text"], seed=0, max_tokens=4).ids.tolist()
    assert (asked == told) == (template is None)


def test_generate_streams(run, tiny_bundle, tmp_path):
    """Streamed, a reply is printed and written as it is without; as JSON its events come in order, the reply last."""
    command = ("generate", tiny_bundle, "seven", "--want", "text,image", "--max-tokens", "40")
    code, whole, err = run(*command, "--out", tmp_path / "whole")
    assert code == 0, err
    code, streamed, err = run(*command, "--out", tmp_path / "streamed", "--stream")
    assert code == 0, err
    assert streamed == whole.replace(str(tmp_path / "whole"), str(tmp_path / "streamed"))
    for name in os.listdir(tmp_path / "whole"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "streamed" / name).read_bytes()
    *events, reply = map(json.loads, run(*command, "--stream", "--json")[1].splitlines())
    assert [event["index"] for event in events] == sorted(event["index"] for event in events)
    assert [event["modality"] for event in events if event["event"] == "part"] == ["text", "image"]
    assert "".join(event.get("text", "") for event in events) == reply["parts"][0]["text"]
    assert run(*command, "--stream", "--samples", "2")[0] == 2


def test_generate_gives_several_samples_that_end_at_stops(run, tiny_bundle, tmp_path):
    """One line of JSON and one directory for each sample."""
    code, out, err = run(
        "generate", tiny_bundle, "seven", "--want", "image", "--seed", "3", "--samples", "2", "--max-tokens", "7",
        "--stop", "zqx", "--stop", "\n\n", "--stop-tokens", "1,2", "--out", tmp_path, "--json",
    )  # fmt: skip
    assert code == 0, err
    assert [json.loads(line)["seed"] for line in out.splitlines()] == [3, 4]
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"} and (tmp_path / "2" / "1.png").exists()


def test_inspect_and_doctor_speak_to_people_and_programs(run, tiny_bundle):
    code, out, _ = run("inspect", tiny_bundle, "--json")
    described = json.loads(out)
    assert code == 0 and described["vocabulary"]["blocks"]["image"]["codes"] == 16
    assert sum(v for k, v in described["parameters"].items() if k.startswith("transformer")) > 10_000
    assert "image" in run("inspect", tiny_bundle)[1]
    code, out, _ = run("doctor", "--json")
    assert code == 0 and all(entry["ok"] for entry in json.loads(out) if entry["required"])


def test_doctor_finds_what_is_missing_or_too_old(monkeypatch):
    """Every requirement of setup.py is looked at, its version too."""
    names = {entry["name"] for entry in doctor.check() if entry["required"]}
    assert {"jax", "soxr", "pillow", "tyro", "scipy", "devices", "Python"} <= names
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1" if name == "soxr" else version(name))
    found = {entry["name"]: entry for entry in doctor.check()}
    assert not found["soxr"]["ok"] and "wanted" in found["soxr"]["found"] and found["jax"]["ok"]
    assert doctor.missing("quickstart") == [] and doctor.missing("test") == []
    monkeypatch.setattr(doctor, "DISTRIBUTION", "omni-that-nobody-installed")
    assert doctor.missing("quickstart") == ["omni-that-nobody-installed"]


def test_tokenizer_codes_go_to_a_file_and_back(run, tiny_bundle, tmp_path, tone):
    soundfile.write(tmp_path / "in.wav", tone, 16000)
    directory = tiny_bundle / "tokenizers" / "audio"
    code, out, _ = run("tokenizer", "encode", directory, tmp_path / "in.wav")
    assert code == 0 and np.shape(json.loads(out)["codes"]) == (1, 2, 5)
    (tmp_path / "codes.json").write_text(out)
    assert run("tokenizer", "decode", directory, tmp_path / "codes.json", tmp_path / "out.wav")[0] == 0
    assert len(soundfile.read(tmp_path / "out.wav")[0]) == 3200
    assert run("tokenizer", "encode", directory, "some text")[0] == 2
    omni.Image(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "in.png")
    assert run("tokenizer", "eval", directory, tmp_path / "in.png")[0] == 2


def test_tokenizer_eval_says_what_it_could_not_measure(run, tiny_bundle, tmp_path, tone, caplog):
    """A short sound has no STOI, a small picture no MS-SSIM: null in the results, and the log tells why."""
    soundfile.write(tmp_path / "in.wav", tone, 16000)
    code, out, _ = run("tokenizer", "eval", tiny_bundle / "tokenizers" / "audio", tmp_path / "in.wav")
    found = json.loads(out)
    assert code == 0 and found["mel_distance"] > 0 and found["stoi"] is None and "stoi" in caplog.text
    omni.Image(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).resize_crop(16, 16).save(tmp_path / "in.png")
    code, out, _ = run("tokenizer", "eval", tiny_bundle / "tokenizers" / "image", tmp_path / "in.png")
    found = json.loads(out)
    assert code == 0 and found["psnr"] > 0 and found["ms_ssim"] is None and "176 x 176" in caplog.text


def huge_png() -> bytes:
    """A picture of 60,000 x 60,000 pixels by its header."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def wav_bytes(samples, rate=16000) -> bytes:
    import io

    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format="WAV", subtype="FLOAT")
    return stream.getvalue()


BAD_FILES = {  # name: content, exit code
    "missing.png": (None, 2),
    "empty.png": (b"", 1),
    "truncated.png": (huge_png()[:30], 1),
    "bomb.png": (huge_png(), 1),
    "text.wav": (b"this is no sound", 1),
    "empty.wav": (wav_bytes(np.zeros(0, np.float32)), 1),
    "nan.wav": (wav_bytes(np.full(1600, np.nan, np.float32)), 1),
    "long.wav": (wav_bytes(np.zeros(160000, np.float32)), 1),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_give_one_line(run, tiny_bundle, tmp_path, name):
    content, code = BAD_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    found, out, err = run("generate", tiny_bundle, tmp_path / name, "--want", "text")
    lines = [line for line in err.splitlines() if line.strip()]
    assert found == code and out == "" and len(lines) == 1 and lines[0].startswith("omni: "), err


def test_a_sound_of_192_khz_and_8_channels_is_read(run, tiny_bundle, tmp_path):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (19200, 8))
    soundfile.write(tmp_path / "wide.wav", noise, 192000)
    assert run("generate", tiny_bundle, tmp_path / "wide.wav", "--want", "text")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["generate", "MODEL", "seven", "--want", "smell"], 2, "unknown modality 'smell'"),
        (["generate", "MODEL", "zqx " * 200, "--want", "text"], 1, "reads at most"),
        (["generate", "MODEL", "seven", "--guidance", "much"], 2, "write a number"),
        (["generate", "MODEL", "seven", "--temperature", "inf"], 2, "finite number"),
        (["generate", "MODEL", "seven", "--top-k", "nan"], 2, "finite number"),
        (["generate", "MODEL", "seven", "--min-p", "2"], 2, "min_p of text is 2.0"),
        (["generate", "MODEL", "seven", "--log-probabilities"], 2, "add --json"),
        (["generate", "MODEL", "seven", "--stop-tokens", "<eos>"], 2, "write whole numbers"),
        (["generate", "MODEL", "seven", "--samples", "0"], 2, "at least 1"),
        (["generate", "MODEL", "seven", "--max-tokens", "0"], 2, "at least 1"),
        (["generate", "MODEL", "seven", "--tensor", "0"], 2, "at least 1"),
        (["generate", "MODEL", "seven", "--tensor", "3"], 2, "does not fit 1 devices"),
        (["generate", "MODEL", "seven", "--want", "image", "--out", "/dev/null/out"], 1, "Not a directory"),
        (["export", "MODEL", "/dev/null"], 2, "no empty directory"),
        (["generate", "MODEL"], 2, "required"),
        (["generate", "nowhere", "seven"], 1, "no such directory"),
        (["generate", "MODEL", "seven", "--wnat", "image"], 2, "unrecognized"),
        (["inspect", "."], 1, "not a run or a model"),
        (["train"], 2, "experiment file"),
        (["train", "nowhere.py"], 2, "no such experiment"),
        (["train", "--seed", "1", "nowhere.py"], 2, "the file comes first"),
        (["train", "--help"], 0, "example:"),
        (["train", "--help"], 0, "OMNI_COORDINATOR"),
        (["train", EXPERIMENT, "--process", "0"], 2, "--coordinator (OMNI_COORDINATOR), --processes"),
        (["train", EXPERIMENT, "--proces", "0"], 2, "unknown configuration key"),
        (
            ["tokenizer", "train", EXPERIMENT, "--coordinator", "x", "--processes", "2", "--process", "0"],
            2,
            "host:port",
        ),
        (["tokenizer", "train", "--help"], 0, "example:"),
        (["tokenizer", "encode", "--help"], 0, "example:"),
        (["quickstart", "--imagee-variants", "3"], 2, "the nearest is --image-variants"),
        (["quickstart", "--transformer.dept=3"], 2, "the nearest is --transformer.depth"),
        (["quickstart", "--image-variants", "many"], 2, "image-variants"),
        (["quickstart", "--voices", "2"], 2, "at least 3"),
        (["fly"], 2, "invalid choice"),
        (["eval", "."], 1, "no run of the digits recipe"),
        (["eval", ".", "--model", "MODEL"], 2, "with --output"),
        (["eval", ".", "--model", "MODEL", "--output", "."], 2, "with --output"),
        (["eval", "MODEL", "--data", "nowhere.jsonl", "--output", "o"], 1, "nowhere.jsonl: no such file"),
        (["eval", ".", "--data", "x.jsonl"], 1, "not a run or a model"),
        (["eval", "nowhere", "--data", "x.jsonl", "--output", "o"], 1, "no such directory"),
        (["eval", "digits", "--data", "x.jsonl"], 2, "name one with --output"),
        (["eval", "MODEL", "--data", "x.jsonl", "--directions", "image"], 2, "write context:target"),
        (["eval", "MODEL", "--data", "x.jsonl", "--candidates", "1"], 2, "at least 2"),
        (["eval", "MODEL", "--data", "x.jsonl", "--model", "MODEL"], 2, "the model comes first"),
        (["eval", "MODEL", "--seed", "1"], 2, "name them with --data"),
    ],
)
def test_wrong_usage_says_what_is_right(run, tiny_bundle, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    found, out, err = run(*[str(tiny_bundle) if a == "MODEL" else a for a in arguments])
    assert found == code, err
    assert message in out + err and "Traceback" not in out + err
    assert code == 0 or "usage:" in err or len(err.strip().splitlines()) == 1, err


def test_words_that_the_shell_has_split_are_one_text():
    parts = read_arguments(["draw", "seven"], read_part)
    assert [part.text for part in parts] == ["draw seven"]


def test_help_needs_no_heavy_import():
    """`omni --help` must answer at once, so the command line may not import jax before a verb runs."""
    code = "import sys, omni.cli; omni.cli.make_parser(); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_export_writes_a_directory_that_loads(run, tiny_bundle, tmp_path):
    code, out, err = run("export", tiny_bundle, tmp_path / "exported", "--dtype", "float16")
    assert code == 0 and "MB" in out, err
    assert omni.load(tmp_path / "exported").generate(["seven"], want=["image"]).well_formed
    assert run("export", tiny_bundle, tmp_path / "exported")[0] == 2
