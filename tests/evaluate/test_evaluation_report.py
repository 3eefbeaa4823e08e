"""The pieces of the matrix and the report."""

import json
import re

import evaluation_fakes as fakes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni.evaluate import evaluate, read_samples, write_report
from omni.evaluate.curves import chart, read_losses
from omni.evaluate.data import draw_inputs
from omni.evaluate.matrix import derangement, wilson_interval


def test_wilson_interval():
    """Values worked out by hand (Brown, Cai and DasGupta 2001): 0 of 10, 5 of 10, and 950 of 1,000."""
    assert wilson_interval(0, 10) == pytest.approx([0, 0.2775], abs=1e-4)
    assert wilson_interval(5, 10) == pytest.approx([0.2366, 0.7634], abs=1e-4)
    assert wilson_interval(950, 1000) == pytest.approx([0.9347, 0.9618], abs=1e-4)


@given(st.integers(2, 50), st.integers(0, 1000))
def test_derangement(count, seed):
    """Every place once, none in its own."""
    order = derangement(count, seed)
    assert sorted(order) == list(range(count)) and (order != np.arange(count)).all()


def test_inputs_cover_all_and_balance_text(data):
    """Every held-out picture is drawn before one comes twice; texts are spread evenly over classes and phrasings."""
    parts, labels = draw_inputs(data, "image", 90, seed=1)
    assert {id(part) for part in parts[:60]} == {id(part) for part in data.test["image"].parts} and len(parts) == 90
    texts, labels = draw_inputs(data, "text", 100, seed=1)
    assert np.bincount(labels).tolist() == [20] * 5
    assert [text.text for text in texts].count("the bee") == 10


@pytest.fixture(scope="module")
def page(data, tmp_path_factory):
    """A report of a model without sound, with a curve and a hostile text in it."""
    directory = tmp_path_factory.mktemp("report")
    without = type(data)(
        data.version,
        data.words,
        {"image": data.train["image"]},
        {modality: data.test[modality] for modality in ("text", "image")},
    )
    results = evaluate(fakes.FakeModel(skill=0.9), without, directory, fakes.SMALL, seconds={"data": 75.0})
    samples = read_samples(directory)
    samples["text->image"][0]["input"][0]["text"] = "<script>alert(1)</script>"
    lines = [json.dumps({"step": 10 * i, "loss": 5.0 / i, "held_out/loss": 6.0 / i}) for i in range(1, 30)]
    (directory / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 300, "lo']))
    curves = {"transformer": directory / "metrics.jsonl", "absent": directory / "none.jsonl"}
    return write_report(results, samples, curves, directory, command="omni eval runs/x").read_text()


def test_report_is_self_contained(page):
    """No address outside the page is loaded, no script stands in it, and it is small."""
    assert not re.search(r"https?://|<script|@import|<link", page)
    assert set(re.findall(r'src="([a-z]+:)', page)) == {"data:"} and 'src=""' not in page
    assert len(page) < 5_000_000


def test_report_shows_what_was_not_measured(page):
    """Directions with sound were never measured: they say so, and none shows 0."""
    assert page.count('<td class="none">not measured</td>') == 5
    assert "omni eval runs/x" in page and "&lt;script&gt;" in page and "1 min 15 s" in page
    assert page.count("<polyline") == 2


def test_curves_read_only_losses(tmp_path):
    """Losses are taken by name, steps and accuracies are not; the axes begin and end around the values."""
    lines = [{"step": i, "loss": 1.0 + i, "loss/image": 2.0, "accuracy/image": 0.5} for i in range(3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    losses = read_losses(tmp_path / "metrics.jsonl")
    assert losses == {"loss": [(0, 1.0), (1, 2.0), (2, 3.0)], "loss/image": [(0, 2.0), (1, 2.0), (2, 2.0)]}
    drawn = chart("x", losses)
    assert not drawn.logarithmic and float(drawn.losses[0][1]) == 0 and float(drawn.losses[-1][1]) >= 3
    assert chart("x", {"loss": [(0, 10.0), (5, 0.1)]}).logarithmic and chart("x", {}) is None
