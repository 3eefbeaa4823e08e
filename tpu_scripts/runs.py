"""What happens on the hosts of a pod: install, start, look, stop. `on_host.sh` is the half that runs there."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gcloud import Finished, PodError, TryLater, UsageError, error_line, run
from machines import Pod, State

ON_HOST = Path(__file__).with_name("on_host.sh")
NO_ANSWER, NOT_INSTALLED = "no answer", "nothing installed"
# The question to a host on which nothing is installed yet; `on_host.sh` says where its number is from.
ATTRIBUTE = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number"
PRESENT = f"echo omni-host $(curl --silent --fail --max-time 10 --header 'Metadata-Flavor: Google' {ATTRIBUTE}) present"


class DeadHost(PodError):
    """A host does not answer, though others do and its machine is said to be there."""


@dataclass(frozen=True)
class Host:
    """A host's answer: running, stopped, lost, absent, exit CODE, failed CODE, no answer, ..."""

    node: str
    number: int
    address: str
    word: str
    why: str = ""
    """What gcloud says of a host that does not answer."""

    @property
    def exit_code(self) -> int | None:
        """How the run's command ended there."""
        return int(self.word.removeprefix("exit ")) if self.word.startswith("exit ") else None

    def __str__(self) -> str:
        return f"host {self.number} of {self.node}" + (f" ({self.address})" if self.address else "")


def install(pod: Pod, source: Path) -> None:
    """Copies the committed files of a checkout to every host and runs the pod's install command there, once.

    Raises:
      UsageError: `source` is no git checkout.
      DeadHost, TryLater, PodError: a host does not answer, none does, or the command failed there.
    """
    state = pod.require_ready()
    commit = _commit(source, pod.gcloud.say)
    mark = hashlib.sha256(f"{commit} {pod.config.install}".encode()).hexdigest()[:16]
    with tempfile.TemporaryDirectory() as temporary:
        archive, script = Path(temporary) / "omni-source.tar.gz", Path(temporary) / "omni-on-host.sh"
        line = ["git", "-C", str(source), "archive", "--format=tar.gz", f"--output={archive}", commit]
        if pod.gcloud.dry_run:
            print(shlex.join(line))
        else:
            _archive(line)
        shutil.copy(ON_HOST, script)
        _copy(pod, state, [archive, script])
    hosts = ask(pod, state, ["install", mark, pod.config.install], timeout=3600)
    _require(pod, hosts, "install", "installed")
    pod.gcloud.say(f"commit {commit[:12]} is installed on {len(hosts)} hosts of {pod.config.name}")


def launch(pod: Pod, name: str, command: list[str]) -> None:
    """Starts a command under a run's name on every host, where it does not run already.

    Raises:
      UsageError: the run's name is none, or a variable that the pod's file lists is not set here.
      DeadHost, TryLater, PodError: a host does not answer, none does, or cannot start it.
    """
    check_name(name)
    state = pod.require_ready()
    with _environment_file(pod.config.environment, name) as file:
        if file:
            _copy(pod, state, [file])
    hosts = ask(pod, state, ["start", name, *command])
    _require(pod, hosts, "start", "started", "running before")
    pod.gcloud.say(f"{name} runs on {len(hosts)} hosts of {pod.config.name}")


def status(pod: Pod, name: str, state: State) -> list[Host]:
    """How a run is on every host of a ready pod; a host that does not answer says so."""
    return ask(pod, state, ["status", name])


def stop(pod: Pod, name: str) -> list[Host]:
    """Lets a run save itself and end on every host, and marks it there as stopped on purpose."""
    return ask(pod, pod.require_ready(), ["stop", name])


def on_host(arguments: list[str]) -> str:
    """The shell command that asks `on_host.sh` something."""
    return shlex.join(["bash", "omni-on-host.sh", *arguments])


