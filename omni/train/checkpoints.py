"""Checkpoints of a run: the state, where the data stands and JSON objects, committed together or not at all.

Orbax writes a step under another name and renames it when it is whole, in a thread beside training. A step that was
interrupted is never seen again; the one before stays until the next is committed. The same thread then writes the
step's manifest, by which a run that goes on finds out whether the step is still what was written.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import difflib
import logging
import os
import time
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from omni.storage import absolute
from omni.train.manifests import has_manifest, verify, write_manifest
from omni.train.placement import anywhere
from omni.train.run_directory import CHECKPOINTS, CONFIG, differences, read_json
from omni.train.step import TrainState
from omni_tokenizers.errors import OmniError, UsageError

logger = logging.getLogger(__name__)
REMOVED = "removed."
"""Beginning of the names of folders that are being removed."""
DAMAGED = "damaged"
"""Folder of a run in which damaged steps stay."""


class Checkpoints:
    """The checkpoints in a run's directory.

    Args:
      keep: how many of the newest stay.
      metadata: JSON objects by name that every checkpoint carries.
      best: a metric; the checkpoint in which it was lowest stays besides the newest.
    """

    def __init__(
        self, directory: epath.PathLike, keep: int, metadata: dict[str, dict[str, Any]], best: str | None = None
    ):
        self.directory = absolute(directory) / CHECKPOINTS
        self._metadata, self._best = metadata, best
        if jax.process_index() == 0:
            _remove_unfinished(self.directory)
        policies = [checkpoint_managers.LatestN(keep)]
        if best is not None:
            policies.append(_lowest(best))
        options = ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=True,
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            best_fn=None if best is None else lambda metrics: -metrics[best],
            temporary_path_class=_with_manifest(
                ocp.path.atomicity_defaults.get_default_temporary_path_class(self.directory)
            ),
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest(self) -> int | None:
        """The newest committed step."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The committed steps that are kept, oldest first."""
        return sorted(self._manager.all_steps())

    def newest_whole(self) -> int | None:
        """The newest step whose files are those of its manifest; None if there is no step.

        A damaged step is named in the log and set aside. All processes of a run call this together.

        Raises:
          OmniError: there are steps, and all of them are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            path = self.directory / str(step)
            if not has_manifest(path):
                logger.info("%s has no manifest and is taken unverified", path)
                return step
            wrong = verify(path, (jax.process_index(), jax.process_count()))
            if wrong:
                logger.warning("%s is damaged: %s", path, "; ".join(wrong))
            if not anywhere(bool(wrong)):
                return step
            self._set_aside(path, "; ".join(wrong) or "see the log of another process")
        if steps:
            raise OmniError(
                f"{self.directory}: every checkpoint is damaged; they are in {DAMAGED} now, and the same command "
                "begins anew"
            )
        return None

    def save(self, state: TrainState, data: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Begins to write a checkpoint; the state may change as soon as this returns.

        Args:
          data: where the data stands, JSON.
          metrics: what was measured at this step, among it the metric that says which checkpoint is the best.

        Raises:
          OmniError: this checkpoint, or the one before it, could not be written.
          UsageError: there is no such metric.
        """
        step = int(state.step)
        if step == self.latest():
            return
        items = {name: ocp.args.JsonSave(content) for name, content in self._metadata.items()}
        items |= {"state": ocp.args.StandardSave(state), "data": ocp.args.JsonSave(data)}
        chosen = self._chosen(metrics or {})
        self._write(lambda: self._manager.save(step, args=ocp.args.Composite(**items), metrics=chosen, force=True))

    def wait(self) -> None:
        """Returns when what was saved is committed; `OmniError` if it could not be."""
        self._write(self._manager.wait_until_finished)

    def restore(self, abstract: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        """The state of a step, on the shardings of `abstract` (shapes), and the data iterator's state with it.

        Args:
          step: one of `steps`; the newest by default.

        Raises:
          OmniError: the checkpoint cannot be read, carries other JSON objects than this run's, or holds a state of
            another version of this code.
        """
        step = self.latest() if step is None else step
        path = self.directory / str(step)
        items = {name: ocp.args.JsonRestore() for name in ("data", *self._metadata)}
        found = _read(path, lambda: self._manager.restore(step, args=ocp.args.Composite(**items)))
        for name, content in self._metadata.items():
            if lines := differences(content, found[name]):
                raise OmniError(f"{path}: the checkpoint has another {name} ({'; '.join(lines)})")
        if _has_masked_moments(written := _metadata(path / "state")):
            return _read(path, lambda: _with_masked_moments(path / "state", abstract)), found["data"]
        if names := sorted(_names(written) ^ _names(ocp.tree.serialize_tree(abstract, keep_empty_nodes=True))):
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise OmniError(
                f"{path}: the checkpoint is whole, but its state has other parts than this version's ({some} are in "
                "one of them alone); keep it, and go on with the version of omni that wrote it"
            )
        state = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return _read(path, lambda: self._manager.restore(step, args=state))["state"], found["data"]

    def _chosen(self, metrics: dict[str, float]) -> dict[str, float] | None:
        if self._best is None:
            return None
        if self._best not in metrics:
            nearest = difflib.get_close_matches(self._best, metrics, 1, 0)
            hint = f"; the nearest that there is is '{nearest[0]}'" if nearest else ""
            raise UsageError(f"keep_best names the metric '{self._best}', which is not measured{hint}")
        return {self._best: metrics[self._best]}

    def _set_aside(self, path: epath.Path, why: str) -> None:
        if jax.process_index() == 0:
            folder = self.directory.parent / DAMAGED
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{path.name}.txt").write_text(f"{why}\n")  # in a bucket, this is what makes the folder
            if (folder / path.name).exists():
                (folder / path.name).rmtree()
            path.rename(folder / path.name)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"set aside {path}")
        self._manager.reload()

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


