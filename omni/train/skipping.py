"""Steps that change nothing: those whose loss or gradient is no number, and, if wanted, those whose loss is a spike.

Whether a step is one is decided inside the compiled step (`omni.train.step`); here they are counted, named and limited.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from omni.train.step import Metrics
from omni_tokenizers.errors import OmniError, UsageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SkipConfig:
    """Which steps change nothing, and how many of them a run takes."""

    in_a_row: int = 10
    """Skipped steps in a row that end the run."""
    total: int = 1000
    """Skipped steps in all that end the run."""
    spike: float | None = None
    """Multiple of the loss's running mean above which a step is skipped too; None skips only what is no number."""

    def __post_init__(self) -> None:
        for name in ("in_a_row", "total"):
            if getattr(self, name) < 1:
                raise UsageError(f"skip.{name} is {getattr(self, name)}; it must be at least 1")
        if self.spike is not None and not self.spike > 1:
            raise UsageError(f"skip.spike is {self.spike}; it must be above 1")


@dataclass
class SkippedSteps:
    """The steps that a run has skipped."""

    total: int = 0
    in_a_row: int = 0
    """Those at the end of what was counted."""
    longest: int = 0
    """The most in a row since `sift` was last called."""
    last: str = ""
    """Which was the last, and why."""

    def to_json(self) -> dict[str, Any]:
        """What a run that goes on needs."""
        return asdict(self)

    def sift(self, last: int, window: Sequence[Metrics]) -> list[Metrics]:
        """The metrics (host values) of the steps that were not skipped; those that were are counted and logged.

        Args:
          last: number of the step to which the last metrics belong.
        """
        taken, self.longest = [], 0
        for step, metrics in enumerate(window, start=last + 1 - len(window)):
            if not metrics["skipped"][0]:
                taken.append({name: value for name, value in metrics.items() if name != "skipped"})
                self.in_a_row = 0
                continue
            self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
            self.longest, self.last = max(self.longest, self.in_a_row), f"step {step}: {_reason(metrics)}"
            logger.warning("%s; it is skipped (%d in a row, %d in all)", self.last, self.in_a_row, self.total)
        return taken

    def too_many(self, limits: SkipConfig) -> bool:
        """Whether steps that `sift` has just found reach a limit."""
        return self.longest > 0 and (self.longest >= limits.in_a_row or self.total >= limits.total)

    def failure(self, output: Any) -> OmniError:
        """What is raised when they do, and the state before them is saved."""
        return OmniError(
            f"{output}: {self.longest} steps in a row and {self.total} in all were skipped, the last was {self.last}; "
            "the state before them is saved. Lower the learning rate, or raise skip.in_a_row or skip.total"
        )


def _reason(metrics: Metrics) -> str:
    for name in ("loss", "gradient_norm", "critic/loss", "critic/gradient_norm"):
        if name in metrics and not math.isfinite(metrics[name][0]):
            return f"{name} is not finite"
    total, weight = metrics["loss"]
    return f"the loss, {total / weight:.4g}, is a spike"
