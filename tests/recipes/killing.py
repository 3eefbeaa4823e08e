"""`kill -9` at chosen moments of a quickstart, which is then run again; and what must be the same in the end.

At full scale, beside a finished undisturbed run (an hour on two cores, most of it the run itself):

    python tests/recipes/killing.py runs/quickstart runs/killed docs/results/killed.json
"""

import argparse
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

FINAL = ("weights.safetensors", "tokenizers/image/weights.safetensors", "tokenizers/audio/weights.safetensors")


def inside_a_save(run: Path) -> bool:
    """A checkpoint of the transformer is being written: orbax has its directory under a temporary name."""
    return any("tmp" in path.name for path in (run / "training" / "transformer").glob("checkpoints/*"))


def has_checkpoint(run: Path, name: str) -> bool:
    """A checkpoint of a training is whole."""
    return any(path.name.isdigit() for path in (run / "training" / name).glob("checkpoints/*"))


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "image training, after a checkpoint": lambda run: has_checkpoint(run, "image"),
    "writing documents": lambda run: (run / "tokens.partial").exists(),
    "inside a checkpoint's writing": inside_a_save,
    "evaluation, after some of its cells": lambda run: any((run / "evaluation" / "cells").glob("*/*.json")),
}


def start(output: Path, arguments: Sequence[str] = (), path: Path | None = None) -> subprocess.Popen:
    """A quickstart, of the tree or of the package in the directory `path`; what it prints goes to OUTPUT.log."""
    command = [sys.executable, "-m", "omni.cli", "quickstart", "--output", str(output), *arguments]
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    with output.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, env=environment, cwd=output.parent
        )


def finish(process: subprocess.Popen, output: Path, timeout: float = 900) -> str:
    """What a quickstart has printed, when it has ended well."""
    try:
        code = process.wait(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    printed = output.with_suffix(".log").read_text()
    assert code == 0, printed[-3000:]
    return printed


def kill_at(moment: str, run: Path, arguments: Sequence[str] = (), timeout: float = 600) -> None:
    """Starts a quickstart and kills it when it has reached a moment; again if a save was over before the signal."""
    for _ in range(4):
        process, deadline = start(run, arguments), time.monotonic() + timeout
        while not MOMENTS[moment](run):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise AssertionError(f"{moment} never came: {run.with_suffix('.log').read_text()[-3000:]}")
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if moment != "inside a checkpoint's writing" or inside_a_save(run):
            return
    raise AssertionError("every checkpoint was committed before the kill")


def digest(path: Path) -> str:
    """What stands for a file's bytes; pytest would take hours to show how two files of weights differ."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def found(run: Path) -> dict:
    """All that must not depend on interruptions: hashes of the final weights, and every result but the times."""
    results = json.loads((run / "evaluation" / "results.json").read_text())
    del results["seconds"], results["attempts"]
    return {name: digest(run / name) for name in FINAL} | {"results": results}


def main() -> None:
    """Kills one run at all moments in turn, finishes it and compares it with an undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("undisturbed", type=Path, help="a finished run of omni quickstart")
    parser.add_argument("run", type=Path, help="directory for the run that is killed")
    parser.add_argument("output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    run = options.run.resolve()
    if run.exists():
        parser.error(f"{run} is there; name a directory that is not")
    run.parent.mkdir(parents=True, exist_ok=True)
    expected = found(options.undisturbed)
    for moment in MOMENTS:
        print(f"killing at: {moment}", flush=True)
        kill_at(moment, run, timeout=3600)
    finish(start(run), run, timeout=3600)
    killed = found(run)
    same = {name: killed[name] == expected[name] for name in expected}
    attempts = json.loads((run / "evaluation" / "results.json").read_text())["attempts"]
    content = {
        "command": shlex.join(["python", *sys.argv]),
        "killed": list(MOMENTS),
        "attempts": attempts,
        "same": same,
        "sha256": {name: {"undisturbed": expected[name], "killed": killed[name]} for name in FINAL},
        "signature": killed["results"]["signature"],
    }
    options.output.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {options.output}: {same}")
    sys.exit(not all(same.values()))


if __name__ == "__main__":
    main()
