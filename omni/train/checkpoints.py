"""Checkpoints of a run: the state, where the data stands and JSON objects, committed together or not at all.

Orbax writes a step under another name and renames it when it is whole, in a thread beside training. A step that was
interrupted is never seen again; the one before stays until the next is committed.
"""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from omni.train.run_directory import CHECKPOINTS, CONFIG, differences, read_json
from omni.train.step import TrainState
from omni_tokenizers.errors import OmniError


class Checkpoints:
    """The checkpoints in a run's directory.

    Args:
      keep: how many of the newest stay.
      metadata: JSON objects by name that every checkpoint carries.
    """

    def __init__(self, directory: epath.PathLike, keep: int, metadata: dict[str, dict[str, Any]]):
        self.directory = epath.Path(directory).resolve() / CHECKPOINTS
        self._metadata = metadata
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest(self) -> int | None:
        """The newest committed step."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The committed steps that are kept, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, data: dict[str, Any]) -> None:
        """Begins to write a checkpoint; the state may change as soon as this returns.

        Args:
          data: the data iterator's state, JSON.

        Raises:
          OmniError: this checkpoint, or the one before it, could not be written.
        """
        step = int(state.step)
        if step == self.latest():
            return
        items = {name: ocp.args.JsonSave(content) for name, content in self._metadata.items()}
        items |= {"state": ocp.args.StandardSave(state), "data": ocp.args.JsonSave(data)}
        self._write(lambda: self._manager.save(step, args=ocp.args.Composite(**items), force=True))

    def wait(self) -> None:
        """Returns when what was saved is committed; `OmniError` if it could not be."""
        self._write(self._manager.wait_until_finished)

    def restore(self, abstract: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        """The state of a step, on the shardings of `abstract` (shapes), and the data iterator's state with it.

        Args:
          step: one of `steps`; the newest by default.

        Raises:
          OmniError: the checkpoint cannot be read, or carries other JSON objects than this run's.
        """
        step = self.latest() if step is None else step
        path = self.directory / str(step)
        items = {name: ocp.args.JsonRestore() for name in ("data", *self._metadata)}
        found = _read(path, lambda: self._manager.restore(step, args=ocp.args.Composite(**items)))
        for name, content in self._metadata.items():
            if lines := differences(content, found[name]):
                raise OmniError(f"{path}: the checkpoint has another {name} ({'; '.join(lines)})")
        state = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return _read(path, lambda: self._manager.restore(step, args=state))["state"], found["data"]

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(Exception):  # `save` and `wait` tell what went wrong
            self._manager.close()  # after what is being written

    def _write(self, action) -> None:
        try:
            action()
        except Exception as error:  # orbax passes on whatever its storage raises
            good = self.latest()
            rest = "there is none before it" if good is None else f"the one of step {good} is whole: run again to go on"
            raise OmniError(f"{self.directory}: a checkpoint could not be written ({_line(error)}); {rest}") from error


def restore_params(run: epath.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters in a run's newest checkpoint, averaged ones where there are some, and the run's configuration.

    Returns:
      Nested dicts of numpy arrays by module and parameter name, and the content of config.json.

    Raises:
      OmniError: the directory is no run, or it has no checkpoint yet.
    """
    run = epath.Path(run).resolve()
    config = read_json(run / CONFIG)
    steps = ocp.utils.checkpoint_steps(run / CHECKPOINTS) if (run / CHECKPOINTS).exists() else []
    if not steps:
        raise OmniError(f"{run}: no checkpoint there yet")
    path = run / CHECKPOINTS / str(max(steps)) / "state"
    handler = ocp.PyTreeCheckpointHandler()
    tree = _read(path, lambda: handler.metadata(path).tree)
    name = "ema" if tree.get("ema") else "params"
    wanted = {name: tree[name]}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    arguments = ocp.args.PyTreeRestore(wanted, restore_args=as_numpy, partial_restore=True)
    found = _read(path, lambda: handler.restore(path, args=arguments))
    return _plain(found[name]), config


def _plain(tree: Any) -> Any:
    """Variables, which are saved as {"value": array}, become arrays, and numbers as names become numbers."""
    if not isinstance(tree, dict):
        return tree
    if tree.keys() == {"value"} and not isinstance(tree["value"], dict):
        return tree["value"]
    return {int(name) if name.isdigit() else name: _plain(branch) for name, branch in tree.items()}


def _read(path: epath.Path, action) -> Any:
    try:
        return action()
    except Exception as error:
        raise OmniError(
            f"{path}: the checkpoint cannot be read ({_line(error)}); remove it to go on from the one before"
        ) from error


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
