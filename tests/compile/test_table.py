"""The table of pods in the docs is that of the file of results, whose rows are the trainings that are there."""

import json
import re
from pathlib import Path

import pytest

from omni.compile.table import PODS, PUBLISHED, pods_table, published_table, verdict
from omni.experiment import load_experiment, override
from omni.model.presets import parameter_count

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "compile.json"


def configuration(pod):
    path = ROOT / "experiments" / f"{pod.experiment}.py"
    return override(load_experiment(path), list(pod.overrides), "test")


def test_docs_show_the_results():
    """The tables of docs/pods.md are made from the file of results; each row there was compiled by the command that
    would be typed today, with the length and batch of its experiment."""
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else {}
    text = (ROOT / "docs" / "pods.md").read_text()
    for table, names in ((pods_table(rows), PODS), (published_table(rows), PUBLISHED)):
        assert (table in text) == any(name in rows for name in names)
    for name, row in rows.items():
        pod = (PODS | PUBLISHED)[name]
        config = configuration(pod)
        assert row["command"] == pod.command()
        assert (row["length"], row["batch_size"]) == (config.task.row_length, config.batch_size), name


def test_shapes_are_as_large_as_they_are_called():
    """The experiments of all rows load with their overrides, and 32b has 32 billion parameters, within a sixth."""
    for name, pod in (PODS | PUBLISHED).items():
        model = configuration(pod).task.model
        if size := re.match(r"(\d+)b ", name):
            assert parameter_count(model) == pytest.approx(float(size.group(1)) * 1e9, rel=0.16), name


@pytest.mark.parametrize(
    ("mfu", "said"),
    [
        ((0.5, 0.6), "within 8 points"),
        ((0.7, 0.78), "within 8 points"),
        ((0.72, 0.9), "upper bound"),
        ((0.3, 0.54), "too low"),
    ],
)
def test_verdict(mfu, said):
    """A published 63 % is within 8 points of a range that begins at 70 %, not of one at 72 %, nor of one up to 54 %."""
    assert verdict({"mfu": mfu, "published": 63.0}) == said


@pytest.mark.aot
@pytest.mark.parametrize("name", PODS)
def test_pods_compile(name, monkeypatch):
    """Every pod of the table compiles, forward and backward, within its devices' memory."""
    monkeypatch.chdir(ROOT)
    found = PODS[name].compile()
    assert found["memory"]["total"] < found["memory"]["hbm"]
    assert (found["bytes"]["dcn"] > 0) == (PODS[name].slices > 1)
