"""The command that measures a trained tokenizer of a recipe: `python -m omni.recipes.NAME_evaluation RUN FILE.json`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import omni_tokenizers
from omni.exits import exits


def measuring_command(description: str, evaluate: Callable[[omni_tokenizers.Tokenizer], dict]) -> None:
    """Writes what `evaluate` finds of the tokenizer that the command line names, and prints it."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("run", help="the directory of a trained tokenizer")
    parser.add_argument("results", type=Path, help="the JSON file to write")
    options = parser.parse_args()
    with exits():
        results = evaluate(omni_tokenizers.load(options.run))
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
