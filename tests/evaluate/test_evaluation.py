"""Models whose faults are known: every measure must show the fault that it is there for, and no other."""

import dataclasses
import itertools
import json
import time
from types import SimpleNamespace

import evaluation_fakes as fakes
import numpy as np
import pytest
from evaluation_fakes import SMALL, WORDS, FakeModel

from omni.evaluate import evaluate
from omni.evaluate.data import draw_inputs
from omni.evaluate.intervals import wilson_interval
from omni.evaluate.judges import fit_judges
from omni.evaluate.replies import ask
from omni.evaluate.run import read_samples
from omni.evaluate.tokens import measure_bits
from omni.evaluate.variety import measure_variety
from omni.model import TransformerConfig

CROSS = list(itertools.permutations(("text", "image", "audio"), 2))
CHANCE = 1 / len(WORDS)


def without_seconds(results):
    """What does not depend on how fast this machine is."""
    return {name: value for name, value in results.items() if name != "seconds"}


@pytest.fixture(scope="module")
def able(data, tmp_path_factory):
    """The results of a model that is right nine times in ten."""
    return evaluate(
        FakeModel(skill=0.9, breaks=0.3), data, tmp_path_factory.mktemp("able"), SMALL, seconds={"data": 3.0}
    )


def test_keys(able):
    """The keys that others read are there, for every direction and modality."""
    for source, target in [*CROSS, *((m, m) for m in ("text", "image", "audio"))]:
        assert {"accuracy", "ci95", "n", "ceiling", "shuffled"} <= set(able["matrix"][source][target])
    for target in ("image", "audio"):
        assert {"distinct", "copies", "nearest", "nearest_real"} <= set(able["variety"][target])
    assert {"order", "agreement", "n"} == set(able["routing"])
    assert {"constrained", "unconstrained", "n"} <= set(able["well_formed"])
    assert {"psnr", "ssim", "usage", "perplexity"} <= set(able["tokenizers"]["image"])
    assert {"mel_distance", "stoi", "usage"} <= set(able["tokenizers"]["audio"])
    assert able["tokenizers"]["audio"]["stoi"] > 0.9 and able["tokenizers"]["image"]["ssim"] == 1.0
    assert able["tokenizers"]["image"]["psnr"] is None  # infinite: these tokenizers are exact, and JSON has no infinity
    assert set(able["seconds"]) == {"data", "evaluation"} and able["seconds"]["data"] == 3.0
    json.dumps(able, allow_nan=False)


@pytest.mark.parametrize(("source", "target"), CROSS)
def test_skill_is_measured(able, source, target):
    """Accuracy is the model's skill, the judge is sure, and shuffled inputs give chance."""
    cell = able["matrix"][source][target]
    assert abs(cell["accuracy"] - 0.9) < 0.13 and cell["n"] == 100
    low, high = wilson_interval(round(100 * cell["accuracy"]), 100)
    assert cell["ci95"][0] <= low + 1e-9 and cell["ci95"][1] >= high - 1e-9
    assert cell["inputs"] == (10 if source == "text" else 60)
    assert cell["ceiling"] == 1.0
    assert cell["shuffled"] < CHANCE + 0.15


def test_deaf_model_is_at_chance(data, tmp_path):
    """A model that ignores its input scores chance everywhere, while its tokenizers stay right."""
    results = evaluate(FakeModel(deaf=True), data, tmp_path, SMALL)
    for source, target in CROSS:
        assert abs(results["matrix"][source][target]["accuracy"] - CHANCE) < 0.15
    assert results["matrix"]["image"]["image"]["accuracy"] == 1.0
    assert results["routing"]["order"] == 1.0 and results["routing"]["agreement"] < 0.5


def test_replayed_memories_fail(data, able, tmp_path):
    """A model that replays training examples is right, but all its replies are copies and few are distinct."""
    results = evaluate(FakeModel(memories=fakes.memories_of(data)), data, tmp_path, SMALL)
    for target in ("image", "audio"):
        replayed, made = results["variety"][target], able["variety"][target]
        assert results["matrix"]["text"][target]["accuracy"] == 1.0
        assert replayed["copies"] == 1.0 and replayed["nearest"] < 1e-6
        assert replayed["distinct"] == 3 * len(WORDS)
        assert made["copies"] == 0.0 and made["copies_real"] == 0.0 and made["distinct"] > 90
        assert made["nearest"] == pytest.approx(made["nearest_real"], rel=0.3)


