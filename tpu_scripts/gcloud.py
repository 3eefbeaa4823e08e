"""Running gcloud. A dry run prints every command as it could be typed, and runs none."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

# What gcloud says where another try may go better.
CAPACITY = r"no more capacity|insufficient (reserved )?capacity|stockout"
PASSING = (
    r"^(INTERNAL|UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED)|"
    r"connection|timed out|too long|failed to resolve|unable to find the server"
)

SOURCES = {"gcloud": "https://cloud.google.com/sdk/docs/install", "xpk": "pip install xpk"}
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


class PodError(Exception):
    """What went wrong, for whoever typed the command: what, where, what to do."""

    exit_code = EXIT_FAILED


class UsageError(PodError):
    """A wrong argument or setting; trying again does not help."""

    exit_code = EXIT_USAGE


class QuotaRefused(PodError):
    """The project may not have this many chips, in the service's words; trying again does not help."""

    def __init__(self, words: str):
        super().__init__(
            f"quota refused: {words}; ask for more under IAM & Admin > Quotas, or delete what holds it "
            "(preempted and suspended machines count until they are deleted)"
        )


class TryLater(PodError):
    """The zone has no free machines now, or the service or the network does not answer; trying again later helps."""


class Finished(NamedTuple):
    """How a command ended; `code` is None if it took too long and was killed."""

    code: int | None
    output: str
    errors: str


class Gcloud:
    """gcloud with a project and a zone.

    Args:
      project: its id; empty for the one that gcloud is set to.
      dry_run: print commands instead of running them.
    """

    def __init__(self, project: str, zone: str, dry_run: bool):
        self.dry_run = dry_run
        self._place = [f"--zone={zone}", *([f"--project={project}"] if project else [])]

    def say(self, message: str) -> None:
        """Tells whoever watches what is going on; a dry run shows commands alone."""
        if not self.dry_run:
            print(f"pod: {message}", file=sys.stderr, flush=True)

    def describe(self, kind: str, name: str, supposed: dict[str, Any] | None) -> dict[str, Any] | None:
        """A resource as gcloud describes it, None if there is none.

        Args:
          kind: tpu-vm or queued-resources.
          supposed: the answer in a dry run.

        Raises:
          PodError: gcloud gave another error.
        """
        finished = self._run(kind, "describe", name, "--format=json")
        if self.dry_run:
            return supposed
        if finished.code != 0 and "NOT_FOUND" in finished.errors:
            return None
        return json.loads(check(finished))

    def change(self, kind: str, verb: str, name: str, *flags: str) -> None:
        """Creates or deletes a resource.

        Raises:
          QuotaRefused, TryLater: no machines for this project, or for now.
          PodError: gcloud gave another error.
        """
        check(self._run(kind, verb, name, *flags, "--quiet"))

    def ssh(self, node: str, command: str, worker: str = "all", timeout: float = 600) -> Finished:
        """Runs a command on a node's hosts, all together."""
        # 10 attempts of 15 s instead of as many TCP timeouts; no terminal to ask anything on.
        flags = ["--ssh-flag=-o ConnectTimeout=15 -o BatchMode=yes", "--quiet"]
        return self._run("tpu-vm", "ssh", node, f"--worker={worker}", *flags, f"--command={command}", timeout=timeout)

    def follow(self, node: str, command: str, worker: str) -> int:
        """Runs a command on hosts of a node with its output going straight to the terminal; returns its exit code."""
        line = self._line("tpu-vm", "ssh", node, f"--worker={worker}", "--quiet", f"--command={command}")
        return self._print(line) if self.dry_run else start(line).wait()

    def copy(self, files: list[str], node: str) -> None:
        """Copies files into the home directory of all of a node's hosts; `PodError` if one does not take them."""
        flags = ["--worker=all", "--scp-flag=-oConnectTimeout=15", "--quiet"]
        check(self._run("tpu-vm", "scp", *files, f"{node}:", *flags))

    def _line(self, kind: str, verb: str, *arguments: str) -> list[str]:
        return ["gcloud", "compute", "tpus", kind, verb, *arguments, *self._place]

    def _run(self, kind: str, verb: str, *arguments: str, timeout: float | None = None) -> Finished:
        line = self._line(kind, verb, *arguments)
        if self.dry_run:
            self._print(line)
            return Finished(0, "", "")
        return run(line, timeout)

    def _print(self, line: list[str]) -> int:
        print(shlex.join(line), flush=True)
        return 0


def run(line: list[str], timeout: float | None = None) -> Finished:
    """Runs a command to its end; after `timeout` seconds it is killed with all that it has started."""
    # To files: children that outlive their parent would keep a pipe open, and its reader waiting.
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = start(line, stdout=output, stderr=errors, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:  # too late, or Ctrl-C
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        errors.seek(0)
        return Finished(code, output.read(), errors.read())


def check(finished: Finished) -> str:
    """The output of a command that went well; the error that says what went wrong of one that did not."""
    if finished.code == 0:
        return finished.output
    message = error_line(finished)
    if is_quota(message):
        raise QuotaRefused(message)
    if re.search(CAPACITY, message, re.IGNORECASE):
        raise TryLater(f"no capacity: {message}; try later, in another zone, or with queued = true")
    if re.search(PASSING, message, re.IGNORECASE):
        raise TryLater(f"gcloud: {message}")
    raise PodError(f"gcloud: {message}")


def is_quota(message: str) -> bool:
    """Whether the service speaks of quota."""
    return "quota" in message.lower()


def error_line(finished: Finished) -> str:
    """What gcloud said was wrong, without the name of the command before it."""
    lines = [line.strip() for line in finished.errors.splitlines() if line.strip()]
    found = next((line for line in lines if line.startswith("ERROR:")), lines[-1] if lines else "")
    if not found:
        return "it took too long" if finished.code is None else f"it ended with exit code {finished.code}"
    return re.sub(r"^ERROR: (\(gcloud[\w.-]*\) )?", "", found).rstrip(".")


def start(line: list[str], **settings: Any) -> subprocess.Popen:
    """Begins a command; `PodError` says where it comes from if it is not there."""
    try:
        return subprocess.Popen(line, **settings)
    except FileNotFoundError:
        source = SOURCES.get(line[0], "your system's packages")
        raise PodError(f"{line[0]} is not on the PATH; it comes from {source}") from None
