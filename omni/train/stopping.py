"""Signals that end a run: a step is finished and saved first."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from omni.exits import Terminated


@dataclass
class Received:
    """The signal that has come to this process, if any."""

    number: signal.Signals | None = None


def stopped(number: signal.Signals, output: object, step: int) -> KeyboardInterrupt:
    """What is raised when a run has been saved because of a signal."""
    kind, what = (Terminated, "terminated") if number == signal.SIGTERM else (KeyboardInterrupt, "interrupted")
    return kind(f"{what}; {output} is saved at step {step}: the same command goes on")


@contextmanager
def interruptible() -> Iterator[Received]:
    """Ctrl-C or SIGTERM is kept in what this yields, so that a step can be finished; a second one acts at once."""
    received = Received()
    if threading.current_thread() is not threading.main_thread():  # only there can signals be received
        yield received
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def receive(number: int, _) -> None:
        restore()
        received.number = signal.Signals(number)
        os.write(2, b"\nomni: a step is finished and saved first; once more stops at once\n")  # a log could deadlock

    for number in signals:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()
