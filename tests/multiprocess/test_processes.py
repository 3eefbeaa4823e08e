"""One device, eight devices and four processes of two are the same run, within float32's rounding."""

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from host_devices import host_devices

from omni.bundle import Model
from omni.train.checkpoints import restore_params
from omni.train.metrics import read_metrics

WORKER = Path(__file__).parent / "mesh_worker.py"
MESH = "data=2,fsdp=2,tensor=2"
STEPS = 50


def launch(output, steps: int, mesh: str, devices: int, *others: str) -> subprocess.Popen:
    environment = host_devices(devices)
    command = [sys.executable, str(WORKER), str(output), str(steps), mesh, *others]
    # To files: a pipe that nobody reads while another process is waited for fills up, and its writer stands still.
    with log_of(output, others).open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    process.log = log_of(output, others)
    return process


def log_of(output, others: tuple[str, ...]) -> Path:
    return Path(f"{output}.{'-'.join(others[1:]) or 'alone'}.log")


def finish(*processes: subprocess.Popen) -> None:
    for process in processes:
        try:
            returned = process.wait(timeout=600)
        except subprocess.TimeoutExpired:
            returned = "a timeout"
        if returned != 0:
            for other in processes:
                other.kill()
        assert returned == 0, "\n".join(other.log.read_text()[-3000:] for other in processes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    finish(launch(root / "one", STEPS, "data=1", 1))
    finish(launch(root / "eight", STEPS, MESH, 8))
    together(root / "four", STEPS, processes=4, devices=2)
    return root


def together(output, steps: int, processes: int, devices: int) -> None:
    """A run of several processes, to its end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        others = f"127.0.0.1:{free.getsockname()[1]}", str(processes)
    finish(*(launch(output, steps, MESH, devices, *others, str(process)) for process in range(processes)))


@pytest.mark.multiprocess
@pytest.mark.parametrize("other", ["eight", "four"])
def test_same_losses_and_gradients(runs, other):
    """Losses and gradient norms of 50 steps and the first step's gradient are those of one device within 1e-5."""
    expected, found = read_metrics(runs / "one"), read_metrics(runs / other)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    for name in ("loss", "loss/image", "loss/audio"):
        np.testing.assert_allclose([line[name] for line in found], [line[name] for line in expected], atol=1e-5)
    assert found[0]["gradient_norm"] == pytest.approx(expected[0]["gradient_norm"], abs=1e-5)
    one, several = np.load(runs / "one.npz"), np.load(runs / f"{other}.npz")
    gradients = [name for name in one.files if name.startswith("gradient.")]
    assert len(gradients) > 5 and max(np.abs(one[name]).max() for name in gradients) > 1e-3
    for name in gradients:
        np.testing.assert_allclose(several[name], one[name], atol=1e-5, err_msg=name)


@pytest.mark.multiprocess
@pytest.mark.parametrize("run", ["eight", "four"])
def test_state_is_spread(runs, run):
    """On fsdp 2 x tensor 2 a device holds at most a quarter of parameters and moments, and a tenth of that more."""
    sizes = np.load(runs / f"{run}.npz")
    assert sizes["bytes_here"] <= 0.25 * 1.1 * sizes["bytes_whole"]


@pytest.mark.multiprocess
def test_goes_on_elsewhere(runs, tmp_path):
    """What four processes of two devices saved goes on in two processes of four devices, and on one device, as what one
    device saved does."""
    end = STEPS + 2
    for name, saved in (("expected", "one"), ("two", "four"), ("alone", "four")):
        shutil.copytree(runs / saved, tmp_path / name)
        config = tmp_path / name / "config.json"
        moved = config.read_text().replace(str(runs / saved), str(tmp_path / name))
        config.write_text(moved.replace(str(runs), str(tmp_path)))
    shutil.copytree(runs / "shards-200", tmp_path / "shards-200")
    together(tmp_path / "two", end, processes=2, devices=4)
    for name in ("expected", "alone"):
        finish(launch(tmp_path / name, end, "data=1", 1))
    expected = read_metrics(tmp_path / "expected")[STEPS:]
    for name in ("two", "alone"):
        found = read_metrics(tmp_path / name)[STEPS:]
        assert [line["step"] for line in found] == [STEPS + 1, STEPS + 2]
        np.testing.assert_allclose([line["loss"] for line in found], [line["loss"] for line in expected], atol=1e-5)
    model, (restored, *_) = Model.load(tmp_path / "alone"), restore_params(tmp_path / "alone")
    np.testing.assert_array_equal(restored["embedding"], model.transformer.embedding[...])
