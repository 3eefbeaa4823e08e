"""The commands that `gke.py` gives to xpk, and when `slurm.sh` goes back into the queue."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from pod_cases import Cloud

SCRIPTS = Path(__file__).parents[2] / "tpu_scripts"
# xpk's flags, read on 2026-11-27 in src/xpk/parser/workload.py and common.py at
# https://github.com/AI-Hypercomputer/xpk/tree/01b05572b7c54e45fe5239c7d520b9f1d3c04989 (what is used of them)
XPK = {
    "create": {
        *("--cluster", "--workload", "--command", "--tpu-type", "--num-slices", "--docker-image", "--max-restarts"),
        *("--termination-grace-period-seconds", "--restart-on-user-code-failure", "--env-file", "--zone", "--project"),
    },
    "list": {"--cluster", "--filter-by-job", "--zone", "--project"},
    "delete": {"--cluster", "--workload", "--force", "--zone", "--project"},
}


def gke(cloud, *arguments) -> subprocess.CompletedProcess:
    line = [sys.executable, "-S", str(SCRIPTS / "gke.py"), *map(str, arguments)]
    return subprocess.run(line, env=cloud.environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def workload(cloud):
    """A pod's file for GKE, and an xpk that writes down what it is given, its environment file too."""
    seen = cloud.root / "seen"
    code = (
        "import json, sys\n"
        "files = [open(word.split('=', 1)[1]).read() for word in sys.argv if word.startswith('--env-file=')]\n"
        f"open({str(seen)!r}, 'a').write(json.dumps([sys.argv[1:], files]) + '\\n')\n"
    )
    Cloud.program(cloud.root / "bin" / "xpk", f"#!{sys.executable} -S\n{code}")
    cloud.environment["WANDB_API_KEY"] = "hushed"
    pod = cloud.config(cluster="c", image="i:1", slices=2, project="ours", environment=["WANDB_API_KEY"])
    return pod, lambda: [json.loads(line) for line in seen.read_text().splitlines()]


def test_xpk_gets_flags_that_it_knows(cloud, workload):
    """Every verb's flags are in xpk's parser; the run's command arrives as it was typed, secrets as names alone."""
    pod, seen = workload
    command = ["omni", "train", "it's an experiment.py"]
    verbs = {"launch": ["--", *command], "status": [], "delete": []}
    for verb, rest in verbs.items():
        dry = gke(cloud, verb, pod, "first", "--dry-run", *rest)
        done = gke(cloud, verb, pod, "first", *rest)
        assert dry.returncode == done.returncode == 0, dry.stderr + done.stderr
        assert "hushed" not in dry.stdout + done.stdout + done.stderr and dry.stdout.startswith("xpk workload ")
    for (words, files), name in zip(seen(), ("create", "list", "delete"), strict=True):
        assert words[:2] == ["workload", name]
        flags = dict(word.partition("=")[::2] for word in words[2:])
        assert flags.keys() <= XPK[name] and flags["--cluster"] == "c" and flags["--project"] == "ours"
        if name == "create":
            assert shlex.split(flags["--command"]) == ["env", "OMNI_DISTRIBUTED=1", *command]
            assert files == ["WANDB_API_KEY\n"] and flags["--num-slices"] == "2"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["launch", "POD", "first"], "no command"),
        (["launch", "POD", "No Name", "--", "true"], "no name of a workload"),
        (["grow", "POD", "first"], "invalid choice"),
    ],
)
def test_wrong_usage_of_gke(cloud, workload, arguments, message):
    """Wrong arguments end with 2 and a line that says what is wrong."""
    wrong = gke(cloud, *[workload[0] if argument == "POD" else argument for argument in arguments])
    assert wrong.returncode == 2 and message in wrong.stderr and "Traceback" not in wrong.stderr


def test_gke_needs_its_keys(cloud):
    """A pod's file without cluster and image is no workload's."""
    wrong = gke(cloud, "status", cloud.config(), "first")
    assert wrong.returncode == 2 and "cluster, image missing" in wrong.stderr


@pytest.mark.parametrize(
    "code, restarts, requeued, ended",
    [(0, 0, False, 0), (2, 0, False, 2), (75, 0, True, 0), (1, 3, True, 0), (1, 4, False, 1)],
)
def test_slurm_requeues(tmp_path, code, restarts, requeued, ended):
    """Interrupted and failed jobs go back into the queue up to a limit, finished and wrong ones never."""
    for name, text in (
        ("srun", '#!/bin/sh\n[ "$OMNI_DISTRIBUTED" = 1 ] || exit 99\nshift\n"$@"\n'),
        ("scontrol", '#!/bin/sh\necho "$@" >> "$REQUEUED"\n'),
    ):
        Cloud.program(tmp_path / "bin" / name, text)
    variables = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "REQUEUED": str(tmp_path / "requeued")}
    variables |= {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts), "OMNI_RESTARTS": "4"}
    line = ["bash", str(SCRIPTS / "slurm.sh"), "sh", "-c", 'exit "$0"', str(code)]
    job = subprocess.run(line, env=os.environ | variables, capture_output=True, text=True)
    assert job.returncode == ended, job.stderr
    assert (tmp_path / "requeued").exists() == requeued
    dry = subprocess.run(line, env=os.environ | variables | {"OMNI_DRY_RUN": "1"}, capture_output=True, text=True)
    assert shlex.split(dry.stdout)[:5] == ["srun", "--export=ALL", "sh", "-c", 'exit "$0"']


def test_slurm_without_a_command():
    """No command is wrong usage."""
    job = subprocess.run(["bash", str(SCRIPTS / "slurm.sh")], capture_output=True, text=True)
    assert job.returncode == 2 and "no command" in job.stderr
