"""The log of a run: a line of JSON per logged step in `metrics.jsonl`, events for TensorBoard, and W&B."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from etils import epath

from omni.storage import absolute, is_remote, upload
from omni.train.run_directory import CONFIG, read_json, writing
from omni.train.step import Metrics
from omni.train.task import LARGEST
from omni_tokenizers.errors import OmniError

FILE = "metrics.jsonl"


class MetricsLog:
    """Appends to the log of the run in `directory` (None: nowhere), after dropping what lies behind `step`.

    A run that goes on from a checkpoint takes some steps again: no step is to stand in the log twice. To a bucket,
    which files cannot be appended to, the log is copied from a disk, by `publish`.

    Args:
      wandb: project of Weights & Biases that gets the same values; None: none does.

    Raises:
      OmniError: on entering, for a W&B project without W&B.
    """

    def __init__(self, directory: epath.Path | None, step: int, wandb: str | None = None):
        self._directory, self._step, self._project, self._wandb = directory, step, wandb, None
        self._staging = contextlib.ExitStack()

    def __enter__(self) -> MetricsLog:
        if self._directory is not None:
            logging.getLogger("tensorboardX").setLevel(logging.ERROR)
            with writing(self._directory / FILE):
                _rewind(self._directory / FILE, self._step)
                self._folder = Path(self._staging.enter_context(_on_a_disk(self._directory)))
                self._file = (self._folder / FILE).open("a")
                self._events = _summary_writer(self._folder / "tensorboard", self._step + 1)
            if self._project is not None:
                self._wandb = _wandb_run(self._project, self._directory, self._folder)
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
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def publish(self) -> None:
        """What has been logged is where it belongs when this returns; `OmniError` if it cannot be."""
        if self._directory is not None and is_remote(self._directory):
            with writing(self._directory / FILE):
                self._events.flush()
                for file in self._folder.rglob("*"):
                    if file.is_file():
                        upload(file, self._directory / file.relative_to(self._folder).as_posix())

    def __exit__(self, *_) -> None:
        if self._wandb is not None:
            self._wandb.finish()
        if self._directory is not None:
            with contextlib.suppress(OSError, OmniError), self._staging:  # a full disk, of which `write` has told
                self._file.close()
                self._events.close()
                self.publish()


def _summary_writer(folder: Path, purge_step: int):
    """tensorboardX's writer. Where torch is installed it is imported by that, for tensors that nobody hands over here:
    seconds of every start, so for the moment it is not there."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter(str(folder), purge_step=purge_step)


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


@dataclass
class Window:
    """What has been measured since the last line of the log; a run that is stopped goes on with it."""

    steps: int = 0
    seconds: float = 0.0
    totals: dict[str, list[float]] = field(default_factory=dict)
    """(total, weight) of each metric."""

    def add(self, sums: Iterable[Metrics]) -> None:
        """Adds metrics (host values) of steps."""
        for metrics in sums:
            for name, (total, weight) in metrics.items():
                if name.startswith(LARGEST):
                    if weight:
                        self.totals[name] = [max(float(total), *self.totals.get(name, [-math.inf])[:1]), 1.0]
                    continue
                sum_ = self.totals.setdefault(name, [0.0, 0.0])
                sum_[0] += float(total)
                sum_[1] += float(weight)

    def mean(self) -> dict[str, float]:
        """Each total over its weight; those that weigh nothing are left out."""
        return {name: total / weight for name, (total, weight) in sorted(self.totals.items()) if weight}

    def to_json(self) -> dict[str, Any]:
        """What a run that goes on needs."""
        return asdict(self)


def mean(sums: Iterable[Metrics]) -> dict[str, float]:
    """Metrics (host values) of several steps as one; see `Window`."""
    window = Window()
    window.add(sums)
    return window.mean()


@contextlib.contextmanager
def _on_a_disk(directory: epath.Path) -> Iterator[str]:
    """A directory on a disk that holds the log so far: the run's own, or a temporary one."""
    if not is_remote(directory):
        yield os.fspath(directory)
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / FILE).write_text((directory / FILE).read_text())
        yield folder


def _wandb_run(project: str, directory: epath.Path, folder: Path) -> Any:
    """The run of W&B that belongs to a run's directory, new or continued; its own files come into a folder."""
    try:
        import wandb
    except ImportError:
        raise OmniError("wandb is set, but W&B is not installed: pip install 'omni-any-to-any[wandb]'") from None
    identity = hashlib.sha256(os.fspath(absolute(directory)).encode()).hexdigest()[:16]
    return wandb.init(
        project=project,
        id=identity,
        resume="allow",
        name=directory.name,
        dir=folder,
        config=read_json(directory / CONFIG),
    )


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
