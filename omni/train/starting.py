"""A run that starts from the parameters of another one, or of a model, as far as names and shapes agree."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx

from omni.model.files import DESCRIPTION, WEIGHTS
from omni.model.lora import ADAPTERS
from omni.sharding import placed
from omni.train.checkpoints import CHECKPOINTS, newest_step, restore_params
from omni.train.optimizer import fits
from omni.train.run_directory import finished_steps
from omni.train.step import TrainState
from omni_tokenizers.errors import OmniError, UsageError
from omni_tokenizers.tensor_files import TensorFiles, open_file

logger = logging.getLogger(__name__)


def start_from(
    state: TrainState, run: epath.PathLike, patterns: Sequence[str], trained: Sequence[str] = ("*",)
) -> TrainState:
    """The state with the parameters of another run's newest checkpoint, or of a model, and a report in the log.

    A model's are read one by one: the host never holds two of them. A run with adapters gives its finished model, into
    which they are merged.

    Args:
      run: a run's directory, or one of a model, such as `omni import` writes.
      patterns: which parameters, by dotted names such as `blocks.*`; `*` stands for anything.
      trained: patterns of those that are trained; all others, which would stay as they were drawn, have to be taken.

    Raises:
      OmniError: the other directory is neither run nor model, or it has no checkpoint, or adapters that are trained
        further than its model.
      UsageError: a pattern fits no parameter, none fits that the other run has in the same shape, or not all are taken
        that are not trained.
    """
    theirs = _parameters(epath.Path(run))
    ours = nnx.to_flat_state(state.params)
    names = [_name(path) for path, _ in ours]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(f"start_names has {pattern!r}, which fits no parameter; there are {', '.join(names)}")
    taken, left = {}, {}
    for path, variable in ours:
        name, shape = _name(path), variable.get_value().shape
        if not any(fnmatchcase(name, pattern) for pattern in patterns):
            left[name] = "not asked for"
        elif name not in theirs:
            left[name] = "not there"
        elif theirs.shape(name) != shape:
            left[name] = f"{list(theirs.shape(name))} there, {list(shape)} here"
        else:
            like = variable.get_value()
            taken[path] = placed(np.asarray(theirs[name], like.dtype), like.sharding)
    _report(run, {_name(path): value.shape for path, value in taken.items()}, left, theirs)
    if not taken:
        raise UsageError(f"start_from: {run} has none of the parameters; the log says why")
    if random := [f"{name} ({why})" for name, why in left.items() if not fits(name.split("."), trained)]:
        raise UsageError(
            f"start_from: {', '.join(random)} would stay random, as the task does not train it; name a model that has "
            "all of the same shapes, and leave start_names out"
        )
    flat = [(path, variable.replace(taken[path]) if path in taken else variable) for path, variable in ours]
    params = nnx.from_flat_state(flat)
    ema = state.ema and jax.tree.map(lambda x: x.copy(), params)  # buffers of its own: a step is given both
    return dataclasses.replace(state, params=params, ema=ema)


class _Arrays(dict[str, np.ndarray]):
    """Arrays by name, as `TensorFiles` has them."""

    def shape(self, name: str) -> tuple[int, ...]:
        return self[name].shape


def _parameters(source: epath.Path) -> _Arrays | TensorFiles:
    """The parameters by dotted name: those of a run's newest checkpoint, else those of the model that lies there."""
    if not (source / CHECKPOINTS).exists() and (source / DESCRIPTION).exists():
        return open_file(source / WEIGHTS)
    found = _Arrays((_name(path), value) for path, value in _leaves(restore_params(source)[0]))
    if not any(fnmatchcase(name, ADAPTERS) for name in found):
        return found
    if finished_steps(source) < newest_step(source):
        raise OmniError(f"{source}: a run with adapters, which are merged at its end; let it finish first")
    return open_file(source / WEIGHTS)


def _report(
    run: Any, taken: Mapping[str, tuple[int, ...]], left: Mapping[str, str], theirs: _Arrays | TensorFiles
) -> None:
    logger.info("%s: %d of %d parameters are taken from there", run, len(taken), len(taken) + len(left))
    for name, shape in sorted(taken.items()):
        logger.info("  taken: %s %s", name, list(shape))
    for name, why in left.items():
        logger.info("  fresh: %s (%s)", name, why)
    for name in sorted(set(theirs) - set(taken) - set(left)):
        logger.info("  unused: %s (not here)", name)


def _leaves(tree: dict[Any, Any], path: tuple = ()) -> list[tuple[tuple, np.ndarray]]:
    if not isinstance(tree, dict):
        return [(path, tree)]
    return [leaf for name, branch in tree.items() for leaf in _leaves(branch, (*path, name))]


def _name(path: Sequence[Any]) -> str:
    return ".".join(map(str, path))