def variety_of(model, data, modality):
    """What is measured on 100 replies to words."""
    words = draw_inputs(data, "text", 100, seed=3)[0]
    replies = ask(model, [[word] for word in words], [modality], SMALL, "variety", lambda _: None)
    return measure_variety(model, data, modality, replies)


@pytest.mark.parametrize("target", ["image", "audio"])
def test_memories_replayed_with_a_slip_fail(data, able, target):
    """One wrong code in each memory leaves no copies, but near-copies, more of them than chance gives real ones."""
    pool = fakes.memories_of(data)
    replayed = variety_of(FakeModel(memories=pool, slips=1), data, target)
    assert replayed["copies"] < 0.05 and replayed["near_copies"] == 1.0 and replayed["differing"] == 1 / 16
    assert variety_of(FakeModel(memories=pool, slips=4), data, target)["near_copies"] < 0.5
    made = able["variety"][target]
    assert made["near_copies"] < 0.5 and abs(made["near_copies"] - made["near_copies_real"]) < 0.15
    assert made["differing"] == pytest.approx(made["differing_real"], abs=1 / 16) and made["differing"] > 2 / 16


def test_near_copies_of_the_pool(data):
    """Augmented training examples with one code changed count too, where the caller gives their codes."""
    rng = np.random.default_rng(12)
    own = [[fakes.make_codes("image", label, rng) for _ in range(4)] for label in range(len(WORDS))]
    known = dataclasses.replace(data, pool={"image": [codes for each in own for codes in each]})
    model = FakeModel(memories={"image": own}, slips=1)
    assert variety_of(model, known, "image")["near_copies"] == 1.0
    assert variety_of(model, data, "image")["near_copies"] == 0.0


def test_copies_of_the_pool(data, tmp_path):
    """Copies of augmented training examples count too, where the caller gives their codes."""
    rng = np.random.default_rng(11)
    pool = [[fakes.make_codes("image", label, rng) for _ in range(4)] for label in range(len(WORDS))]
    known = dataclasses.replace(data, pool={"image": [codes for own in pool for codes in own]})
    model = FakeModel(memories={"image": pool})
    assert evaluate(model, known, tmp_path / "known", SMALL)["variety"]["image"]["copies"] == 1.0
    assert evaluate(model, data, tmp_path / "unknown", SMALL)["variety"]["image"]["copies"] == 0.0


def test_routing(data, able, tmp_path):
    """Order and agreement are told apart: parts in the wrong order may still agree."""
    assert able["routing"]["order"] == 1.0 and 0.75 < able["routing"]["agreement"] < 1.0
    backwards = evaluate(FakeModel(backwards=True), data, tmp_path, SMALL)["routing"]
    one_part = sum(len(request.order) == 1 for request in data.requests[: SMALL.requests % len(data.requests)])
    assert backwards["order"] == pytest.approx((2 * len(WORDS) + one_part) / SMALL.requests)
    assert backwards["agreement"] == 1.0


def test_well_formed(able):
    """Replies that break off are counted, and only where no constraint holds them."""
    assert able["well_formed"]["constrained"] == 1.0
    assert 0.5 < able["well_formed"]["unconstrained"] < 0.9
    assert able["well_formed"]["n"] == 6 * 200 + SMALL.requests


def even(document):
    """Every token costs a nat."""
    return np.ones(len(document.ids))


def test_bits_per_token(data):
    """A nat a token is log2(e) bits for each token of the target; the input does not count."""
    model = FakeModel()
    model.token_losses = lambda documents: list(map(even, documents))
    found = measure_bits(model, data, ("image", "audio"), SMALL, lambda _: None)
    assert found["tokens"] == SMALL.documents * 16
    assert found["bits"] / found["tokens"] == pytest.approx(np.log2(np.e))
    words = [WORDS[i % len(WORDS)] for i in range(SMALL.documents)]
    assert measure_bits(model, data, ("image", "text"), SMALL, lambda _: None)["tokens"] == len("".join(words))


