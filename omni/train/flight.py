"""The flight recorder: where a run's time goes, how fast it is, and a trace of some of its steps."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from etils import epath

from omni.accelerators import accelerator_of
from omni.train.task import Work
from omni_tokenizers.errors import UsageError

PROFILE = "profile"


class FlightRecorder:
    """Measures where time goes, from the moment that it is made."""

    def __init__(self):
        self._began, self._spent, self._since = time.monotonic(), Counter(), Counter()

    @contextmanager
    def spending(self, what: str, *, counts: bool = True) -> Iterator[None]:
        """What happens inside is time spent on `what` instead of on steps, if that counts."""
        began = time.monotonic()
        try:
            yield
        finally:
            seconds = (time.monotonic() - began) * counts
            self._spent[what] += seconds
            self._since[what] += seconds

    def values(self) -> dict[str, float]:
        """Metrics: `time/...`, the seconds since the last call in which steps waited, by what they waited for, and
        `goodput`, the share of all time that was left for steps."""
        elapsed = time.monotonic() - self._began
        values = {f"time/{what}": self._since[what] for what in sorted(self._spent)}
        self._since.clear()
        return values | {"goodput": 1 - sum(self._spent.values()) / elapsed}


def speed(work: Work | None, examples: int, steps_per_second: float) -> dict[str, float]:
    """Metrics: `tokens_per_second`, and `mfu`, the FLOPs of the model by those that all devices have in bfloat16, where
    these are known; none of a task without tokens.

    Args:
      work: of an example.
      examples: in a step, all devices together.
    """
    if work is None:
        return {}
    tokens, peak = steps_per_second * examples * work.tokens, peak_flops(jax.devices()[0].device_kind)
    mfu = {"mfu": tokens * work.flops_per_token / (peak * jax.device_count())} if peak else {}
    return {"tokens_per_second": tokens} | mfu


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s of a device, bfloat16; None for one that the table does not know, such as a CPU."""
    accelerator = accelerator_of(device_kind)
    return accelerator and accelerator.flops


def profile_steps(steps: str) -> tuple[int, int]:
    """'10:15' as (10, 15); `UsageError` for what is none."""
    first, _, last = steps.partition(":")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise UsageError(f"profile is {steps!r}; write the first and the last step to trace, such as 10:15")
    return int(first), int(last)


class Profile:
    """Traces steps for xprof into `profile/` of the run's directory.

    Args:
      steps: first and last, such as '10:15'; None traces nothing.
    """

    def __init__(self, steps: str | None, output: epath.Path):
        self._steps = profile_steps(steps) if steps else (0, 0)
        self._output, self._folder = output / PROFILE, None

    def before(self, step: int) -> None:
        """Begins to trace if this is the first step to be traced, or one between as the run goes on there."""
        first, last = self._steps
        if first <= step <= last and self._folder is None:
            self._folder = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(self._folder.name)

    def after(self, step: int, results: Any) -> None:
        """Ends the trace after its last step, when the devices have computed the step's results."""
        if self._folder is not None and step == self._steps[1]:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Writes what was traced."""
        if self._folder is None:
            return
        jax.profiler.stop_trace()
        folder, self._folder = self._folder, None
        with folder:  # the profiler writes to disks only, a run's directory may be elsewhere
            for path in Path(folder.name).rglob("*"):
                if path.is_file():
                    target = self._output / path.relative_to(folder.name).as_posix()
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(path.read_bytes())

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_) -> None:
        self.close()
