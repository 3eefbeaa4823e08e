"""How a command ends, with a line on stderr in place of a traceback.

| code | |
|---|---|
| 0 | done |
| 1 | failed |
| 2 | wrong usage |
| 75 | a training was told to stop (SIGTERM) and is saved: the same command goes on |
| 76 | another process of a training is lost or hangs, and the line names it: start all of them again |
| 130 | interrupted (Ctrl-C); a training is saved first |
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from omni_tokenizers.errors import OmniError, UsageError

EXIT_FAILED, EXIT_USAGE, EXIT_TERMINATED, EXIT_LOST, EXIT_INTERRUPTED = 1, 2, 75, 76, 130


class Terminated(KeyboardInterrupt):
    """SIGTERM ended the work, when it was saved."""


@contextmanager
def exits() -> Iterator[None]:
    """What goes wrong becomes a line on stderr and an exit code."""
    try:
        yield
    except UsageError as error:
        _fail(error, EXIT_USAGE)
    except OmniError as error:
        _fail(error, EXIT_FAILED)
    except Terminated as terminated:
        _fail(terminated, EXIT_TERMINATED)
    except KeyboardInterrupt as interrupt:
        _fail(str(interrupt) or "interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a full disk, no permission, a file where a directory is wanted
        _fail(f"{error.filename or 'input or output'}: {error.strerror or error}", EXIT_FAILED)


def leave(message: object, code: int) -> NoReturn:
    """Ends this process at once, without the clean-up that would wait for processes that are no longer there."""
    print(f"omni: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


def _fail(message: object, code: int) -> None:
    print(f"omni: {message}", file=sys.stderr)
    sys.exit(code)
