"""A run that starts from another one's parameters, as far as names and shapes agree."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx

from omni.train.checkpoints import restore_params
from omni.train.step import TrainState
from omni_tokenizers.errors import UsageError

logger = logging.getLogger(__name__)


def start_from(state: TrainState, run: epath.PathLike, patterns: Sequence[str]) -> TrainState:
    """The state with the parameters of another run's newest checkpoint, and a report in the log.

    Args:
      patterns: which parameters, by dotted names such as `blocks.*`; `*` stands for anything.

    Raises:
      OmniError: the other directory is no run, or it has no checkpoint.
      UsageError: a pattern fits no parameter, or none fits that the other run has in the same shape.
    """
    theirs = {_name(path): value for path, value in _leaves(restore_params(run)[0])}
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
        elif theirs[name].shape != shape:
            left[name] = f"{list(theirs[name].shape)} there, {list(shape)} here"
        else:
            taken[path] = _placed(theirs[name], variable.get_value())
    _report(run, names, {_name(path) for path in taken}, left, theirs)
    if not taken:
        raise UsageError(f"start_from: {run} has none of the parameters; the log says why")
    flat = [(path, variable.replace(taken[path]) if path in taken else variable) for path, variable in ours]
    params = nnx.from_flat_state(flat)
    ema = state.ema and jax.tree.map(lambda x: x.copy(), params)  # buffers of its own: a step is given both
    return dataclasses.replace(state, params=params, ema=ema)


def _report(run: Any, names: list[str], taken: set[str], left: dict[str, str], theirs: dict[str, Any]) -> None:
    logger.info("%s: %d of %d parameters are taken from there", run, len(taken), len(names))
    for name in sorted(taken):
        logger.info("  taken: %s %s", name, list(theirs[name].shape))
    for name, why in left.items():
        logger.info("  fresh: %s (%s)", name, why)
    for name in sorted(theirs.keys() - set(names)):
        logger.info("  unused: %s (not here)", name)


def _placed(values: np.ndarray, like: jax.Array) -> jax.Array:
    values = np.asarray(values, like.dtype)
    return jax.make_array_from_callback(values.shape, like.sharding, values.__getitem__)


def _leaves(tree: dict[Any, Any], path: tuple = ()) -> list[tuple[tuple, np.ndarray]]:
    if not isinstance(tree, dict):
        return [(path, tree)]
    return [leaf for name, branch in tree.items() for leaf in _leaves(branch, (*path, name))]


def _name(path: Sequence[Any]) -> str:
    return ".".join(map(str, path))
