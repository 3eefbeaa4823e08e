"""The log of a run: a line of JSON per logged step in `metrics.jsonl`, and TensorBoard events in `tensorboard/`."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable

from etils import epath
from tensorboardX import SummaryWriter

from omni.train.run_directory import writing
from omni.train.step import Metrics

FILE = "metrics.jsonl"


class MetricsLog:
    """Appends to the log of the run in `directory` (None: nowhere), after dropping what lies behind `step`.

    A run that goes on from a checkpoint takes some steps again: no step is to stand in the log twice.
    """

    def __init__(self, directory: epath.Path | None, step: int):
        self._directory, self._step = directory, step

    def __enter__(self) -> MetricsLog:
        if self._directory is not None:
            logging.getLogger("tensorboardX").setLevel(logging.ERROR)
            with writing(self._directory / FILE):
                _rewind(self._directory / FILE, self._step)
                self._file = (self._directory / FILE).open("a")
                self._events = SummaryWriter(str(self._directory / "tensorboard"), purge_step=self._step + 1)
        return self

    def write(self, step: int, values: dict[str, float]) -> None:
        """Logs the values of a step; `OmniError` if the disk does not take them."""
        if self._directory is None:
            return
        with writing(self._directory / FILE):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def __exit__(self, *_) -> None:
        if self._directory is not None:
            with contextlib.suppress(OSError):  # a full disk, of which `write` has told
                self._file.close()
                self._events.close()


def read_metrics(directory: epath.PathLike) -> list[dict[str, float]]:
    """The lines of a run's log, by step; empty where there is none."""
    path = epath.Path(directory) / FILE
    return list(_lines(path.read_text())) if path.exists() else []


def training_seconds(directory: epath.PathLike) -> dict[int, float]:
    """Seconds that a run had trained for at each logged step, the steps of all its attempts together.

    Measured: the sum of what each line took since the one before. They include compiling and waiting for data, but
    neither the measuring of held-out batches nor steps that were lost when the run was killed.
    """
    seconds, elapsed, before = {}, 0.0, 0
    for line in read_metrics(directory):
        elapsed += (line["step"] - before) / line["steps_per_second"]
        before = line["step"]
        seconds[before] = elapsed
    return seconds


def mean(sums: Iterable[Metrics]) -> dict[str, float]:
    """Metrics of several steps (host values), each total over its weight; those that weigh nothing are left out."""
    totals: dict[str, list[float]] = {}
    for metrics in sums:
        for name, (total, weight) in metrics.items():
            sum_ = totals.setdefault(name, [0.0, 0.0])
            sum_[0] += float(total)
            sum_[1] += float(weight)
    return {name: total / weight for name, (total, weight) in sorted(totals.items()) if weight}


def _lines(text: str) -> Iterable[dict[str, float]]:
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # cut off when the run was killed
            return


def _rewind(path: epath.Path, step: int) -> None:
    lines = list(_lines(path.read_text())) if path.exists() else []
    kept = "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step)
    partial = path.parent / f"{path.name}.partial"
    partial.write_text(kept)
    partial.replace(path)