@pytest.mark.parametrize("direction", [("image", "text"), ("text", "image")])
def test_bits_of_text_are_those_of_the_bare_word(data, direction):
    """Targets are what models are taught to answer, never another phrasing, while prompts come in every phrasing."""
    model, seen = FakeModel(), []
    model.token_losses = lambda documents: (seen.extend(documents), list(map(even, documents)))[1]
    measure_bits(model, data, direction, SMALL, lambda _: None)
    spans = [span for document in seen for span in model.grammar.parse(document.ids) if span.modality == "text"]
    assert {span.context for span in spans} == {direction[0] == "text"}
    texts = {fakes.TOKENIZERS["text"].decode(span.codes) for span in spans}
    assert texts == set(WORDS) if direction[1] == "text" else any(text.startswith("the ") for text in texts)


def test_bits_are_of_codes_alone(data):
    """Costs of the input, of boundaries and of the end do not count."""
    model = FakeModel()
    codes = np.isin(np.arange(model.vocabulary.size), model.vocabulary.block("image"))
    model.token_losses = lambda documents: [np.where(codes[each.ids] & each.target, 0, 50) for each in documents]
    bits = measure_bits(model, data, ("text", "image"), SMALL, lambda _: None)
    assert bits["tokens"] == SMALL.documents * 16 and bits["bits"] == 0


def test_token_agreement(data, able, tmp_path):
    """Exact tokenizers keep every code; one whose decoder is dull loses some."""

    class Dull(fakes.Blocks):
        def decode(self, codes):
            return super().decode(np.minimum(np.asarray(codes), 13))

    assert able["token_agreement"] == {"image": 1.0, "audio": 1.0}
    model = FakeModel()
    model.tokenizers["image"] = Dull()
    agreement = evaluate(model, data, tmp_path, SMALL)["token_agreement"]
    assert 0.5 < agreement["image"] < 0.99 and agreement["audio"] == 1.0


def test_killed_and_run_again(data, able, tmp_path):
    """An evaluation that was interrupted repeats no finished cell and scores as one that was not."""
    broken = FakeModel(skill=0.9, breaks=0.3, fails_after=14)
    with pytest.raises(KeyboardInterrupt):
        evaluate(broken, data, tmp_path, SMALL, seconds={"data": 3.0})
    finished = len(list((tmp_path / "evaluation" / "cells").glob("*/*.json")))
    again = FakeModel(skill=0.9, breaks=0.3)
    assert without_seconds(evaluate(again, data, tmp_path, SMALL, seconds={"data": 3.0})) == without_seconds(able)
    whole = 6 * 200 + SMALL.requests + SMALL.unconstrained + SMALL.shown + 2
    assert finished == 3 and again.asked == whole - finished * 200
    third = FakeModel(skill=0.9, breaks=0.3)
    third.generate_batch = None
    assert without_seconds(evaluate(third, data, tmp_path, SMALL, seconds={"data": 3.0})) == without_seconds(able)


def test_seconds_of_finished_cells_count(data, tmp_path):
    """An evaluation that reads its cells took as long as the one that measured them; preparing it counts too."""
    settings = dataclasses.replace(SMALL, per_direction=4, shuffled=4, requests=4, unconstrained=4, documents=4)
    slow = FakeModel()
    answer = slow.generate_batch
    slow.generate_batch = lambda requests: (time.sleep(0.1), answer(requests))[1]
    first = evaluate(slow, data, tmp_path, settings, seconds={"data": 3.0, "evaluation": 100.0})["seconds"]
    start = time.monotonic()
    results = evaluate(FakeModel(), data, tmp_path, settings, seconds={"data": 3.0}, attempts={"data": 2})
    took = time.monotonic() - start
    assert first["evaluation"] > 101.4 and first["data"] == 3.0
    assert results["seconds"]["evaluation"] > took + 1.0 and results["attempts"] == {"data": 2}


def test_a_quick_look_leaves_the_cells_of_a_whole_evaluation(data, able, tmp_path):
    """After a limited evaluation in the same directory nothing of the whole one is measured again."""
    evaluate(FakeModel(skill=0.9, breaks=0.3), data, tmp_path, SMALL)
    quick = evaluate(FakeModel(skill=0.9, breaks=0.3), data, tmp_path, SMALL, limit=4)
    assert quick["matrix"]["text"]["image"]["n"] == 4
    again = FakeModel(skill=0.9, breaks=0.3)
    assert evaluate(again, data, tmp_path, SMALL)["matrix"] == able["matrix"] and again.asked == 0


