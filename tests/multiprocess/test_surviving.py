"""Runs of several processes: fewer of them go on with the same samples, and one that is lost is named by the others."""

import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

from host_devices import host_devices
from training_cases import language

from omni.train.metrics import read_metrics

WORKER = Path(__file__).parent / "survivor.py"
LOST_AFTER = 30


def launch(output: Path, processes: int, *settings: str) -> list[subprocess.Popen]:
    """The processes of a run, of one device each; what each prints goes to its `log`."""
    language(output)  # writes the shards, which several processes must not do at once
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    environment = host_devices(1)
    started = []
    for process in range(processes):
        others = ["--", coordinator, str(processes), str(process)] if processes > 1 else []
        log = output.parent / f"{output.name}.{processes}.{process}.log"
        with log.open("w") as file:
            command = [sys.executable, str(WORKER), str(output), *settings, *others]
            started.append(subprocess.Popen(command, env=environment, stdout=file, stderr=file))
        started[-1].log = log
    return started


def wait_for_step(run: list[subprocess.Popen], output: Path, step: int) -> None:
    """Returns when a step is logged."""
    while max((line["step"] for line in read_metrics(output)), default=0) < step:
        assert all(process.poll() is None for process in run), printed(run)
        time.sleep(0.01)


def codes(run: list[subprocess.Popen], timeout: float = 300) -> list[int]:
    """How the processes of a run ended."""
    deadline = time.monotonic() + timeout
    try:
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in run]
    finally:
        for process in run:
            process.kill()


def printed(run: list[subprocess.Popen]) -> str:
    return "\n".join(process.log.read_text()[-3000:] for process in run)


@pytest.mark.multiprocess
def test_fewer_processes_go_on(tmp_path):
    """Four processes, of which one gets SIGTERM, all end with code 75, saved at one step; two and then one go on. Every
    step has the samples that it has in a run of one process, in the same rows, and its loss within 1e-5."""
    output, settings = tmp_path / "run", ("steps=60", "checkpoint_every=7")
    for processes, step in ((4, 10), (2, 25)):
        run = launch(output, processes, *settings)
        wait_for_step(run, output, step)
        run[-1].send_signal(signal.SIGTERM)
        assert codes(run) == [75] * processes, printed(run)
        last = read_metrics(output)[-1]["step"]
        assert last < 60 and (output / "checkpoints" / str(last)).exists()
        assert all(f"is saved at step {last}" in process.log.read_text() for process in run)
    run = launch(output, 1, *settings) + launch(tmp_path / "alone", 1, *settings)
    assert codes(run) == [0, 0], printed(run)
    found, expected = read_metrics(output), read_metrics(tmp_path / "alone")
    assert [line["step"] for line in found] == list(range(1, 61))
    assert [line["order"] for line in found] == [line["order"] for line in expected]
    assert len({line["order"] for line in found}) > 50
    np.testing.assert_allclose([line["loss"] for line in found], [line["loss"] for line in expected], atol=1e-5)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("fault", "lost", "step"),
    [("hangs", 1, 13), ("killed", 1, 20), ("stopped", 1, 20), ("killed", 0, 13), ("stopped", 0, 13)],
)
def test_a_lost_process_is_named(tmp_path, fault, lost, step):
    """Of three processes one is killed, stopped, or waits for ever: within a minute the others end with code 76, and
    each says which it was. At step 20 that happens while a checkpoint is written. Process 0 has the service by which
    they find one another."""
    settings = ["steps=2000", "batch_size=9", "checkpoint_every=10", f"lost_after={LOST_AFTER}"]
    run = launch(tmp_path / "run", 3, *settings, *([f"hang={lost}:15"] if fault == "hangs" else []))
    wait_for_step(run, tmp_path / "run", step)  # after the first checkpoint, until which there is more patience
    began = time.monotonic()
    if fault != "hangs":
        run[lost].send_signal(signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
    others = run[:lost] + run[lost + 1 :]
    try:
        assert codes(others, timeout=120) == [76, 76], printed(run)
    finally:
        run[lost].kill()
    assert time.monotonic() - began < 60
    for process in others:
        last = process.log.read_text().split("omni: ")[-1]
        assert re.fullmatch(rf"step \d+: process {lost} of 3 is lost or hangs\s*", last), printed(run)
    assert any(path.name.isdigit() for path in (tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.multiprocess
def test_a_run_that_is_over_ends(tmp_path):
    """Two processes that are done wait for nothing of the roll call, whose patience at first is five minutes."""
    run = launch(tmp_path / "run", 2, "steps=40", "checkpoint_every=40", f"lost_after={LOST_AFTER}")
    assert codes(run, timeout=10 * LOST_AFTER - 60) == [0, 0], printed(run)
