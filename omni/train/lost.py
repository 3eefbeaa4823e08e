"""Several processes of a run stop together, and one that is lost or hangs is named by the others, which end.

All processes meet at barriers of jax's coordination service, which says who did not come in time. A thread of each does
so all the time, whatever the rest of the process waits for: who is killed, stopped or cut off does not come. And before
every step the processes themselves do: who has no batch does not come.

The service is part of process 0. If that stops, a barrier is never over; if it ends, jax aborts the others.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import logging
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import jax
from jax._src import distributed  # the service's client has no public name

from omni.exits import EXIT_FAILED, EXIT_LOST, EXIT_USAGE, leave
from omni_tokenizers.errors import OmniError, UsageError

logger = logging.getLogger(__name__)
_NUMBERS = itertools.count()
_BEGINNING = 10
"""How many times longer a process may stay away at first and while steps are compiled, which some find in a cache."""


class RollCall:
    """Finds out, while it is entered, which process of a run is missing; does nothing in a run of one.

    It also carries signals: what one process has received before a step, all know when they have met there.

    Args:
      seconds: after how long at most a process that stays away from the others ends them.
    """

    def __init__(self, seconds: float):
        self._seconds, self._step, self._over = seconds, 0, threading.Event()
        self._prefix = f"omni {next(_NUMBERS)}: "  # a process may train several times
        self._client = distributed.global_state.client if jax.process_count() > 1 else None
        self._alone = contextlib.ExitStack()  # what is in force where the service is another process's

    def __enter__(self) -> RollCall:
        if self._client is not None:
            if jax.process_index():
                self._alone.enter_context(before_aborting(self._aborting))
            threading.Thread(target=self._attend, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _) -> None:
        with self._alone:
            self._end(error)

    def _end(self, error: BaseException | None) -> None:
        if isinstance(error, Exception):
            self._failed(error)
        elif self._client is not None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # an interrupted process does not wait for long
                self._client.wait_at_barrier(
                    f"{self._prefix}end", int(1000 * self._seconds * (1 if error else _BEGINNING))
                )
        self._over.set()

    def before(self, step: int, received: signal.Signals | None, *, compiling: bool) -> signal.Signals | None:
        """Returns when all processes have come to a step; ends this one if another stays away.

        Args:
          received: the signal that this process has received, if any.

        Returns:
          One that any of them has received, the same in all of them.
        """
        if self._client is None:
            return received
        folder, self._step = f"{self._prefix}signals before step {step}/", step
        if received is not None:
            self._client.key_value_set(f"{folder}{jax.process_index()}", str(int(received)))
        if absent := self._absent(f"step {step}", self._seconds * (_BEGINNING if compiling else 1)):
            self._leave(absent)
        return max((signal.Signals(int(value)) for _, value in self._client.key_value_dir_get(folder)), default=None)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """What goes wrong inside ends this process at once if it is one of several, with who is missing if one is."""
        try:
            yield
        except Exception as error:
            self._failed(error)
            raise

    def _failed(self, error: Exception) -> None:
        if self._client is None or self._over.is_set():
            return
        if _is_broken_connection(error) or _is_broken_connection(error.__cause__):
            logger.error("step %d: %s", self._step, str(error).splitlines()[0])
            self._over.wait(self._seconds)  # until the thread has found out who is missing
        self._over.set()
        if isinstance(error, OmniError):  # a clean end would wait for the others, who wait for this one
            leave(error, EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED)

    def _attend(self) -> None:
        patience, turn = self._seconds * _BEGINNING, 0
        while not self._over.wait(0.2 * self._seconds):
            turn += 1
            silence = threading.Timer(patience + 0.2 * self._seconds, self._without_service)
            silence.daemon = True  # a run that is over does not wait for it
            if jax.process_index():
                silence.start()
            absent = self._absent(f"roll call {turn}", patience)
            silence.cancel()
            if absent and not self._over.is_set():
                self._leave(absent)
            patience = 0.6 * self._seconds

    def _absent(self, name: str, seconds: float) -> str:
        """Who does not come to a barrier in time; empty if all do."""
        try:
            self._client.wait_at_barrier(self._prefix + name, int(1000 * seconds))
        except jax.errors.JaxRuntimeError as error:
            unreachable = jax.process_index() and str(error).startswith("UNAVAILABLE")
            return _lost(["0"]) if unreachable else missing(str(error)) or str(error).splitlines()[0]
        return ""

    def _without_service(self) -> None:
        if not self._over.is_set():
            self._leave(_lost(["0"]))

    def _aborting(self) -> None:
        host, _, port = distributed.global_state.coordinator_address.rpartition(":")
        try:  # where the service answers, there is another reason
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        except OSError:
            self._without_service()

    def _leave(self, absent: str) -> NoReturn:
        if jax.process_index() == 0:
            time.sleep(2)  # the service ends with this process: let the others hear from it who is missing
        leave(f"step {self._step}: {absent}", EXIT_LOST)


def missing(error: str) -> str:
    """Who did not come, as a barrier's error says it; empty if it says nothing of that."""
    _, _, names = error.partition("timed out task names:")
    ranks = re.findall(r"(?:task:)?(\d+)\s*$", names.partition("RPC:")[0], re.MULTILINE)
    return _lost(ranks) if ranks else ""


def _lost(ranks: list[str]) -> str:
    return f"process {', '.join(ranks)} of {jax.process_count()} is lost or hangs"


@contextmanager
def before_aborting(act: Callable[[], None]) -> Iterator[None]:
    """Should this process abort inside, `act` is called first, by the thread that does.

    jax takes no function of Python's for the case that the coordination service ends (its binding fails on the status
    that would be handed over), and a handler of Python's `signal` never runs: this one is the C library's.
    """
    library = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: act())
    before = library.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        library.signal(signal.SIGABRT, before)


def _is_broken_connection(error: BaseException | None) -> bool:
    """Whether an error may come of a process that is no longer there; Gloo's (of CPUs) can be a `ValueError`."""
    return isinstance(error, (jax.errors.JaxRuntimeError, TimeoutError)) or "Gloo" in str(error)
