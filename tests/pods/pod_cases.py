"""A pod's file, a checkout and a fake gcloud for the tests of tpu_scripts."""

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

from fake_gcloud import World

REPOSITORY = Path(__file__).parents[2]
POD = REPOSITORY / "tpu_scripts" / "pod.py"
# What `omni` is on the fake hosts: this interpreter and this checkout.
OMNI = f"""#!/bin/sh
export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=1
export PYTHONPATH='{REPOSITORY}:{REPOSITORY / "tokenizers"}'
exec '{sys.executable}' -m omni.cli "$@"
"""


class Cloud:
    """A fake gcloud on the PATH, and commands that find it there."""

    def __init__(self, root: Path):
        self.root = root
        (root / "world").mkdir()
        self.world = World(root / "world")
        fake = Path(__file__).with_name("fake_gcloud.py")
        self.program(root / "bin" / "gcloud", f'#!/bin/sh\nexec "{sys.executable}" -S "{fake}" "$@"\n')
        knows = 'case "$*" in *agent-worker-number) echo "$FAKE_WORKER" ;; *) exit 22 ;; esac\n'
        self.program(root / "world" / "host-bin" / "curl", f"#!/bin/sh\n{knows}")
        self.program(root / "omni", OMNI)
        self.environment = os.environ | {
            "PATH": f"{root / 'bin'}:{os.environ['PATH']}",
            "FAKE_GCLOUD": str(root / "world"),
        }
        self.source = root / "check out"
        self.source.mkdir()
        (self.source / "committed.txt").write_text("yes")
        for line in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=a start"]):
            self.git(*line)

    @staticmethod
    def program(path: Path, text: str) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def git(self, *line: str) -> None:
        who = ["-c", "user.name=A Tester", "-c", "user.email=tester@example.com"]
        subprocess.run(["git", "-C", str(self.source), *who, *line], check=True)

    def config(self, name: str = "mine", table: str = "", **settings) -> Path:
        """A pod's file; `table` is TOML behind its keys."""
        keys = {"zone": "here-a", "accelerator": "v5p-16", "version": "v2-alpha-tpuv5"}
        keys |= {"install": f"mkdir -p ~/omni/venv/bin && ln -s '{self.root}/omni' ~/omni/venv/bin/omni"}
        path = self.root / f"{name}.toml"
        lines = {"name": name} | keys | settings
        text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in lines.items())
        path.write_text(text + table)
        return path

    def start(self, *arguments) -> subprocess.Popen:
        """Begins `pod.py` with arguments."""
        line = [sys.executable, "-S", str(POD), *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(line, env=self.environment, **pipes)

    def pod(self, *arguments) -> subprocess.CompletedProcess:
        """Runs `pod.py` with arguments."""
        process = self.start(*arguments)
        output, errors = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def calls(self) -> list[str]:
        """All commands that gcloud was given."""
        calls = self.root / "world" / "calls"
        return [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []

    def end(self) -> None:
        """Kills what runs on the hosts."""
        for node in self.root.glob("world/tpu-vm-*.json"):
            self.world.kill(node.stem.removeprefix("tpu-vm-"))

    def words(self, pod: Path, name: str) -> list[str]:
        """How a run is on each host."""
        return [host["state"] for host in json.loads(self.pod("status", pod, name, "--json").stdout)["hosts"]]


def wait_for(found, seconds: float = 120):
    """What `found` gives as soon as it gives something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.05)
    raise AssertionError("waited in vain")
