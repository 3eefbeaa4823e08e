"""README's figures are those of the results that it points to."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODALITIES = ("text", "image", "audio")


def shown(cell: dict) -> str:
    accuracy, ceiling = (f"{100 * cell[name]:.1f}".replace("100.0", "100") for name in ("accuracy", "ceiling"))
    return f"{accuracy} % ({ceiling})"


def test_tables_show_the_results():
    """Every cross-modal cell of the two tables, in order: the quickstart's, and those of the model in the box."""
    quickstart = json.loads((ROOT / "docs" / "results" / "quickstart.json").read_text())["results"]
    boxed = json.loads((ROOT / "omni" / "recipes" / "models" / "digits" / "made.json").read_text())["results"]
    expected = [
        shown(results["matrix"][source][target])
        for results in (quickstart, boxed)
        for source in MODALITIES
        for target in MODALITIES
        if source != target
    ]
    cells = re.findall(r"[\d.]+ % \([\d.]+\)", (ROOT / "README.md").read_text())
    assert cells == expected
