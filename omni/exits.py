"""How a command ends: 0 done, 1 failed, 2 wrong usage, 130 interrupted; a line on stderr in place of a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from omni_tokenizers.errors import OmniError, UsageError

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


@contextmanager
def exits() -> Iterator[None]:
    """What goes wrong becomes a line on stderr and an exit code."""
    try:
        yield
    except UsageError as error:
        _fail(error, EXIT_USAGE)
    except OmniError as error:
        _fail(error, EXIT_FAILED)
    except KeyboardInterrupt as interrupt:
        _fail(str(interrupt) or "interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a full disk, no permission, a file where a directory is wanted
        _fail(f"{error.filename or 'input or output'}: {error.strerror or error}", EXIT_FAILED)


def _fail(message: object, code: int) -> None:
    print(f"omni: {message}", file=sys.stderr)
    sys.exit(code)
