"""The table of docs/benchmarks.md is that of the results that it points to."""

import json
from pathlib import Path

from omni.bench.generation import as_markdown

DOCS = Path(__file__).parents[2] / "docs"


def test_replies():
    runs = json.loads((DOCS / "results" / "generate.json").read_text())["runs"]
    expected = [row for run in runs for row in as_markdown(run).splitlines()[5:]]
    _, _, table = (DOCS / "benchmarks.md").read_text().partition("| | batch | ours, s | torch, s |")
    assert table.split("\n\n")[0].splitlines()[2:] == expected and len(expected) == 6
