"""What the digits recipe hands to evaluation, and the stages' seconds that go into its results."""

import json
import time
from collections import Counter

import numpy as np
import pytest
from etils import epath

from omni.data.shards import write_shards
from omni.grammar import Grammar, Span
from omni.recipes import digits, digits_documents
from omni.recipes.digits_evaluation import held_out_requests, trained_codes
from omni.vocabulary import Vocabulary


def test_requests_are_held_out_and_mixed():
    """No request is one that training draws, and the first 300 ask for one, two and three parts of every digit."""
    requests = held_out_requests()
    assert not {r.text for r in requests} & {r.text for r in digits_documents.requests("train")}
    assert len({r.text for r in requests}) == len(requests) >= 1000
    first = Counter(len(request.order) for request in requests[:300])
    assert min(first[1], first[2], first[3]) >= 30
    assert {request.label for request in requests[:300]} == set(range(10))
    assert requests == held_out_requests()


def test_trained_codes_are_all_codes_once(tmp_path):
    """Every picture of the training documents is found, in whatever part, and the same picture counts once."""
    names = ("<bos>", "<turn>", "<eos>", "<pad>", "<i>", "</i>")
    vocabulary = Vocabulary.build({"text": 4, "image": 8}, names)
    control = {name: f"<{name}>" for name in ("bos", "turn", "eos", "pad")}
    image = {"codebooks": ["image"], "open": ["<i>"], "close": ["</i>"], "shapes": [{"rows": 1, "columns": 2}]}
    declaration = {"format": 1, "control": control, "modalities": {"text": {"block": "text"}, "image": image}}
    grammar = Grammar(declaration, vocabulary)
    pictures = [np.array([[pair]], np.int32) for pair in ((0, 1), (2, 3), (4, 5))]

    def document(given: int, wanted: int):
        return grammar.pack([Span("image", pictures[given], True), Span("image", pictures[wanted])])

    write_shards(tmp_path / "tokens", [document(0, 1), document(1, 2), document(2, 2)], vocabulary, grammar, {})
    found = trained_codes(tmp_path / "tokens")
    assert sorted(codes.ravel().tolist() for codes in found["image"]) == [[0, 1], [2, 3], [4, 5]]
    assert set(found) == {"image"}


@pytest.fixture
def stages(tmp_path):
    """The stages of a run that has not begun."""
    return digits.Stages(epath.Path(tmp_path))


def interrupted():
    """A stage that somebody stops after a fifth of a second."""
    time.sleep(0.2)
    raise KeyboardInterrupt


def test_seconds_of_a_stage_add_up_over_attempts(stages):
    """An interrupted attempt's time counts, and the attempts are told; a stage done at once is not among them."""
    stages.run("data", lambda: None, "")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            stages.run("tokens", interrupted, "")
    assert stages.attempts() == {"tokens": 2} and set(stages.seconds()) == {"data"}
    stages.run("tokens", lambda: time.sleep(0.2), "")
    assert 0.6 <= stages.seconds()["tokens"] < 2 and stages.attempts() == {"tokens": 3}
    stages.run("tokens", interrupted, "")  # done, so it is not run


@pytest.mark.parametrize("content", ["", "{", "1", "\0\0\0\0", "{}", '{"attempts": null, "seconds": 1}'])
def test_a_broken_record_of_attempts_counts_as_one(stages, content):
    """What `kill -9`, a full disk or an older version leaves never keeps a run from going on."""
    (stages.directory / "tokens.begun").write_text(content)
    stages.run("tokens", lambda: None, "")
    assert stages.attempts() == {"tokens": 2} and stages.seconds()["tokens"] < 1


def test_the_record_of_attempts_is_whole_at_any_moment(stages):
    """While a stage runs and after it was stopped its record is valid JSON."""
    record = stages.directory / "tokens.begun"
    with pytest.raises(KeyboardInterrupt):
        stages.run("tokens", lambda: (json.loads(record.read_text()), interrupted()), "")
    assert json.loads(record.read_text())["attempts"] == 1 and json.loads(record.read_text())["seconds"] >= 0.2
    assert not list(stages.directory.glob("*.partial"))


def test_what_stopped_a_stage_is_shown_where_its_time_cannot_be_written(stages):
    """The first error is the one to show, not that the disk is too full to note the seconds."""

    def step():
        stages.directory.rmtree()
        raise KeyboardInterrupt("the reason")

    with pytest.raises(KeyboardInterrupt, match="the reason"):
        stages.run("tokens", step, "")


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A run whose evaluation is replaced; gives what `evaluate` and `write_report` were handed."""
    calls = {}

    def evaluate(model, data, output, settings, **options):
        calls["evaluate"] = options | {"output": output}
        return {}

    for name, value in {
        "evaluation_data": lambda *_: time.sleep(0.2),
        "load": lambda _: None,
        "evaluate": evaluate,
        "read_samples": lambda _: {},
        "write_report": lambda _results, _samples, _curves, output, **_: calls.update(report=output),
    }.items():
        monkeypatch.setattr(digits, name, value)
    stages = digits.Stages(epath.Path(tmp_path))
    stages.run("transformer", lambda: None, "")
    (tmp_path / "config.json").write_text('{"evaluation": {}}')
    return calls


def test_a_quick_look_goes_elsewhere(measured, tmp_path):
    """With a limit nothing of the whole evaluation is overwritten, unless somebody says where to write."""
    for options, expected in (
        ({}, tmp_path),
        ({"limit": 20}, tmp_path / "quick"),
        ({"limit": 20, "output": tmp_path / "other"}, tmp_path / "other"),
        ({"output": tmp_path / "other"}, tmp_path / "other"),
    ):
        digits.evaluate_run(tmp_path, **options)
        assert str(measured["evaluate"]["output"]) == str(measured["report"]) == str(expected)
        assert measured["evaluate"]["limit"] == options.get("limit")


def test_evaluation_is_told_seconds_and_attempts(measured, tmp_path):
    """Its own preparation is in the seconds, its attempts count while it is a stage, and not for a later one."""
    stages = digits.Stages(epath.Path(tmp_path))
    for name in ("tokens", "evaluation"):
        with pytest.raises(KeyboardInterrupt):
            stages.run(name, interrupted, "")
    stages.run("tokens", lambda: None, "")
    stages.run("evaluation", lambda: digits.evaluate_run(tmp_path), "")
    told = measured["evaluate"]
    assert set(told["seconds"]) == {"tokens", "transformer", "evaluation"}
    assert 0.2 <= told["seconds"]["evaluation"] < 5 and told["attempts"] == {"tokens": 2, "evaluation": 2}
    digits.evaluate_run(tmp_path)
    assert measured["evaluate"]["attempts"] == {"tokens": 2}
