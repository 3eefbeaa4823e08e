"""A side of a comparison in a process of its own, called as if it were here."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from typing import Any, Self

from omni_tokenizers.errors import OmniError


class Remote:
    """An object in another process: ``remote.call("method", ...)`` returns what the method does there.

    Raises:
        OmniError: by `call`, what went wrong over there, in one line.
    """

    def __init__(self, name: str, make: Callable[..., Any], *arguments):
        """`make(*arguments)` builds the object over there; `name` is for messages."""
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self._answer()

    def call(self, method: str, *arguments) -> Any:
        """Calls a method and waits for its result."""
        return self._answer((method, arguments))

    def _answer(self, message: tuple | None = None) -> Any:
        try:
            if message is not None:
                self._connection.send(message)
            error, result = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            raise OmniError(
                f"{self.name}: the process ended by itself (exit {self._process.exitcode}); was memory short?"
            ) from None
        if error is not None:
            raise OmniError(f"{self.name}: {error}")
        return result

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()


def _serve(connection, make: Callable[..., Any], arguments: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller tells the user, and closes the connection
    served, method = None, None
    while True:
        try:
            if served is None:
                served, result = make(*arguments), None
            else:
                result = getattr(served, method)(*arguments)
            connection.send((None, result))
        except Exception as error:
            line = str(error).strip().splitlines()
            kind = "" if isinstance(error, OmniError) else f"{type(error).__name__}: "
            connection.send((kind + (line[0] if line else "no message"), None))
        try:
            method, arguments = connection.recv()
        except (EOFError, OSError):
            return