def _with_manifest(base: type) -> type:
    """A kind of temporary directory of orbax that, once it is committed as a step, gets a manifest."""

    class WithManifest(base):
        async def finalize(self) -> None:
            await super().finalize()
            if self.get_final().name.isdigit():  # and no item of a step
                await asyncio.to_thread(write_manifest, self.get_final())

    return WithManifest


def _remove_unfinished(directory: epath.Path, seconds: float = 10.0) -> None:
    """Removes what was never committed, though writes of a run that failed in this process may still come in.

    Orbax removes it too, but takes a folder that fills while it is being emptied for a checkpoint that cannot be
    written. What is not gone after so many seconds is left to it.
    """
    give_up = time.monotonic() + seconds
    for path in directory.glob(f"*{ocp.path.atomicity.TMP_DIR_SUFFIX}*") if directory.exists() else ():
        if "://" not in os.fspath(path) and not path.name.startswith(REMOVED):
            path = path.rename(path.with_name(REMOVED + path.name))  # so that nobody commits what is half removed
        while path.exists() and time.monotonic() < give_up:
            try:
                path.rmtree()
            except OSError:
                time.sleep(0.1)


def _has_masked_moments(written: dict[str, Any]) -> bool:
    """Whether a state's moments lie as they did until frozen parameters were kept from the optimizer: one for all
    parameters held that of those that move."""
    optimizer = written.get("optimizer")
    return isinstance(optimizer, dict) and "moving" in optimizer.get("inner_states", ())


def _with_masked_moments(path: epath.Path, abstract: TrainState) -> TrainState:
    """The state in such a checkpoint."""
    deeper = {"inner_states": {"moving": {"inner_state": abstract.optimizer}}}
    wanted = dataclasses.replace(abstract, optimizer=deeper)
    places = ocp.checkpoint_utils.construct_restore_args(wanted)
    arguments = ocp.args.PyTreeRestore(wanted, restore_args=places, partial_restore=True)
    found = ocp.PyTreeCheckpointHandler().restore(path, args=arguments)
    return dataclasses.replace(found, optimizer=found.optimizer["inner_states"]["moving"]["inner_state"])


def _metadata(path: epath.Path) -> dict[str, Any]:
    """What a state's files say that it holds, as nested dicts and lists."""
    return _read(path, lambda: ocp.PyTreeCheckpointHandler().metadata(path).tree)


def _names(tree: Any) -> set[str]:
    paths = (path for path, _ in jax.tree.leaves_with_path(tree))
    return {jax.tree_util.keystr(path, simple=True, separator=".") for path in paths}


def newest_step(run: epath.PathLike) -> int:
    """The newest checkpoint's step in a run's directory; `OmniError` if it has none yet."""
    checkpoints = absolute(run) / CHECKPOINTS
    steps = ocp.utils.checkpoint_steps(checkpoints) if checkpoints.exists() else []
    if not steps:
        raise OmniError(f"{absolute(run)}: no checkpoint there yet")
    return max(steps)


def _lowest(metric: str) -> checkpoint_managers.PreservationPolicy:
    return checkpoint_managers.BestN(
        get_metric_fn=lambda metrics: -metrics[metric], n=1, keep_checkpoints_without_metrics=False
    )


def restore_params(run: epath.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters in a run's newest checkpoint, averaged ones where there are some, and the run's configuration.

    Returns:
      Nested dicts of numpy arrays by module and parameter name, and the content of config.json.

    Raises:
      OmniError: the directory is no run, or it has no checkpoint yet.
    """
    run = absolute(run)
    config = read_json(run / CONFIG)
    path = run / CHECKPOINTS / str(newest_step(run)) / "state"
    tree = _metadata(path)
    name = "ema" if tree.get("ema") else "params"
    wanted = {name: tree[name]}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    arguments = ocp.args.PyTreeRestore(wanted, restore_args=as_numpy, partial_restore=True)
    found = _read(path, lambda: ocp.PyTreeCheckpointHandler().restore(path, args=arguments))
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
