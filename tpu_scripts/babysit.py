"""Keeps a run going to its end: machines that are lost are created again, what was interrupted goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import runs
from gcloud import EXIT_USAGE, PodError, TryLater, UsageError
from machines import Pod

# Exit codes of a run that was told to end and has saved itself: omni's own (TERM, Ctrl-C), and a shell's for TERM.
INTERRUPTED = {75, 130, 143}
FINISHED, INTERRUPTION, FAILURE, LOSS, DEAD = "finished", "was interrupted", "failed", "lost its machines", "dead host"


@dataclass(frozen=True)
class Limits:
    """When to give up, and how patiently to look."""

    failures: int = 5
    """Times that the run itself may fail."""
    losses: int = 100
    """Times that machines may be preempted, die, or not be had."""
    poll: float = 30.0
    """Seconds between looks."""
    silence: int = 3
    """Looks in a row at which a host does not answer, while others do, before it counts as dead."""
    pause: float = 300.0
    """Seconds before another try where there were no machines, or nothing answered."""


def babysit(pod: Pod, name: str, command: list[str], source: Path, limits: Limits) -> None:
    """Creates, installs, launches and watches until the run has finished on every host.

    Raises:
      UsageError: the run's command says that it is used wrongly (exit code 2).
      QuotaRefused: the project may not have the machines.
      PodError: the run was stopped on purpose, or a limit is reached.
    """
    most = {FAILURE: limits.failures, LOSS: limits.losses, INTERRUPTION: limits.losses}
    counts = dict.fromkeys(most, 0)
    while True:
        try:
            outcome, reason = _attempt(pod, name, command, source, limits)
            pause = 0.0
        except TryLater as error:
            outcome, reason, pause = LOSS, str(error), limits.pause
        if pod.gcloud.dry_run:
            print("# whenever machines are lost, and then all from the start:")
            pod.delete()
            return
        if outcome == FINISHED:
            pod.gcloud.say(f"{name} has finished on every host")
            return
        counts[outcome] += 1
        if counts[outcome] > most[outcome]:
            raise PodError(f"{name} {outcome} {counts[outcome]} times, the last time: {reason}; giving up")
        pod.gcloud.say(f"{name} {outcome}: {reason}; it goes on")
        time.sleep(pause)


def _attempt(pod: Pod, name: str, command: list[str], source: Path, limits: Limits) -> tuple[str, str]:
    """Brings up, launches and watches once; how it ended, and why."""
    pod.bring_up(limits.poll)
    try:
        outcome, reason = _start(pod, name, command, source) or _watch(pod, name, limits)
    except TryLater:
        if (state := pod.state()).ready:
            raise
        return LOSS, str(state)  # the machines vanished between two questions: there is nothing to wait for
    if outcome == DEAD:  # it does not come back by itself, and the other hosts are of no use alone
        pod.gcloud.say(reason)
        pod.delete()
        return LOSS, reason
    if outcome in (FAILURE, INTERRUPTION):
        time.sleep(limits.poll)  # machines that vanish take their run with them a moment before they say so
        if not (state := pod.state()).ready:
            return LOSS, str(state)
        runs.ask(pod, state, ["stop", name, "KILL"])  # processes that wait for one that has ended
    return outcome, reason


def _start(pod: Pod, name: str, command: list[str], source: Path) -> tuple[str, str] | None:
    """Installs and launches; what went wrong, None if nothing did."""
    try:
        runs.install(pod, source)
        runs.launch(pod, name, command)
    except (UsageError, TryLater):
        raise
    except runs.DeadHost as error:
        return DEAD, str(error)
    except PodError as error:
        return FAILURE, str(error)
    return None


def _watch(pod: Pod, name: str, limits: Limits) -> tuple[str, str]:
    """Looks until the run has ended on all hosts, or badly on one."""
    silent = 0
    while True:
        state = pod.state()
        if state.coming:  # under repair
            time.sleep(limits.poll)
            continue
        if not state.ready:
            return LOSS, str(state)
        hosts = runs.status(pod, name, state)
        if pod.gcloud.dry_run:
            return FINISHED, ""
        try:
            runs.require_answers(hosts)
            silent = 0
        except runs.DeadHost as error:
            silent += 1
            if silent == limits.silence:
                return DEAD, str(error)
        if ended := _ended(hosts):
            return ended
        time.sleep(limits.poll)


def _ended(hosts: list[runs.Host]) -> tuple[str, str] | None:
    """How the run has ended, from its hosts' answers; None while it goes on."""

    def which(wanted: Callable[[runs.Host], bool]) -> str:
        return ", ".join(f"{host}: {host.word}" for host in hosts if wanted(host))

    if wrong := which(lambda host: host.exit_code == EXIT_USAGE):
        raise UsageError(f"the command is used wrongly ({wrong}); `pod.py logs` shows what it says")
    if stopped := which(lambda host: host.word == "stopped"):
        raise PodError(f"the run was stopped ({stopped}); launch it again to go on")
    if failed := which(lambda host: host.exit_code not in (None, 0, *INTERRUPTED) or _strayed(host)):
        return FAILURE, failed
    if any(host.exit_code is None for host in hosts):
        return None  # runs, or does not answer yet
    if interrupted := which(lambda host: host.exit_code != 0):
        return INTERRUPTION, interrupted
    return FINISHED, ""


def _strayed(host: runs.Host) -> bool:
    return host.word in ("lost", "absent") or host.word.startswith("failed")
