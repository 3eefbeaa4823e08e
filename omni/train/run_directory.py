"""What stands in a run's directory besides checkpoints and log: its configuration, and the mark that it is finished."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from etils import epath

from omni.data.examples import Examples
from omni.data.sources import Source
from omni.storage import is_remote
from omni.train.task import Task
from omni_tokenizers.errors import OmniError

CONFIG, FINISHED, CHECKPOINTS = "config.json", "finished.json", "checkpoints"
MAY_CHANGE = (
    *("output", "steps", "log_every", "checkpoint_every", "keep", "keep_best", "mesh"),
    *("skip", "lost_after", "profile", "wandb", "recipe"),
)
"""Settings with which a run can go on when they change."""


def to_json(value: Any) -> Any:
    """A configuration as JSON; tasks, examples and sources carry the names of their classes as `type`."""
    if dataclasses.is_dataclass(value):
        fields = {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields} if isinstance(value, (Task, Examples, Source)) else fields
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def claim(
    directory: epath.Path, config: dict[str, Any], *, may_change: Collection[str] = (), write: bool = True
) -> None:
    """Writes config.json into a run's directory, which may hold the same run already.

    Args:
      may_change: settings with which this kind of run can go on when they change, besides `MAY_CHANGE`.
      write: False only looks: of several processes that claim one directory, one writes.

    Raises:
      OmniError: it holds a run with other settings; they are listed.
    """
    if (directory / CONFIG).exists():
        found = read_json(directory / CONFIG)
        free = {*MAY_CHANGE, *may_change}
        lines = differences(
            *({key: value for key, value in each.items() if key not in free} for each in (config, found))
        )
        if lines:
            raise OmniError(
                f"{directory} holds a run with other settings ({'; '.join(lines)}); "
                "choose another output, or remove it to begin anew"
            )
    if write:
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / CONFIG, config)


def finished_steps(directory: epath.Path) -> int:
    """The steps after which the run in a directory was finished; 0 if it was not."""
    path = directory / FINISHED
    return int(read_json(path).get("steps", 0)) if path.exists() else 0


def differences(here: Any, there: Any, where: str = "") -> list[str]:
    """What differs between two JSON values, a line each, by dotted keys; empty if they are the same.

    A key that is absent and one that is null are the same: a setting that came later is null unless it is chosen.
    """
    if isinstance(here, dict) and isinstance(there, dict):
        keys = [*here, *(key for key in there if key not in here)]
        prefix = f"{where}." if where else ""
        return [line for key in keys for line in differences(here.get(key), there.get(key), f"{prefix}{key}")]
    return [] if here == there else [f"{where}: {_short(here)} here, {_short(there)} there"]


def read_json(path: epath.Path) -> Any:
    """The content of a JSON file; `OmniError` if it is missing or none."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise OmniError(f"{path}: there is no such file") from None
    except ValueError as error:
        raise OmniError(f"{path}: not valid JSON ({error})") from None


def write_json(path: epath.Path, content: Any) -> None:
    """Writes a JSON file that appears only when it is whole; several processes may write the same one."""
    partial = path.parent / f"{path.name}.{uuid.uuid4().hex[:8]}.partial"
    with writing(path):
        partial.write_text(json.dumps(content, indent=2) + "\n")
        partial.replace(path)


@contextmanager
def writing(path: epath.Path) -> Iterator[None]:
    """What the system says against writing (a full disk, no permission) becomes an `OmniError` that names the path."""
    try:
        yield
    except OSError as error:
        raise OmniError(f"{path}: could not be written ({error.strerror or error})") from error
    except Exception as error:
        if isinstance(error, OmniError) or not is_remote(path):
            raise
        raise OmniError(f"{path}: could not be written ({type(error).__name__}: {error})") from error  # a bucket's


def _short(value: Any) -> str:
    text = "none" if value is None else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
