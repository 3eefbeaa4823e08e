"""Measured cells on disk: an evaluation that was killed and is run again repeats none that was finished."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from tqdm import tqdm

from omni.bundle import Model
from omni.model.files import settings_of_the_model


def model_hash(model: Model) -> str:
    """First 16 hex digits of the SHA-256 over parameters, configuration, vocabulary, grammar, tokenizers and sampling
    settings."""
    tokenizers = {modality: tokenizer.hash for modality, tokenizer in model.tokenizers.items()}
    config = [settings_of_the_model(model.config), model.context_length]
    names = [model.vocabulary.hash, model.grammar.hash, tokenizers, model.generation, config]
    digest = hashlib.sha256(json.dumps(names, sort_keys=True).encode())
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model.transformer)))
    for path, leaf in leaves:
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()[:16]


class Cells:
    """Results by name, in a directory of their own for each key (model, data, settings).

    An evaluation of something else, such as a quick look, therefore leaves those of a whole one where they are.
    """

    def __init__(self, directory: epath.Path, key: dict[str, Any]):
        self.directory = directory / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        self.directory.mkdir(parents=True, exist_ok=True)
        self.seconds_before = 0.0
        """What the cells that `measure` only had to read took when they were computed."""

    def finished(self, name: str) -> bool:
        """Whether a cell need not be computed again."""
        return self._read(name) is not None

    def measure(self, name: str, compute: Callable[[], dict]) -> dict:
        """The result of a cell, computed and written unless it was before."""
        content = self._read(name)
        if content is not None:
            self.seconds_before += content["seconds"]
            return content["result"]
        start = time.monotonic()
        result = plain(compute())
        write_json(self._path(name), {"seconds": round(time.monotonic() - start, 2), "result": result})
        return result

    def measure_all(self, plan: dict[str, tuple[int, Callable[[Callable[[int], None]], dict]]], unit: str) -> dict:
        """The results of all cells of a plan, with a progress bar over those that are still to do.

        Args:
          plan: for each cell how much there is to do, and what computes it, given what it tells of its progress.
          unit: what the amounts count.
        """
        to_do = sum(amount for name, (amount, _) in plan.items() if not self.finished(name))
        measured = {}
        with tqdm(total=to_do, desc="evaluation", unit=unit, smoothing=0.1, dynamic_ncols=True) as bar:
            for name, (_, compute) in plan.items():
                bar.set_postfix_str(name)
                measured[name] = self.measure(name, functools.partial(compute, bar.update))
        return measured

    def _read(self, name: str) -> dict | None:
        try:
            return json.loads(self._path(name).read_text())
        except (FileNotFoundError, ValueError):
            return None

    def _path(self, name: str) -> epath.Path:
        return self.directory / f"{name.replace('->', '_to_').replace(' ', '_')}.json"


def plain(value: Any) -> Any:
    """What JSON holds: numpy scalars as numbers, NaN and infinity as null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: epath.Path, content: Any) -> None:
    """Writes a JSON file that appears only when it is whole."""
    partial = path.parent / f"{path.name}.partial"
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)