def check_name(name: str) -> None:
    """Raises `UsageError` for a run's name that is no plain file name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise UsageError(f"{name!r} is no name of a run: letters, digits, '.', '_' and '-', a letter or digit first")


def ask(pod: Pod, state: State, arguments: list[str], timeout: float = 600) -> list[Host]:
    """Asks all hosts at once, and prints what those that failed have said.

    Args:
      state: of the ready pod, with its hosts.
    """
    return _asked(pod, state, on_host(arguments), timeout)


def _asked(pod: Pod, state: State, command: str, timeout: float = 600) -> list[Host]:
    def ask_node(node: str) -> Finished:
        return pod.gcloud.ssh(node, command, timeout=timeout)

    nodes = list(state.hosts)
    hosts = []
    for node, finished in zip(nodes, _each(ask_node, nodes, one_by_one=pod.gcloud.dry_run), strict=True):
        said = {int(number): word for number, word in re.findall(r"^omni-host (\d+) (.*)$", finished.output, re.M)}
        why, silent = error_line(finished), NO_ANSWER
        if "omni-on-host.sh: No such file" in finished.errors:
            silent = NOT_INSTALLED
        answers = [
            Host(node, number, address, said.get(number, silent), "" if number in said else why)
            for number, address in enumerate(state.hosts[node])
        ]
        if any(host.word.startswith("failed") for host in answers):
            print(*finished.errors.splitlines()[-20:], sep="\n", file=sys.stderr)
        hosts += answers
    return hosts


def require_answers(hosts: list[Host]) -> None:
    """Raises unless all hosts have answered.

    Raises:
      DeadHost: some have not.
      TryLater: none has, so that it is more likely the network or a key of this machine than all of theirs.
    """
    silent = [host for host in hosts if host.word == NO_ANSWER]
    if silent and len(silent) == len(hosts):
        raise TryLater(
            f"none of {len(hosts)} hosts answers: {silent[0].why}; is the network there, and the key known "
            "(ssh-add ~/.ssh/google_compute_engine)?"
        )
    if silent:
        raise DeadHost(f"{', '.join(map(str, silent))} does not answer: {silent[0].why}")


def _copy(pod: Pod, state: State, files: list[Path]) -> None:
    """Copies files to all hosts; raises as `require_answers` where one cannot be reached."""
    try:
        _each(lambda node: pod.gcloud.copy(list(map(str, files)), node), pod.config.nodes, pod.gcloud.dry_run)
    except PodError:
        require_answers(_asked(pod, state, PRESENT))  # copying does not say which host it was
        raise


def _each(function: Callable, items: list, one_by_one: bool) -> list:
    with ThreadPoolExecutor(1 if one_by_one else max(1, len(items))) as threads:
        return list(threads.map(function, items))


def _require(pod: Pod, hosts: list[Host], verb: str, *words: str) -> None:
    if pod.gcloud.dry_run:
        return
    require_answers(hosts)
    if any(host.word == NOT_INSTALLED for host in hosts):
        raise PodError(f"nothing is installed on {pod.config.name}; `pod.py install` comes first")
    if failed := [host for host in hosts if not host.word.startswith(words)]:
        raise PodError(f"{verb}: {', '.join(f'{host}: {host.word}' for host in failed)}; its last words are above")


def _archive(line: list[str]) -> None:
    finished = run(line)
    if finished.code != 0:
        raise PodError(f"git archive: {error_line(finished)}")


def _commit(source: Path, say: Callable[[str], None]) -> str:
    finished = run(["git", "-C", str(source), "rev-parse", "HEAD"])
    if finished.code != 0:
        raise UsageError(f"{source} is no git checkout; --source names one")
    if run(["git", "-C", str(source), "status", "--porcelain"]).output:
        say(f"{source} has changes that are not committed; they are not installed")
    return finished.output.strip()


@contextmanager
def _environment_file(names: list[str], run_name: str) -> Iterator[Path | None]:
    """A file that only its owner can read, with the values that the variables have here."""
    if missing := [name for name in names if name not in os.environ]:
        raise UsageError(f"{', '.join(missing)}: not set here, and the pod's file lists it under environment")
    if not names:
        yield None
        return
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / f"omni-environment.{run_name}"
        file.touch(mode=0o600)
        file.write_text("".join(f"export {name}={shlex.quote(os.environ[name])}\n" for name in names))
        yield file
