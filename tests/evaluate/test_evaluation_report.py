"""The pieces of the matrix and the report."""

import dataclasses
import json
import re
import time
import xml.etree.ElementTree

import evaluation_fakes as fakes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni.evaluate import evaluate, read_samples, write_report
from omni.evaluate.data import draw_inputs
from omni.evaluate.intervals import cluster_interval, effective_count, wilson_interval
from omni.evaluate.matrix import derangement
from omni.evaluate.variety import fewest_differing
from omni.pages.curves import chart, read_boundaries, read_losses


def test_wilson_interval():
    """Values worked out by hand (Brown, Cai and DasGupta 2001): 0 of 10, 5 of 10, and 950 of 1,000."""
    assert wilson_interval(0, 10) == pytest.approx([0, 0.2775], abs=1e-4)
    assert wilson_interval(5, 10) == pytest.approx([0.2366, 0.7634], abs=1e-4)
    assert wilson_interval(950, 1000) == pytest.approx([0.9347, 0.9618], abs=1e-4)


def test_interval_of_clusters():
    """Worked out by hand: clusters of one mind count once each, independent outcomes count all, and so does Kish's."""
    right = np.array([1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1], bool)
    assert cluster_interval(right, [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3) == pytest.approx(wilson_interval(3, 4))
    assert cluster_interval(right, range(12)) == pytest.approx(wilson_interval(9, 12))
    # Sums 3, 0, 2, 1 of clusters of 3, share 1/2: variance 4/3 (2.25 + 2.25 + .25 + .25) / 144 = 5/108.
    mixed = np.array([1, 1, 1, 0, 0, 0, 1, 1, 0, 1, 0, 0], bool)
    assert effective_count(mixed, np.repeat(range(4), 3).tolist()) == pytest.approx(0.25 / (5 / 108))
    assert effective_count(np.ones(12, bool), np.repeat(range(4), 3).tolist()) == 4
    assert effective_count(np.zeros(3, bool), ["a"] * 3) == 1


def test_interval_of_clusters_covers():
    """95 % of intervals hold the true share where replies to one input are alike; Wilson's of all replies do not."""
    rng = np.random.default_rng(0)
    clusters = (np.arange(1000) % 359).tolist()
    covered, naive = 0, 0
    for _ in range(400):
        right = (rng.random(359) < 0.8)[clusters]
        low, high = cluster_interval(right, clusters)
        covered += low <= 0.8 <= high
        low, high = wilson_interval(right.sum(), 1000)
        naive += low <= 0.8 <= high
    assert covered >= 0.92 * 400 and naive < 0.85 * 400


def test_fewest_differing():
    """As comparing one by one finds it, over several blocks and shapes; twenty thousand sequences take no time."""
    rng = np.random.default_rng(0)
    items = [rng.integers(0, 3, (1, 4, 4)) for _ in range(150)] + [rng.integers(0, 3, (2, 1, n)) for n in (3, 4, 9)]
    known = [rng.integers(0, 3, (1, 4, 4)) for _ in range(200)] + [rng.integers(0, 3, (2, 1, n)) for n in (3, 3, 4)]
    slow = [min([(a != b).mean() for b in known if a.shape == b.shape], default=1.0) for a in items]
    assert fewest_differing(items, known).tolist() == slow and slow[-1] == 1.0
    many, replies = (list(rng.integers(0, 512, (count, 1, 4, 4))) for count in (20_000, 1000))
    start = time.process_time()
    assert len(fewest_differing(replies, many)) == 1000
    assert time.process_time() - start < 5


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
    seconds, attempts = {"data": 75.0}, {"data": 3}
    settings = dataclasses.replace(fakes.SMALL, per_direction=130)
    model = fakes.FakeModel(skill=0.9)
    results = evaluate(model, without, directory, settings, seconds=seconds, attempts=attempts)
    results["seconds"]["evaluation"] = 50.0
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


def test_report_shows_what_stands_behind_numbers(page):
    """How many inputs there are, near-copies, attempts, and the evaluation's own part of the whole time."""
    assert "n 130 of 60 inputs" in page and "n 60<br>" in page
    assert "<th>near-copies</th>" in page and "(3 attempts)" in page
    assert "<td>evaluation</td>" in page and "2 min 5 s" in page


def test_curves_read_only_losses(tmp_path):
    """Losses are taken by name, steps and accuracies are not; the axes begin and end around the values."""
    lines = [{"step": i, "loss": 1.0 + i, "loss/image": 2.0, "accuracy/image": 0.5} for i in range(3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    losses = read_losses(tmp_path / "metrics.jsonl")
    assert losses == {"loss": [(0, 1.0), (1, 2.0), (2, 3.0)], "loss/image": [(0, 2.0), (1, 2.0), (2, 2.0)]}
    drawn = chart("x", losses)
    assert not drawn.logarithmic and float(drawn.losses[0][1]) == 0 and float(drawn.losses[-1][1]) >= 3
    assert chart("x", {"loss": [(0, 10.0), (5, 0.1)]}).logarithmic and chart("x", {}) is None


def test_a_chart_shows_itself_in_a_notebook():
    """As one SVG that loads nothing, with every line in the drawing and the legend, its title escaped; its repr is
    short."""
    points = [(step, 5.0 / step) for step in range(1, 200)]
    drawn = chart("a < b", {"loss": points, "held_out/loss": points}, [100])
    root = xml.etree.ElementTree.fromstring(drawn._repr_svg_())
    lines = root.findall("{*}polyline")
    assert [line.get("points") for line in lines[:2]] == [line.points for line in drawn.lines] and len(lines) == 4
    assert [line.get("class") for line in lines] == ["c0", "c0 held"] * 2
    texts = [text.text for text in root.findall("{*}text")]
    assert texts[0] == "a < b" and texts[-2:] == ["loss", "loss, held out"] and "step" in texts
    assert len(root.findall("{*}line[@class='axis stage']")) == 1
    assert not re.search(r"(href|src|url|@import)", drawn._repr_svg_())
    assert repr(drawn) == "Chart(a < b: loss, loss, held out)"


def test_boundaries_of_stages_are_drawn(tmp_path):
    """A line stands at the last step of each stage but the last, where the losses of that step are; without stages
    there is none."""
    lines = [{"step": step, "loss": 1.0, "stage": 1 + (step > 20)} for step in (10, 20, 30, 40)]
    (tmp_path / "log").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_boundaries(tmp_path / "log") == [20]
    drawn = chart("x", read_losses(tmp_path / "log"), read_boundaries(tmp_path / "log"))
    assert [f"{x}" for x in drawn.stages] == [drawn.lines[0].points.split()[1].split(",")[0]]
    (tmp_path / "plain").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 1.0}\n')
    assert read_boundaries(tmp_path / "plain") == [] and chart("x", read_losses(tmp_path / "plain")).stages == []
