"""`kill -9` at random moments of a training, which is then run again; and what must be the same in the end.

At full scale (a transformer of 10 million parameters; about half an hour on two quiet cores):

    python tests/train/killed_trainings.py runs/kills docs/results/killed_training.json
"""

import argparse
import hashlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from omni.train.metrics import read_metrics

CASES = Path(__file__).with_name("training_cases.py")
FULL = ("steps=600", "log_every=5", "checkpoint_every=40", "dim=512", "depth=6", "documents=2000", "dropout=0.1")


def start(run: Path, settings: tuple[str, ...]) -> subprocess.Popen:
    """A training of the small transformer; what it prints goes to RUN.log."""
    command = [sys.executable, str(CASES), "language", str(run), *settings]
    with run.with_suffix(".log").open("a") as log:
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)


def finish(run: Path, settings: tuple[str, ...], timeout: float = 3600) -> None:
    """Runs a training to its end."""
    process = start(run, settings)
    try:
        code = process.wait(timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert code == 0, run.with_suffix(".log").read_text()[-3000:]


def inside_a_save(run: Path) -> bool:
    """A checkpoint is being written: orbax has its directory under a temporary name."""
    return any("tmp" in path.name for path in (run / "checkpoints").glob("*"))


def logged(run: Path) -> int:
    """The last step in the log."""
    return max((line["step"] for line in read_metrics(run)), default=0)


def stop(run: Path, settings: tuple[str, ...], moment: str, draw: random.Random, *, sent: int = signal.SIGKILL) -> dict:
    """Starts a training and stops it: 'any' a random while after it has begun to log, 'save' inside a save.

    Returns:
      At which step it stood, whether inside a save, and how it ended.
    """
    before, process = logged(run), start(run, settings)
    while logged(run) <= before and not (moment == "save" and inside_a_save(run)):
        assert process.poll() is None, run.with_suffix(".log").read_text()[-3000:]
        time.sleep(0.02)  # the log is read anew each time, which would take a core from the training
    if moment == "save":
        while not inside_a_save(run) and process.poll() is None:
            time.sleep(0.0002)
        time.sleep(draw.uniform(0, 0.02))
    else:
        time.sleep(draw.uniform(0, 1))
    os.killpg(process.pid, sent)
    code = process.wait()
    return {"moment": moment, "step": logged(run), "inside a save": inside_a_save(run), "code": code}


def found(run: epath.PathLike) -> dict:
    """All that must not depend on interruptions: hashes of the last state, where the data stands, and the log."""
    run = epath.Path(run)
    step = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    checkpoint = run / "checkpoints" / str(step)
    state = ocp.StandardCheckpointer().restore(checkpoint / "state")
    hashes = {
        jax.tree_util.keystr(path): hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    parts = {
        part: hashlib.sha256(json.dumps({k: v for k, v in hashes.items() if part in k}).encode()).hexdigest()
        for part in ("params", "optimizer", "ema", "step")
    }
    position = json.loads((checkpoint / "data" / "metadata").read_text())
    return {**parts, "data": position, "log": [_repeatable(line) for line in read_metrics(run)]}


def _repeatable(line: dict) -> dict:
    """A line of the log without times, and without what is measured only where a run was stopped and saved."""
    return {
        name: value
        for name, value in line.items()
        if not name.startswith(("time/", "held_out/"))
        and name not in ("steps_per_second", "tokens_per_second", "goodput")
    }


def kill_loop(root: Path, settings: tuple[str, ...], kills: int, seed: int = 0) -> dict:
    """A run that nothing disturbs, and one that is killed, a third of the times in a save, and at last terminated.

    Returns:
      What was the same in the end, and each stop.
    """
    draw, stops = random.Random(seed), []
    finish(root / "undisturbed", settings)
    while len(stops) < kills:
        stops.append(stop(root / "killed", settings, "save" if len(stops) % 3 == 1 else "any", draw))
    stops.append(stop(root / "killed", settings, "any", draw, sent=signal.SIGTERM))
    assert stops[-1]["code"] == 75, stops[-1]
    finish(root / "killed", settings)
    expected, killed = found(root / "undisturbed"), found(root / "killed")
    return {"same": {name: killed[name] == expected[name] for name in expected}, "stops": stops}


def main() -> None:
    """Kills one run at random moments, finishes it and compares it with an undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="directory for both runs, which is not there yet")
    parser.add_argument("output", type=Path, help="JSON file to write")
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.directory.mkdir(parents=True)
    result = kill_loop(options.directory.resolve(), FULL, options.kills, options.seed)
    command = shlex.join(["python", *sys.argv])
    options.output.write_text(json.dumps({"command": command, "settings": FULL, **result}, indent=1) + "\n")
    print(f"wrote {options.output}: {result['same']}")
    sys.exit(not all(result["same"].values()))


if __name__ == "__main__":
    main()
