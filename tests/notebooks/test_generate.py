"""The notebook runs from beginning to end and shows what it says."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra notebook")
nbclient = pytest.importorskip("nbclient", reason="needs the extra notebook")

NOTEBOOK = Path(__file__).parents[2] / "experiments" / "notebooks" / "generate.ipynb"


def shown(notebook) -> str:
    """All outputs as one string."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(str(output.get("data", output.get("text", ""))) for output in outputs)


def described(notebook) -> list[str]:
    """What each output says in words: the parts of replies, and their texts. How long a sound is may differ between
    processors, on which its tokens are drawn from probabilities that are not the same to the last bit."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    words = [str(output["data"]["text/plain"] if "data" in output else output["text"]) for output in outputs]
    return [re.sub(r"\d+\.\d+ s", "SECONDS", word) for word in words]


@pytest.mark.slow
def test_the_notebook_runs_and_says_and_shows_what_is_kept_in_it(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    kept, replies = shown(notebook), described(notebook)
    assert "<img" in kept and "<audio" in kept, "the outputs are kept in the file"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert described(notebook) == replies
