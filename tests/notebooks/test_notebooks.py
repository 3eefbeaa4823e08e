"""Every notebook runs from beginning to end in a fresh kernel and shows what it says; its outputs are kept in it."""

import os
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra notebook")
nbclient = pytest.importorskip("nbclient", reason="needs the extra notebook")

FOLDER = Path(__file__).parents[2] / "experiments" / "notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
LARGEST = 400_000  # bytes of a notebook with its outputs
SHOWN = {
    "evaluate": [
        r"text -> image +(9\d\.\d|100\.0)%.+?% to",
        r"image -> text +(9\d\.\d|100\.0)%.+?% to",
        r"image:text +60 .+\ntext:image +60 ",
        "<iframe",
    ],
    "generate": ["<img", "<audio", r"Model\(text, image; 0\.1 million parameters\)"],
    "import_and_export": [
        "published logits unchanged: True",
        "equal logits: True",
        "Qwen3ForCausalLM",
        "image/svg",
        "<img",
    ],
    "train_a_tokenizer": [r"PSNR (2\d\.\d+) dB", "same codes: True", "image/svg", "image/png"],
    "train_and_resume": [
        r"interrupted; stopped is saved at step \d+",
        r"(\d+) of \1 arrays have the same bits",
        "the same losses at the same steps: True",
        r"embedding +\(\d+, 64\) +tensor, fsdp .+12\.5%",
        "image/svg",
    ],
}
"""What stands in the outputs of each notebook, as patterns: what it promises, and what it shows it with."""
SAME_WORDS = ("generate",)
"""Notebooks that say the same wherever they run, but for how long sounds are."""
A_DUMP = re.compile(
    r"array\(|Array\(\[|dtype=|\[ *-?\d+\.\d*(e[-+]\d+)?,? +-?\d+\.\d*|\[ *\d+,? +\d+,? +\d+,? +\d+,? +\d+"
)
"""What the content of an array looks like when numpy, JAX or a list prints it."""
ON_A_SIGNAL = "omni: a step is finished and saved first"
"""The one line that is meant for stderr; pytest keeps kernels from showing it."""


def outputs(notebook) -> list[dict[str, str]]:
    """Each output by MIME type; what is printed is plain text."""
    found = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    found = [output for output in found if ON_A_SIGNAL not in output.get("text", "")]
    return [output["data"] if "data" in output else {output["name"]: output["text"]} for output in found]


def in_words(notebook) -> list[str]:
    """Each output without pictures; how long a sound is may differ between processors, on which its tokens are drawn
    from probabilities that are not the same to the last bit."""
    words = [each["text/plain"] if "text/plain" in each else "".join(each.values()) for each in outputs(notebook)]
    return [re.sub(r"\d+\.\d+ s", "SECONDS", word) for word in words]


def check(name: str, notebook) -> None:
    """What holds of the outputs of a notebook, kept ones and new ones alike."""
    everything = "\n".join(f"{form}: {value}" for each in outputs(notebook) for form, value in each.items())
    for pattern in SHOWN[name]:
        assert re.search(pattern, everything), pattern
    assert not (found := A_DUMP.search("\n".join(in_words(notebook)))), found
    assert not (noise := [each["stderr"] for each in outputs(notebook) if "stderr" in each]), noise


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_its_outputs_are_kept(name):
    """They are small, show what the notebook says, come from one run from top to bottom, and do not say when."""
    assert (FOLDER / f"{name}.ipynb").stat().st_size < LARGEST
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    check(name, notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert not any("execution" in cell.metadata for cell in notebook.cells)


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_runs(name, tmp_path, optimised_processes):
    """No cell fails, outputs show what is said in the forms that are kept, and nothing is left beside the notebook."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    forms, words = [sorted(each) for each in outputs(notebook)], in_words(notebook)
    folder, temporary = tmp_path / "folder", tmp_path / "temporary"
    folder.mkdir()
    temporary.mkdir()  # an ended kernel may leave there what it would have removed
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
    client.execute(env=os.environ | {"TMPDIR": str(temporary)})
    check(name, notebook)
    assert [sorted(each) for each in outputs(notebook)] == forms
    assert name not in SAME_WORDS or in_words(notebook) == words
    assert not list(folder.iterdir())


def test_a_dump_is_seen():
    """The pattern finds how arrays print, and lets tables, shapes and texts of this package pass."""
    for dump in (
        "array([1, 2])",
        "Array([0., 1.], dtype=float32)",
        "[[ 0.1  0.25]",
        "[1, 2, 3, 4, 5, 6]",
        "[ 12  3 4 5 6]",
    ):
        assert A_DUMP.search(dump), dump
    for text in (
        "Codes(ids=int32[142, 16, 16])",
        "(2, 64, 4, 16)",
        "[Text('zero', context), Image(32x32)]",
        "0.02 (0.01 to 0.03)",
    ):
        assert not A_DUMP.search(text), text
