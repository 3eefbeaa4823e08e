"""From nothing to a finished run of two processes that was preempted twice, and every bit as if it had not been."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from pod_cases import OMNI, REPOSITORY, Cloud, wait_for

from omni.train.metrics import read_metrics
from omni.train.run_directory import CHECKPOINTS

# Hosts know nothing of this environment, in which tests compile without optimisations.
pytestmark = [pytest.mark.multiprocess, pytest.mark.usefixtures("optimised_processes")]
STEPS = 100
EXPERIMENT = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), str(REPOSITORY / "tests" / "train")]}
from slow_training import slow
config = slow("SHARED/run")
"""


def write_experiment(directory: Path, shared: Path) -> Path:
    path = directory / "slow experiment.py"
    path.write_text(EXPERIMENT.replace("SHARED", str(shared)))
    return path


def saved(run: Path) -> list[int]:
    """Committed steps of a run."""
    directory = run / CHECKPOINTS
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit()) if directory.exists() else []


def state_of(run: Path) -> dict[str, np.ndarray]:
    """Parameters, moments and averages in a run's last checkpoint, by name."""
    handler, path = ocp.PyTreeCheckpointHandler(), epath.Path(run) / CHECKPOINTS / str(STEPS) / "state"
    # As numpy: the checkpoint's own shardings are those of two processes.
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(path).tree)
    tree = handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same_run(found: Path, expected: Path) -> None:
    """Every bit of the last state, of the files that the run is used from, and of its log but the times."""
    states = state_of(found), state_of(expected)
    assert states[0].keys() == states[1].keys() and len(states[0]) > 20
    for name, array in states[1].items():
        np.testing.assert_array_equal(states[0][name], array, err_msg=name)
    assert (found / "weights.safetensors").read_bytes() == (expected / "weights.safetensors").read_bytes()
    times = ("steps_per_second", "tokens_per_second", "goodput")
    logs = [
        [{name: line[name] for name in line if name not in times and not name.startswith("time/")} for line in lines]
        for lines in map(read_metrics, (found, expected))
    ]
    assert logs[0] == logs[1] and [line["step"] for line in logs[0]] == list(range(1, STEPS + 1))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A place that outlives machines, as gs:// does, with the data of the runs."""
    sys.path.insert(0, str(REPOSITORY / "tests" / "train"))
    from training_cases import language

    place = tmp_path_factory.mktemp("shared")
    language(place / "run")
    return place


@pytest.fixture(scope="module")
def undisturbed(shared, tmp_path_factory, optimised_processes):
    """The run of two processes that nothing interrupts, told of one another by options."""
    root = tmp_path_factory.mktemp("undisturbed")
    experiment = write_experiment(root, shared)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    Cloud.program(root / "omni", OMNI)
    line = [root / "omni", "train", experiment, "--output", shared / "undisturbed", "--coordinator", coordinator]
    processes = [subprocess.Popen([*line, "--processes", "2", "--process", str(number)]) for number in range(2)]
    assert [process.wait(timeout=900) for process in processes] == [0, 0]
    return shared / "undisturbed"


def test_preempted_twice_ends_with_the_same_bits(cloud, shared, undisturbed):
    """Create, install, train; killed in the middle twice; created again, resumed, finished: the same bits."""
    run = shared / "preempted"
    write_experiment(cloud.source, shared)
    cloud.git("add", ".")
    cloud.git("commit", "--quiet", "--message=an experiment")
    pod = cloud.config(capacity="spot", queued=True)
    command = ["omni", "train", "slow experiment.py", "--output", run]
    sitting = cloud.start("babysit", pod, "first", "--poll", "0.5", "--source", cloud.source, "--", *command)
    step = 0
    for _ in range(2):
        step += 10  # there only once the run has gone on from the steps before
        wait_for(lambda step=step: sitting.poll() is not None or max(saved(run), default=0) >= step, seconds=600)
        assert sitting.poll() is None, sitting.communicate()
        cloud.world.preempt("mine")
        step = max(saved(run))
    _, errors = sitting.communicate(timeout=900)
    assert sitting.returncode == 0, errors
    assert errors.count("first lost its machines") == 2 and "failed" not in errors, errors
    assert sum(" create " in call for call in cloud.calls()) == 3
    log = (cloud.world.home("mine", 1) / "omni/runs/first/log").read_text()
    assert log.count("goes on from step") == 1  # of its own last start: the other hosts' disks are gone
    assert_same_run(run, undisturbed)


SRUN = """#!/usr/bin/env bash
[ "$1" = --export=ALL ] || exit 64
shift
export SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2
for task in 0 1; do
  SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
  echo $! >>"$STARTED"
  tasks+=($!)
done
highest=0
for task in "${tasks[@]}"; do
  code=0
  wait "$task" || code=$?
  if [ "$code" -gt "$highest" ]; then highest=$code; fi
done
exit "$highest"
"""


def test_slurm_job_goes_on_after_its_time(tmp_path, shared, undisturbed):
    """A job whose processes get TERM saves, waits in the queue again, and ends with the bits of an undisturbed run.

    The processes find one another as jax finds them in a Slurm job.
    """
    run, started = shared / "slurm", tmp_path / "started"
    for name, text in (
        ("srun", SRUN),
        ("scontrol", '#!/bin/sh\necho "$@" >> "$REQUEUED"\n'),
        ("omni", OMNI),
    ):
        Cloud.program(tmp_path / "bin" / name, text)
    variables = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "STARTED": str(started)}
    variables |= {"SLURM_JOB_ID": str(os.getpid()), "REQUEUED": str(tmp_path / "requeued")}
    script = REPOSITORY / "tpu_scripts" / "slurm.sh"
    line = ["bash", script, "omni", "train", write_experiment(tmp_path, shared), "--output", run]
    job = subprocess.Popen(line, env=os.environ | variables)
    wait_for(lambda: job.poll() is not None or saved(run), seconds=600)
    assert job.poll() is None
    for process in started.read_text().split():
        os.kill(int(process), signal.SIGTERM)
    assert job.wait(timeout=300) == 0 and (tmp_path / "requeued").read_text().split() == ["requeue", str(os.getpid())]
    assert saved(run)[-1] < STEPS
    subprocess.run(line, env=os.environ | variables | {"SLURM_RESTART_COUNT": "1"}, check=True, timeout=900)
    assert_same_run(run, undisturbed)
