"""What the digits recipe hands to evaluation, and the stages' seconds that go into its results."""

import dataclasses
import json
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from etils import epath

from omni.data.shards import write_shards
from omni.evaluate import EvaluationData, EvaluationSettings
from omni.grammar import Grammar, Span
from omni.recipes import digits, digits_documents
from omni.recipes.digits_evaluation import held_out_requests, trained_codes
from omni.vocabulary import Vocabulary
from omni_tokenizers.errors import OmniError, UsageError


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
    begun = time.monotonic()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            stages.run("tokens", interrupted, "")
    assert stages.attempts() == {"tokens": 2} and set(stages.seconds()) == {"data"}
    stages.run("tokens", lambda: time.sleep(0.2), "")
    assert 0.6 <= stages.seconds()["tokens"] <= time.monotonic() - begun + 0.15 and stages.attempts() == {"tokens": 3}
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

    def evaluation_data(*_) -> EvaluationData:
        time.sleep(0.2)
        return EvaluationData("none", (), {}, {})

    def evaluate(model, data, output, settings, **options):
        calls["evaluate"] = options | {"output": output}
        return {}

    for name, value in {
        "evaluation_data": evaluation_data,
        "load": lambda _: SimpleNamespace(tokenizers={}),
        "evaluate": evaluate,
        "read_samples": lambda _: {},
        "write_report": lambda _results, _samples, curves, output, **_: calls.update(report=output, curves=curves),
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


def test_how_a_run_was_trained_is_not_shown_of_another_model(measured, tmp_path):
    """Curves, seconds and attempts are the run's; the report on another model has none of them."""
    digits.evaluate_run(tmp_path)
    assert set(measured["curves"]) == {"Transformer", "Image", "Audio"}
    digits.evaluate_run(tmp_path, tmp_path / "other", model="another")
    assert measured["curves"] == {} and set(measured["evaluate"]["seconds"]) == {"evaluation"}


def test_training_codes_are_compared_where_they_mean_the_same(monkeypatch, tmp_path):
    """Codes of a modality whose codebooks are not the run's are left out; storage of the nets' weights is no matter."""
    own = {"image": (np.eye(4),), "audio": (np.eye(3), np.eye(5))}
    monkeypatch.setattr(
        digits.omni_tokenizers, "load", lambda path: SimpleNamespace(code_vectors=own[path.name]), raising=True
    )
    pool = {"image": ["pictures"], "audio": ["sounds"]}

    def left(**changed) -> dict:
        tokenizers = {name: SimpleNamespace(code_vectors=books) for name, books in (own | changed).items()}
        return digits._of_the_same_codes(pool, epath.Path(tmp_path), SimpleNamespace(tokenizers=tokenizers))

    assert left() == pool
    assert left(audio=(np.eye(3), 2 * np.eye(5))) == {"image": ["pictures"]}
    assert left(image=(np.eye(5),)) == {"audio": ["sounds"]} == left(image=())


def test_a_stage_with_other_settings_is_done_anew(stages):
    """Settings that may change make their stage run again, as a first attempt; the same settings do not."""
    runs = []
    for temperature in (0.3, 0.3, 0.5):
        stages.run("evaluation", lambda: runs.append(1), "", settings={"temperature": temperature})
    assert len(runs) == 2 and stages.attempts() == {}


@pytest.mark.parametrize("where", ["temperature", "guidance", "evaluation"])
def test_a_wrong_modality_is_found_before_anything_runs(where):
    """The nearest modality is named."""
    wrong = {"imge": 0.3}
    with pytest.raises(UsageError, match=r"imge.*did you mean 'image'"):
        digits.DigitsRecipe(**{where: EvaluationSettings(guidance=wrong) if where == "evaluation" else wrong})


def test_sampling_may_change_between_runs_and_training_may_not(tmp_path, monkeypatch):
    """A run goes on with another temperature, which its model then has; another seed is refused."""
    monkeypatch.setattr(digits.DigitsRecipe, "_stages", lambda *_: {})
    monkeypatch.setattr(digits, "print_next_steps", lambda _: None)
    recipe = digits.DigitsRecipe(output=str(tmp_path))
    recipe.run()
    dataclasses.replace(recipe, temperature={"image": 0.9}).run()
    assert json.loads((tmp_path / "generation.json").read_text())["temperature"]["image"] == 0.9
    with pytest.raises(OmniError, match="seed"):
        dataclasses.replace(recipe, seed=1).run()
