"""The whole path of `omni quickstart` at a tiny scale, and that `kill -9` at any moment changes nothing in the end."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from killing import MOMENTS, finish, found, kill_at, start

pytestmark = pytest.mark.slow

TINY = [
    *("--image-training.steps", "8", "--image-training.batch-size", "16", "--image.channels", "16"),
    *("--audio-training.steps", "8", "--audio-training.batch-size", "8", "--audio.dim", "16"),
    *("--voices", "10", "--image-variants", "1", "--documents", "300"),
    *("--transformer-training.steps", "12", "--transformer-training.batch-size", "4", "--checkpoint-every", "3"),
    *("--transformer.depth", "2", "--transformer.dim", "32", "--transformer.heads", "2"),
    *("--transformer.key-value-heads", "1", "--transformer.head-dim", "16", "--transformer.mlp-dim", "64"),
    # As many replies everywhere, so that they are answered by the same programs: most of the time is spent compiling.
    # Two are the fewest, and as many prompts of all modalities together are always answered.
    *("--evaluation.per-direction", "2", "--evaluation.shuffled", "2", "--evaluation.requests", "2"),
    *("--evaluation.unconstrained", "2", "--evaluation.documents", "2", "--evaluation.shown", "2"),
    *("--evaluation.heard", "8"),
]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from the tree, unpacked where nothing else is: what `pip install` makes of it."""
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)  # a build leaves its own files in the source
    quiet = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*quiet, "wheel", "--no-deps", "--no-build-isolation", "-w", str(directory), str(source)], check=True
    )
    (built,) = directory.glob("*.whl")
    subprocess.run([*quiet, "install", "--no-deps", "--target", str(directory / "site"), str(built)], check=True)
    shutil.rmtree(source)
    return directory / "site"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, wheel) -> Path:
    """A finished tiny run of the wheel."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    printed = finish(start(output, TINY, wheel), output)
    assert "omni generate" in printed and "report" in printed
    return output


def test_the_wheel_is_what_ran(wheel):
    """Outside the tree, the package in the wheel is the one that is imported, with all that it needs beside code."""
    code = "import omni, omni_tokenizers; print(omni.__file__); print(omni_tokenizers.__file__)"
    environment = os.environ | {"PYTHONPATH": str(wheel)}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=wheel.parent, check=True, capture_output=True, text=True
    ).stdout.split()
    assert all(Path(path).is_relative_to(wheel) for path in found)
    assert (wheel / "omni" / "evaluate" / "templates" / "report.html.j2").exists()
    assert (wheel / "omni" / "recipes" / "models" / "digits" / "tokenizers" / "audio" / "weights.safetensors").exists()


def test_quickstart_leaves_results_a_report_and_a_model(undisturbed, tmp_path):
    results = json.loads((undisturbed / "evaluation" / "results.json").read_text())
    for source in ("text", "image", "audio"):
        for target in ("text", "image", "audio"):
            cell = results["matrix"][source][target]
            assert {"accuracy", "ci95", "n", "ceiling", "shuffled"} <= set(cell)
    assert results["well_formed"]["constrained"] == 1.0
    assert {"psnr", "ssim", "usage", "perplexity"} <= set(results["tokenizers"]["image"])
    assert {"mel_distance", "stoi", "usage"} <= set(results["tokenizers"]["audio"])
    assert {"routing", "variety", "seconds", "signature"} <= set(results)
    assert "<html" in (undisturbed / "report.html").read_text()
    command = [sys.executable, "-m", "omni.cli", "generate", str(undisturbed), "seven", "--want", "image,audio"]
    subprocess.run([*command, "--out", str(tmp_path)], check=True, capture_output=True)
    assert sorted(os.listdir(tmp_path)) == ["1.png", "2.wav", "reply.json"]


def test_killed_at_every_moment_everything_is_the_same(undisturbed, tmp_path):
    """The final weights are the same bits, and every measured number is the same number, of a run that was killed at
    one moment after the other (at full scale: docs/results/killed.json)."""
    run = tmp_path / "run"
    # Synthesis takes half the time of a tiny run and is the same for all; its own interruption has a test of its own.
    shutil.copytree(undisturbed / "data", run / "data")
    (run / "stages").mkdir()
    shutil.copy(undisturbed / "stages" / "data.json", run / "stages")
    for moment in MOMENTS:  # in the order in which they come
        kill_at(moment, run, TINY)
    assert not (run / "evaluation" / "results.json").exists()
    finish(start(run, TINY), run)
    assert found(run) == found(undisturbed)
