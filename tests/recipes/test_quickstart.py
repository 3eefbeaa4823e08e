"""The whole path of `omni quickstart` at a tiny scale, and that `kill -9` at any moment changes nothing in the end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TINY = [
    *("--image-training.steps", "8", "--image-training.batch-size", "16", "--image.channels", "16"),
    *("--audio-training.steps", "8", "--audio-training.batch-size", "8", "--audio.dim", "16"),
    *("--image-variants", "1", "--documents", "300"),
    *("--transformer-training.steps", "12", "--transformer-training.batch-size", "4", "--checkpoint-every", "3"),
    *("--transformer.depth", "2", "--transformer.dim", "32", "--transformer.heads", "2"),
    *("--transformer.key-value-heads", "1", "--transformer.head-dim", "16", "--transformer.mlp-dim", "64"),
    *("--evaluation.per-direction", "8", "--evaluation.shuffled", "4", "--evaluation.requests", "4"),
    *("--evaluation.unconstrained", "8", "--evaluation.documents", "8", "--evaluation.shown", "2"),
]
FINAL = ("weights.safetensors", "tokenizers/image/weights.safetensors", "tokenizers/audio/weights.safetensors")


def start(output: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "omni.cli", "quickstart", "--output", str(output), *TINY]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """A finished tiny run."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start(output)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err[-3000:]
    assert "omni generate" in out and "report" in out
    return output


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
    assert sorted(os.listdir(tmp_path)) == ["1.png", "2.wav"]


def inside_a_save(run: Path) -> bool:
    """A checkpoint of the transformer is being written: orbax has its directory under a temporary name."""
    return any("tmp" in path.name for path in (run / "training" / "transformer").glob("checkpoints/*"))


MOMENTS = {
    "image training": lambda run: (run / "training" / "image" / "config.json").exists(),
    "writing documents": lambda run: (run / "tokens.partial").exists(),
    "inside a checkpoint's writing": inside_a_save,
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_run_again_the_final_weights_are_the_same_bits(undisturbed, tmp_path, moment):
    run = tmp_path / "run"
    # Synthesis takes half the time of a tiny run and is the same for all; its own interruption has a test of its own.
    shutil.copytree(undisturbed / "data", run / "data")
    (run / "stages").mkdir()
    shutil.copy(undisturbed / "stages" / "data.json", run / "stages")
    process = start(run)
    deadline = time.monotonic() + 600
    while not MOMENTS[moment](run):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-3000:]
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (run / "evaluation" / "results.json").exists()

    process = start(run)
    _, err = process.communicate(timeout=900)
    assert process.returncode == 0, err[-3000:]
    for name in FINAL:
        assert (run / name).read_bytes() == (undisturbed / name).read_bytes(), name
