"""Experiment files and command-line overrides.

An experiment is a Python file whose docstring holds its launch command and measured result and which defines `config`:
a frozen dataclass with a `run()` method (`omni.train.loop.TrainConfig`, `omni.recipes.digits.DigitsRecipe`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import runpy
from collections.abc import Iterator
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

    Raises:
      UsageError: for an unknown key, with the nearest that there is, and for a value that does not fit its key.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            changed, unknown = tyro.cli(
                type(config),
                default=config,
                args=arguments,
                prog=prog,
                config=(tyro.conf.FlagConversionOff, tyro.conf.CascadeSubcommandArgs),
                return_unknown_args=True,
            )
    except SystemExit as exit:
        if not exit.code:  # --help
            raise
        raise UsageError(f"{_first_message(printed.getvalue())}; {prog} --help lists all keys") from None
    if unknown:
        key = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(key, _keys(config), n=1, cutoff=0.4)
        hint = f"; the nearest is {near[0]}" if near else ""
        raise UsageError(f"unknown configuration key {key}{hint}; {prog} --help lists all")
    return changed


def _keys(config, prefix: str = "--") -> Iterator[str]:
    """The command-line names of a configuration's settings, those of the configurations in it with a dot."""
    for field in dataclasses.fields(config):
        name, value = prefix + field.name.replace("_", "-"), getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _keys(value, f"{name}.")
        else:
            yield from [f"{name}.{key}" for key in value] if isinstance(value, dict) and value else [name]


def _first_message(box: str) -> str:
    """The first paragraph of a message that tyro has drawn a frame around."""
    lines = [line.strip("│ ").strip() for line in box.splitlines()[1:]]
    return " ".join(itertools.takewhile(lambda line: line.strip("─╰╯"), lines)).rstrip(".")
