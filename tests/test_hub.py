"""Models by the names of repositories, of a hub on this machine or its cache; paths go first, errors are one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from loopback_hub import COMMIT, serving
from public_models import golden

import omni
from omni.hub import located

FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.model": b"pieces",
    "emu3.tiktoken": b"ranks",
    "chat_template.jinja": b"{{ template }}",
    "tokenizers/image/weights.safetensors": b"decoder",
}
REFUSED = {"pytorch_model.bin": b"pickle", "original/consolidated.00.pth": b"pickle", "modeling.py": b"code"}
PROGRAM = """
import json, pathlib, sys
from omni.hub import OmniError, located
for name in sys.argv[1:]:
    try:
        path = pathlib.Path(located(name))
        files = [file for file in path.rglob("*") if file.is_file()]
        print(json.dumps({file.relative_to(path).as_posix(): file.read_text() for file in files}))
    except OmniError as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture
def hub(tmp_path):
    """A repository someone/tiny, meta/gated whose terms nobody accepted; yields its address and what was asked for."""
    for name, content in (FILES | REFUSED).items():
        path = tmp_path / "served" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with serving(tmp_path / "served", "someone/tiny", gated="meta/gated") as served:
        yield served


def asked(home, endpoint: str, *names: str) -> list:
    """What `located` makes of names, in a process of its own: a directory's files, or a message."""
    environment = os.environ | {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", PROGRAM, *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=home, timeout=120, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_repository_is_downloaded_without_pickles_and_code(hub, tmp_path):
    """Weights in safetensors, JSON, templates and tokenizers come, and nothing else; later the cache is enough."""
    endpoint, paths = hub
    (tmp_path / "home").mkdir()
    expected = {name: content.decode() for name, content in FILES.items()}
    newest, named, exact = asked(
        tmp_path / "home", endpoint, "someone/tiny", "someone/tiny@v1", f"someone/tiny@{COMMIT}"
    )
    assert newest == named == exact == expected
    assert not [path for path in paths if any(name in path for name in REFUSED)]
    offline, unknown = asked(tmp_path / "home", "http://127.0.0.1:9", "someone/tiny", "someone/else")
    assert offline == expected
    assert unknown.startswith("someone/else: no such directory, and it cannot be downloaded from http://127.0.0.1:9")
    assert "HF_HOME" in unknown and "\n" not in unknown


def test_what_the_hub_refuses_is_one_line(hub, tmp_path):
    """An unknown repository, an unknown revision, one whose terms must be accepted."""
    (tmp_path / "home").mkdir()
    names = ("someone/else", "someone/tiny@v9", "meta/gated")
    found = asked(tmp_path / "home", hub[0], *names)
    for name, message, words in zip(
        names, found, ("no repository of that name", "no revision 'v9'", "accept its terms"), strict=True
    ):
        assert message.startswith(f"{name}: no such directory, and") and words in message and "\n" not in message


def test_paths_go_before_the_hub(tmp_path, monkeypatch, run):
    """What is there is opened, and a mistyped path, below a folder that is there or to a file, asks no hub; nor does a
    path that is no string, and a name below a usual folder, even one that is not there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("omni.hub._downloaded", lambda *name: pytest.fail(f"asked for {name}"))
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    usual = ("models/mine", "experiments/mine@v1", "checkpoints/mine", "out/mine")
    for name in ("runs/mine", "runs/mime", "./other/mine", "a/b/c", "weights/vqgan.ckpt", "digits", "gs://a/b", *usual):
        assert str(located(name)) == os.path.normpath(name).replace("gs:/a", "gs://a")
    with pytest.raises(omni.OmniError, match="runs/mime: no such directory, nor a model in the box"):
        omni.load("runs/mime")
    with pytest.raises(omni.OmniError, match="someone/tiny: no such directory, nor a model in the box"):
        omni.load(Path("someone/tiny"))
    for verb in (("inspect", "someone/tiny"), ("import", "models/mine", "new"), ("export", "out/mine", "new")):
        code, _, err = run(*verb)
        assert code == 1 and f"{verb[1]}: " in err and "no such" in err


def test_branches_have_slashes(monkeypatch):
    """A revision may be one of several names; none that leads out of the cache."""
    asked = []
    monkeypatch.setattr("omni.hub._downloaded", lambda *name: asked.append(name[:2]) or "snapshot")
    for revision in ("refs/pr/1", "dev/v1.0", "main"):
        located(f"someone/tiny@{revision}")
    assert asked == [("someone/tiny", revision) for revision in ("refs/pr/1", "dev/v1.0", "main")]
    for name in ("someone/tiny@../../main", "someone/tiny@a//b", "someone/tiny@/a", "someone/tiny@"):
        assert str(located(name)) != "snapshot"


def test_loading_and_importing_take_repositories(tmp_path, monkeypatch, run):
    """omni.load, omni import and omni generate open what was downloaded, with the revision that was named."""
    golden("llama tied").write(tmp_path / "snapshot")
    names = []

    def downloaded(repository, revision, name):
        names.append((repository, revision))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("omni.hub._downloaded", downloaded)
    assert omni.load("someone/tiny@v1").grammar.modalities == ("text",)
    code, _, err = run("import", "someone/tiny", tmp_path / "imported")
    assert code == 0, err
    assert omni.load(tmp_path / "imported").grammar.modalities == ("text",)
    code, _, err = run("generate", "someone/tiny", "a")
    assert code == 1 and "without its text tokenizer" in err
    assert names == [("someone/tiny", "v1"), ("someone/tiny", None), ("someone/tiny", None)]


def test_without_the_package_the_extra_is_named(monkeypatch):
    """The message says what was not found, and what to install."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(omni.OmniError, match=r"someone/tiny: no such directory.*omni-any-to-any\[checkpoints\]"):
        omni.load("someone/tiny")
