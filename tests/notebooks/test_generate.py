"""The notebook runs from beginning to end and shows what it says."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra notebook")
nbclient = pytest.importorskip("nbclient", reason="needs the extra notebook")

NOTEBOOK = Path(__file__).parents[2] / "experiments" / "notebooks" / "generate.ipynb"


def shown(notebook) -> str:
    """All outputs as one string."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(str(output.get("data", output.get("text", ""))) for output in outputs)


@pytest.mark.slow
def test_the_notebook_runs_and_shows_pictures_and_players(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    kept = shown(notebook)
    assert "<img" in kept and "<audio" in kept, "the outputs are kept in the file"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    found = shown(notebook)
    assert "<img" in found and "<audio" in found
    assert found.count("<img") == kept.count("<img") and found.count("<audio") == kept.count("<audio")