def test_the_same_reply_again_is_no_evidence(data, tmp_path):
    """A greedy model asked the same thing many times has the interval of as many outcomes as there are inputs."""
    settings = dataclasses.replace(SMALL, per_direction=240, shuffled=4, requests=4, unconstrained=4, documents=4)
    greedy = evaluate(FakeModel(skill=0.7, greedy=True), data, tmp_path / "greedy", settings)["matrix"]
    drawn = evaluate(FakeModel(skill=0.7), data, tmp_path / "drawn", settings)["matrix"]
    for source, target, distinct in (("image", "text", 60), ("audio", "image", 60), ("text", "image", 10)):
        cell, free = greedy[source][target], drawn[source][target]
        assert cell["n"] == free["n"] == 240 and cell["inputs"] == free["inputs"] == distinct
        assert cell["ci95"] == pytest.approx(wilson_interval(cell["accuracy"] * distinct, distinct), abs=0.01)
        assert np.diff(free["ci95"])[0] < 0.7 * np.diff(cell["ci95"])[0]


def test_another_model_is_measured_anew(data, tmp_path):
    """Results of other weights or other settings in the same directory are not taken for one's own."""
    settings = dataclasses.replace(SMALL, per_direction=20, shuffled=20)
    first = evaluate(FakeModel(skill=1.0), data, tmp_path, settings)
    second = evaluate(FakeModel(skill=0.0), data, tmp_path, settings)
    assert first["matrix"]["text"]["image"]["accuracy"] == 1.0 and second["matrix"]["text"]["image"]["accuracy"] == 0.0
    third = evaluate(FakeModel(skill=0.0), data, tmp_path, dataclasses.replace(settings, per_direction=25))
    assert third["matrix"]["text"]["image"]["n"] == 25


def test_limit_is_in_the_signature(data, tmp_path):
    """A quick look says that it is one, and every reply that is asked for respects it."""
    model = FakeModel()
    results = evaluate(model, data, tmp_path, SMALL, limit=4)
    assert "|limit:4" in results["signature"] and results["matrix"]["image"]["text"]["n"] == 4
    assert model.asked == 6 * 8 + 4 + 4 + SMALL.shown + 2


def test_samples_hold_mixed_replies(data, able, tmp_path):
    """Kept for the report: replies of three parts to words, and replies of all modalities to all modalities."""
    evaluate(FakeModel(), data, tmp_path, SMALL)
    samples = read_samples(tmp_path)
    orders = [[[p["modality"] for p in sample[side]] for side in ("input", "output")] for sample in samples["mixed"]]
    every = ["text", "image", "audio"]
    assert orders == [[["text"], every]] * SMALL.shown + [[every, every]] * 2
    assert len(samples["audio->image"]) == SMALL.shown


def test_judges_know_neither_colour_nor_place_nor_loudness(data):
    """A picture in other colours, moved by two pixels, and a sound at another loudness in silence keep their class."""
    judges = fit_judges(data)
    pictures, sounds = data.test["image"], data.test["audio"]
    small = [fakes.Image(np.pad(part.pixels[::2, ::2], ((8, 8), (8, 8), (0, 0)))) for part in pictures.parts]
    plain = judges["image"].features(small)
    changed = judges["image"].features([fakes.coloured(p, (10, 30, 90), (250, 220, 60), (2, -1)) for p in small])
    assert np.abs(plain - changed).max() < 0.1
    louder = [fakes.louder(part, 0.2, 3000) for part in sounds.parts]
    assert (judges["audio"].labels(louder) == sounds.labels).all()


def test_text_is_judged_by_exact_match(data):
    """A word counts stripped and in any case; a sentence around it does not."""
    texts = [fakes.Text(text) for text in (" Bee\n", "the bee", "", "bees")]
    assert fit_judges(data)["text"].labels([*texts, None]).tolist() == [1, -1, -1, -1, -1]


@pytest.mark.parametrize("change", ["engine", "config", "context_length"])
def test_nothing_is_read_that_another_engine_or_configuration_gave(data, able, tmp_path, change):
    """Cells are measured anew when what draws replies has changed, though the weights have not."""
    evaluate(FakeModel(skill=0.9, breaks=0.3), data, tmp_path, SMALL)
    other = FakeModel(skill=0.9, breaks=0.3)
    changes = {"engine": SimpleNamespace(version=2), "config": TransformerConfig(rope_theta=5e3), "context_length": 128}
    setattr(other, change, changes[change])
    results = evaluate(other, data, tmp_path, SMALL)
    assert other.asked > 0 and results["signature"] != able["signature"]
