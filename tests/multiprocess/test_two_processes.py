"""One device, eight devices and two processes of four are the same run, within float32's rounding."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from omni.bundle import Model
from omni.train.checkpoints import restore_params
from omni.train.metrics import read_metrics

WORKER = Path(__file__).parent / "mesh_worker.py"
MESH = "data=2,fsdp=2,tensor=2"


def launch(output, steps: int, mesh: str, devices: int, *others: str) -> subprocess.Popen:
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
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
    finish(launch(root / "one", 20, "data=1", 1))
    finish(launch(root / "eight", 20, MESH, 8))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    finish(*(launch(root / "two", 20, MESH, 4, coordinator, "2", str(process)) for process in range(2)))
    return root


@pytest.mark.multiprocess
@pytest.mark.parametrize("other", ["eight", "two"])
def test_same_losses_and_gradients(runs, other):
    """Losses and gradient norms of 20 steps and the first step's gradient are those of one device within 1e-5."""
    expected, found = read_metrics(runs / "one"), read_metrics(runs / other)
    assert [line["step"] for line in found] == list(range(1, 21))
    for name in ("loss", "loss/image", "loss/audio"):
        np.testing.assert_allclose([line[name] for line in found], [line[name] for line in expected], atol=1e-5)
    assert found[0]["gradient_norm"] == pytest.approx(expected[0]["gradient_norm"], abs=1e-5)
    one, several = np.load(runs / "one.npz"), np.load(runs / f"{other}.npz")
    gradients = [name for name in one.files if name.startswith("gradient.")]
    assert len(gradients) > 5 and max(np.abs(one[name]).max() for name in gradients) > 1e-3
    for name in gradients:
        np.testing.assert_allclose(several[name], one[name], atol=1e-5, err_msg=name)


@pytest.mark.multiprocess
@pytest.mark.parametrize("run", ["eight", "two"])
def test_state_is_spread(runs, run):
    """On fsdp 2 x tensor 2 a device holds at most a quarter of parameters and moments, and a tenth of that more."""
    sizes = np.load(runs / f"{run}.npz")
    assert sizes["bytes_here"] <= 0.25 * 1.1 * sizes["bytes_whole"]


@pytest.mark.multiprocess
def test_goes_on_elsewhere(runs, tmp_path):
    """What two processes of four devices saved goes on on one device, as what one device saved does."""
    for name in ("one", "two"):
        shutil.copytree(runs / name, tmp_path / name)
        shutil.copytree(runs / "shards-200", tmp_path / "shards-200", dirs_exist_ok=True)
        config = tmp_path / name / "config.json"
        config.write_text(config.read_text().replace(str(runs), str(tmp_path)))
        finish(launch(tmp_path / name, 22, "data=1", 1))
    expected, found = read_metrics(tmp_path / "one")[20:], read_metrics(tmp_path / "two")[20:]
    assert [line["step"] for line in found] == [21, 22]
    np.testing.assert_allclose([line["loss"] for line in found], [line["loss"] for line in expected], atol=1e-5)
    model = Model.load(tmp_path / "two")
    np.testing.assert_array_equal(restore_params(tmp_path / "two")[0]["embedding"], model.transformer.embedding[...])
