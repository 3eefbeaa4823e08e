"""Experiment files and command-line overrides.

An experiment is a Python file whose docstring holds its launch command and measured result and which defines `config`:
a frozen dataclass with a `run()` method (`omni.train.loop.TrainConfig`, `omni.recipes.digits.DigitsRecipe`).
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import TypeVar

import tyro

from omni_tokenizers.errors import OmniError, UsageError

Config = TypeVar("Config")


def load_experiment(path: str | Path):
    """The `config` of an experiment file; `UsageError` if there is no such file, `OmniError` if it defines none."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such experiment file (the file comes first, its settings after it)")
    try:
        names = runpy.run_path(str(path))
    except OmniError:
        raise
    except Exception as error:
        raise OmniError(f"{path}: {type(error).__name__}: {error}") from error
    config = names.get("config")
    if not hasattr(config, "run"):
        raise OmniError(f"{path}: an experiment defines `config`, a configuration with a run() method")
    return config


def override(config: Config, arguments: list[str], prog: str) -> Config:
    """The configuration with command-line overrides such as `--optimizer.learning-rate 1e-3` applied.

    tyro prints the help, and names the nearest key for an unknown one and exits with 2.
    """
    return tyro.cli(type(config), default=config, args=arguments, prog=prog, config=(tyro.conf.FlagConversionOff,))
