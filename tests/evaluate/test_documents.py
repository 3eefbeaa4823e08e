"""A user's own documents: which are measured, and that each measure shows the fault that it is there for."""

import dataclasses
import json
import re
import shutil

import evaluation_fakes as fakes
import numpy as np
import pytest
from evaluation_fakes import FakeModel, Listed, make_documents
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from omni.bundle import Model
from omni.data.json_lines import JsonLines
from omni.data.layouts import make_grammar
from omni.data.loader import pack_row, stack
from omni.evaluate import DocumentSettings, evaluate_documents, write_documents_report
from omni.evaluate.contexts import matching, measure_contexts
from omni.evaluate.documents import Document, direction_of, joined, parse_directions, read_documents, wrong_contexts
from omni.evaluate.intervals import bootstrap_interval, wilson_interval
from omni.evaluate.report import as_table
from omni.grammar import Tokens
from omni.model import Transformer, TransformerConfig
from omni.parts import Audio, Image, Text
from omni.train.language import TransformerTask
from omni_tokenizers.errors import OmniError, UsageError

SMALL = DocumentSettings(limit=20, shown=2)
PAIRS = (("image", "text"), ("audio", "image"), ("text", "audio"))
CERTAIN = (("image", "text"), ("text", "image"))
"""What the fake models never mishear."""


def measured(model, source, directory, settings=SMALL, **more):
    """The results alone, without what depends on how fast this machine is."""
    results, _ = evaluate_documents(model, source, directory, settings, **more)
    return {name: value for name, value in results.items() if name != "seconds"}


# Which documents, and which contexts beside each one's own


def test_a_direction_is_the_sets_of_modalities():
    """Order and repetition do not count, neither in documents nor in what is asked for; without context is none."""
    text, image = Text("a", context=True), Image(np.zeros((2, 2, 3), np.uint8), context=True)
    assert direction_of([text, image, text, Text("b"), Text("c")]) == "image+text:text"
    assert direction_of([Text("a"), dataclasses.replace(image, context=False)]) is None
    assert parse_directions("text+image:text, audio:image,image+text:text") == ["image+text:text", "audio:image"]


@pytest.mark.parametrize("asked", ["image", "image:text:audio", "image:", "", "image:text,,text:image", "image+:text"])
def test_what_is_no_direction_is_refused(asked):
    with pytest.raises(UsageError, match="write context:target"):
        parse_directions(asked)


def test_every_document_is_measured_or_counted(caplog):
    """Without a context, in a direction that nobody asked for, or alone in its own: each is told, and all add up."""
    documents = make_documents(4, *PAIRS).documents
    documents += ([Text("ant")], [Text("ant", context=True), Text("ant")])
    found = read_documents(FakeModel(), Listed(documents), SMALL)
    assert {direction.name: len(direction.documents) for direction in found.directions} == {
        "audio:image": 4,
        "image:text": 4,
        "text:audio": 4,
    }
    assert list(found.left_out.values()) == [1, 0, 1]
    found = read_documents(FakeModel(), Listed(documents), SMALL, ["text:audio"])
    assert [direction.name for direction in found.directions] == ["text:audio"]
    assert list(found.left_out.values()) == [1, 9, 0]
    assert "9 of 14 documents are not measured: no asked direction" in caplog.text


def test_the_hash_is_of_what_documents_hold():
    """Another text, another order of parts and context in place of target are other documents."""
    context, target = Text("ant", context=True), Text("bee")
    one = [[context, target], [Text("cat", context=True), Text("dog")]]
    split = [Text("an", context=True), Text("t", context=True), target]
    others = [[one[1], one[0]], [[context, Text("be")], one[1]], [split, one[1]]]
    hashes = {read_documents(FakeModel(), Listed(tuple(each)), SMALL).hash for each in (one, *others)}
    assert len(hashes) == 4


def document(context: int, target: int, length: int = 3) -> Document:
    """Tokens that mean nothing."""
    sides = (np.full(length, context), np.full(2, 100 + target))
    return Document(0, *(Tokens(side, np.zeros(len(side), int), np.zeros(len(side), bool)) for side in sides))


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=2, max_size=30),
    st.integers(1, 8),
    st.integers(0, 99),
)
def test_wrong_contexts_are_wrong(pairs, most, seed):
    """None belongs to its document's target anywhere, none comes twice, and all documents have as many."""
    documents = [document(*pair) for pair in pairs]
    belonging = {(f"{c}", f"{t}") for c, t in pairs}
    fewest = min(len({c for c, _ in pairs} - {c for c, t in pairs if t == target}) for _, target in pairs)
    if not fewest:
        with pytest.raises(OmniError, match="cannot be shuffled"):
            wrong_contexts(documents, most, 99, seed)
        return
    wrong = wrong_contexts(documents, most, 99, seed)
    assert wrong.shape == (len(pairs), min(most, fewest))
    for own, row in zip(pairs, wrong, strict=True):
        contexts = [pairs[place][0] for place in row]
        assert len(set(contexts)) == len(contexts) and own[0] not in contexts
        assert not any((f"{context}", f"{own[1]}") in belonging for context in contexts)
    np.testing.assert_array_equal(wrong, wrong_contexts(documents, most, 99, seed))


@given(st.integers(2, 40), st.integers(0, 999))
def test_contexts_are_deranged(count, seed):
    """Where all differ each is in the place of another once, and of none twice, however many there are of each."""
    wrong = wrong_contexts([document(number, number) for number in range(count)], 8, 99, seed)
    assert wrong.shape == (count, min(8, count - 1))
    for column in wrong.T:
        assert sorted(column) == list(range(count)) and (column != np.arange(count)).all()


def test_contexts_that_are_too_long_for_a_target_are_none_of_its():
    """What the model would have to read beyond its context is no fair candidate."""
    documents = [document(number, number, length=3 + 5 * (number == 0)) for number in range(6)]
    wrong = wrong_contexts(documents, 8, 9, 0)
    assert wrong.shape == (6, 4) and not (wrong == 0).any()
    assert wrong_contexts(documents, 8, 10, 0).shape == (6, 5)


def test_the_seed_chooses_other_contexts():
    documents = [document(number, number) for number in range(20)]
    assert (wrong_contexts(documents, 4, 99, 0) != wrong_contexts(documents, 4, 99, 1)).any()


def test_a_target_behind_another_context_is_a_document_of_the_grammar(tiny_model):
    """States, which positions and modalities come from, are those that reading it as a whole gives."""
    picture, sound = Image(np.zeros((8, 8, 3), np.uint8), context=True), Audio(np.zeros(3200, np.float32), 16000)
    documents = [
        [Text(word, context=True), *between, *target, Text(word)]
        for word in ("zero", "one")
        for between in ([], [picture])
        for target in ([], [sound])
    ]
    found = read_documents(tiny_model, Listed(tuple(documents)), SMALL)
    assert len(found.directions) == 4
    own = [document for direction in found.directions for document in direction.documents]
    for context in own:
        for target in own:
            whole = joined(context.context, target.target)
            np.testing.assert_array_equal(whole.states, tiny_model.grammar.annotate(whole.ids))
            assert int(np.argmax(whole.target)) == len(context.context.ids)


# What is measured


def test_a_model_that_reads_its_context(tmp_path):
    """Half a nat cheaper behind its own context: that is told, the context is always found, and shuffled by chance."""
    results = measured(FakeModel(skill=0.5), make_documents(60, *CERTAIN), tmp_path)
    for name, found in results["directions"].items():
        assert found["loss"]["own"] == pytest.approx(0.5) and found["loss"]["shuffled"] == pytest.approx(1.0)
        assert found["loss"]["by_modality"] == {name.partition(":")[2]: pytest.approx(0.5)}
        assert found["told"] == {"nats_per_token": pytest.approx(0.5), "ci95": pytest.approx([0.5, 0.5])}
        assert found["matching"]["accuracy"] == 1.0
        assert found["matching"]["ci95"] == pytest.approx(wilson_interval(*[found["contexts"]] * 2))
        shuffled = found["matching_shuffled"]
        assert shuffled["ci95"][0] <= shuffled["chance"] <= shuffled["ci95"][1]
    pictures, words = results["directions"]["image:text"], results["directions"]["text:image"]
    assert pictures["documents"] == words["documents"] == 60
    assert (pictures["contexts"], pictures["matching"]["candidates"], pictures["matching"]["chance"]) == (60, 8, 1 / 8)
    assert (words["contexts"], words["matching"]["candidates"], words["matching"]["chance"]) == (5, 5, 1 / 5)
    assert pictures["matching_shuffled"]["candidates"] == 8 and words["matching_shuffled"]["candidates"] == 4


def test_a_deaf_model(tmp_path):
    """Whatever it is shown costs the same: nothing is told, and contexts are found by chance alone."""
    results = measured(FakeModel(skill=0.5, deaf=True), make_documents(60, *CERTAIN), tmp_path)
    for found in results["directions"].values():
        assert found["loss"]["own"] == found["loss"]["shuffled"] == pytest.approx(0.5)
        assert found["told"] == {"nats_per_token": 0, "ci95": [0, 0]}
        for each in (found["matching"], found["matching_shuffled"]):
            assert each["accuracy"] == pytest.approx(each["chance"])


def test_a_model_that_guesses_is_at_chance(tmp_path):
    """Costs that depend on context and target at random: intervals hold nothing told, and chance."""
    model = FakeModel()
    model.token_losses = lambda rows: [np.random.default_rng(row.ids.tolist()).random(len(row.ids)) for row in rows]
    for found in measured(model, make_documents(150, *CERTAIN), tmp_path)["directions"].values():
        low, high = found["told"]["ci95"]
        assert low < 0 < high and high - low < 0.2
        for each in (found["matching"], found["matching_shuffled"]):
            assert each["ci95"][0] < each["chance"] < each["ci95"][1]


def test_contexts_with_the_same_target_are_no_wrong_ones(tmp_path):
    """Many pictures of one word: only pictures of other words can be shuffled, so a sure model finds all of them."""
    found = measured(FakeModel(skill=0.5), make_documents(40, ("image", "text")), tmp_path)["directions"]["image:text"]
    assert found["loss"]["shuffled"] == pytest.approx(1.0) and found["matching"]["accuracy"] == 1.0


def test_matching_by_hand():
    """Least nats win; candidates that tie at the top share it; one candidate is no choice."""
    nats = np.array([[1.0, 2, 3, 4], [2, 1, 3, 4], [1, 1, 1, 1], [1, 1, 2, 2]])
    found = matching(nats, range(4))
    assert found["accuracy"] == pytest.approx((1 + 0 + 1 / 4 + 1 / 2) / 4)
    assert found["candidates"] == 4 and found["chance"] == 1 / 4
    assert found["ci95"] == pytest.approx(wilson_interval(1.75, 4))
    assert matching(nats[:, :1], range(4)) is None


def test_two_documents_have_one_wrong_context_each(tmp_path):
    """It is shuffled with and found beside, but there is no third for the control of matching."""
    found = measured(FakeModel(skill=0.5), make_documents(2, ("image", "text")), tmp_path)["directions"]["image:text"]
    assert found["matching"]["candidates"] == 2 and found["matching"]["chance"] == 1 / 2
    assert found["matching_shuffled"] is None and found["loss"]["shuffled"] == pytest.approx(1.0)


def test_bootstrap_interval():
    """That of a ratio of sums, over clusters: a mean's is the textbook's, clusters of one mind count once."""
    rng = np.random.default_rng(0)
    values = rng.normal(3, 1, 400)
    low, high = bootstrap_interval(values, np.ones(400), range(400), 0)
    assert low == pytest.approx(values.mean() - 1.96 * values.std() / 20, abs=0.02)
    assert high == pytest.approx(values.mean() + 1.96 * values.std() / 20, abs=0.02)
    repeated = bootstrap_interval(values[:100].repeat(4), np.ones(400), np.arange(100).repeat(4).tolist(), 0)
    assert repeated == bootstrap_interval(values[:100], np.ones(100), range(100), 0)
    assert bootstrap_interval(2 * np.arange(1, 9), np.arange(1, 9), range(8), 0) == [2, 2]
    assert bootstrap_interval(values, np.ones(400), range(400), 0) == [low, high]


def test_losses_are_those_of_training(tiny_model, tmp_path):
    """By modality the same as what a training logs of these documents; together, of all tokens, the end among them."""
    rng = np.random.default_rng(0)
    sounds = [Audio(rng.uniform(-1, 1, int(count)).astype(np.float32), 16000) for count in rng.integers(400, 2000, 6)]
    pictures = [Image(rng.integers(0, 256, (8, 8, 3), np.uint8)) for _ in sounds]
    documents = [
        [Text(f"zero one {i}", context=True), *pair] for i, pair in enumerate(zip(sounds, pictures, strict=True))
    ]
    task = TransformerTask("nowhere", TransformerConfig())
    task.__dict__["shards"] = tiny_model
    tokens = [tiny_model.processor.tokens(parts) for parts in documents]
    rows = [pack_row(tiny_model.grammar, [{"ids": each.ids, "target": each.target}], 64) for each in tokens]
    measure = nnx.jit(lambda model, batch: task.loss(model, batch, None, training=False)[2])
    metrics = measure(tiny_model.transformer, stack(rows))
    found = read_documents(tiny_model, Listed(tuple(documents)), SMALL).directions[0]
    result = measure_contexts(tiny_model, found, SMALL, lambda _: None)
    for name in ("audio", "image"):
        total, count = metrics[f"loss/{name}"]
        assert result["loss"]["by_modality"][name] == pytest.approx(float(total / count), rel=1e-5)
    total, count = (
        sum(float(metrics[f"loss/{name}"][side]) for name in tiny_model.grammar.modalities) for side in (0, 1)
    )
    assert result["loss"]["own"] == pytest.approx(total / count, rel=1e-5) and result["tokens"] == count


def test_replies(tmp_path):
    """The share of right words is the model's skill, of well-formed replies what does not break; no text, no match."""
    model = FakeModel(skill=0.8, breaks=0.3)
    source, settings = make_documents(100, ("image", "text"), ("text", "audio")), dataclasses.replace(SMALL, limit=80)
    found = measured(model, source, tmp_path, settings)["directions"]
    match = found["image:text"]["exact_match"]
    assert abs(match["share"] - 0.8) < 0.13 and match["n"] == 80 and match["shuffled"] < 0.2
    assert match["ci95"] == pytest.approx(wilson_interval(80 * match["share"], 80))
    assert "exact_match" not in found["text:audio"]
    assert abs(found["image:text"]["well_formed"]["share"] - 0.7) < 0.15
    assert model.asked == 2 * 2 * 80


def test_requests_have_room_for_the_longest_target_and_no_more(tmp_path):
    """However long its own target is, a reply may be as long as the longest, as far as the model's context goes; free
    ones may fill the context, or what they begin might be cut and count as badly formed."""
    model, seen = FakeModel(), []
    answer = model.generate_batch
    model.generate_batch = lambda requests: (seen.extend(requests), answer(requests))[1]
    texts = ["ant", "bee", "cat", "ant " * 7]
    documents = [
        [Text(f"the {word}", context=True), Text(text)] for word, text in zip(fakes.WORDS, texts, strict=False)
    ]
    documents.append([Text("ant " * 10, context=True), Text("dog")])
    measured(model, Listed(tuple(documents)), tmp_path)
    rooms = {text: 64 - 2 - len(text) for text in (documents[0][0].text, documents[-1][0].text)}
    assert {seen[i].max_tokens for i in range(5)} == {29, rooms["ant " * 10]}
    assert {request.max_tokens for request in seen[5:]} == set(rooms.values())
    assert [request.want for request in seen] == [["text"]] * 5 + [None] * 5
    assert [request.constrained for request in seen] == [True] * 5 + [False] * 5


def test_texts_that_follow_one_another_are_one(tmp_path):
    """In what is wanted, which may not name text twice in a row, and in what is compared."""
    documents = [[Text(word, context=True), Text(word[0]), Text(word[1:])] for word in fakes.WORDS]
    found = measured(FakeModel(), Listed(tuple(documents)), tmp_path)["directions"]["text:text"]
    assert found["exact_match"]["share"] == 1.0


# What is written


def test_the_seed_decides_all(tmp_path):
    """The same seed gives the same results in another directory, another seed other contexts and replies."""
    source = make_documents(10, *PAIRS)
    first = measured(FakeModel(skill=0.5), source, tmp_path / "a")
    assert measured(FakeModel(skill=0.5), source, tmp_path / "b") == first
    other = measured(FakeModel(skill=0.5), source, tmp_path / "c", dataclasses.replace(SMALL, seed=1))
    assert other["directions"] != first["directions"] and other["signature"] != first["signature"]


def test_killed_and_run_again(tmp_path):
    """What was finished is not measured again, and the results are those of an evaluation that was not killed."""
    source, whole = make_documents(12, *PAIRS), FakeModel(skill=0.5)
    results = measured(whole, source, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        measured(FakeModel(skill=0.5, fails_after=3), source, tmp_path / "killed")
    again = FakeModel(skill=0.5)
    assert measured(again, source, tmp_path / "killed") == results
    assert 0 < again.asked < whole.asked


def test_results_say_what_they_are_of(tmp_path):
    """Source, hashes, settings, counts and the command stand in results.json, which is JSON to the letter."""
    source = make_documents(6, *PAIRS)
    results, samples = evaluate_documents(FakeModel(), source, tmp_path, SMALL, directions=["text:audio"], command="x")
    assert json.loads((tmp_path / "results.json").read_text()) == results
    json.dumps(results, allow_nan=False)
    assert results["settings"] == dataclasses.asdict(SMALL) and results["command"] == "x"
    assert results["data"]["documents"] == 18 and results["data"]["left_out"]["no asked direction"] == 12
    assert results["data"]["source"]["type"] == "Listed"
    for value in (results["model"]["hash"], results["data"]["hash"], "seed:0", "engine:1", "candidates:8", "letters"):
        assert value in results["signature"]
    assert list(samples) == ["text:audio"] and len(samples["text:audio"]) == 2


def test_the_page_and_the_table(tmp_path):
    """All of a direction's numbers and examples, nothing from elsewhere, and no text of a document as markup."""
    documents = make_documents(6, *PAIRS).documents
    documents += tuple([Text(word, context=True), Text(f"{word} b")] for word in ("ant b", "bee b"))
    results, samples = evaluate_documents(FakeModel(skill=0.5), Listed(documents), tmp_path, SMALL)
    samples["text:audio"][0]["context"][0]["text"] = "<script>alert(1)</script>"
    page = write_documents_report(results, samples, tmp_path, title="x & y").read_text()
    assert not re.search(r"https?://|<script|@import|<link", page) and "x &amp; y" in page and "&lt;script&gt;" in page
    assert set(re.findall(r'src="([a-z]+:)', page)) == {"data:"}
    assert page.count("<h3>") == 4 and page.count("<audio") == 2 + 2 * 2 and "not measured" in page
    table = as_table(results).splitlines()
    assert len(table) == 6 and table[2].startswith("image:text") and "0.50" in table[2]


# On the command line


@pytest.fixture
def folder(tmp_path):
    """Three documents from a picture to a text, three from a text to a sound and a picture, and one without context."""
    random, lines = np.random.default_rng(0), []
    for number, word in enumerate(("zero", "one", "two")):
        Image(random.integers(0, 256, (9, 8, 3), np.uint8)).save(tmp_path / f"{number}.png")
        Audio(random.uniform(-0.5, 0.5, 900).astype(np.float32), 16000).save(tmp_path / f"{number}.wav")
        picture, sound, text = {"image": f"{number}.png"}, {"audio": f"{number}.wav"}, {"text": word}
        lines += [[picture | {"context": True}, text], [text | {"context": True}, sound, picture]]
    lines.append([{"text": "zero"}])
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps({"parts": line}) + "\n" for line in lines))
    return tmp_path


def test_a_directory_is_measured_on_a_file_of_documents(run, tiny_bundle, folder, tmp_path):
    """The results are printed and written, with their command, beside the page; again they are read, as a table."""
    model = shutil.copytree(tiny_bundle, tmp_path / "model")
    command = ["eval", model, "--data", folder, "--directions", "image:text,text:image+audio", "--candidates", "2"]
    code, out, err = run(*command, "--json")
    assert code == 0, err
    results = json.loads(out)
    assert results == json.loads((model / "documents" / "results.json").read_text())
    assert results["command"].endswith("--directions image:text,text:image+audio --candidates 2")
    assert list(results["directions"]) == ["image:text", "text:audio+image"]
    assert results["data"]["left_out"]["no context"] == 1 and results["data"]["documents"] == 7
    for found in results["directions"].values():
        assert 4 < found["loss"]["own"] < 8 and found["matching"]["candidates"] == 2  # random weights: log(384) is 5.95
        assert found["well_formed"]["n"] == 3
    assert results["directions"]["text:audio+image"]["loss"]["by_modality"].keys() == {"image", "audio"}
    assert "exact_match" in results["directions"]["image:text"]
    assert "text → audio+image" in (model / "documents" / "report.html").read_text()
    code, out, err = run(*command)
    again = json.loads((model / "documents" / "results.json").read_text())
    assert code == 0 and again["directions"] == results["directions"] and "report: " in out and "image:text" in out


def test_a_modality_that_the_model_does_not_know_is_named(run, tiny_tokenizers, folder, tmp_path):
    """With the document that has it; where it is in no asked direction, nothing is said against it."""
    tokenizers = {name: tiny_tokenizers[name] for name in ("text", "image")}
    grammar = make_grammar(tokenizers, longest_sound=1)
    shape = {"depth": 1, "dim": 8, "heads": 1, "key_value_heads": 1, "head_dim": 8, "mlp_dim": 8}
    net = Transformer(TransformerConfig(grammar.vocabulary.size, **shape), rngs=nnx.Rngs(0))
    model = Model(net, grammar.vocabulary, grammar, tokenizers, context_length=64)
    model.save(tmp_path / "model")
    code, _, err = run("eval", tmp_path / "model", "--data", folder / "documents.jsonl")
    assert code == 1 and "documents.jsonl:2: unknown modality 'audio'; this model knows text, image" in err
    found = read_documents(model, JsonLines(str(folder)), SMALL, ["image:text"])
    assert len(found.directions[0].documents) == 3 and found.left_out["no asked direction"] == 3


# Mistakes


@pytest.mark.parametrize(
    ("documents", "asked", "message"),
    [
        ([[Text("a")]] * 3, None, "no document has a context"),
        ([[Text("a")]] * 3, ["text:text"], "no document has the direction text:text; none of them has a context"),
        ([[Text("a", context=True), Text("b")]] * 3, None, "text:text: there is one context in all 3 documents"),
        ([[Text("a", context=True), Text("b")]], ["text:text"], "text:text: there is one document, so contexts cannot"),
        (
            [[Text(word, context=True), Text("b")] for word in fakes.WORDS],
            ["text:text"],
            "a document with whose target every context comes",
        ),
        ([[Text("a", context=True), Text("b")]] * 3, ["tetx:text"], "tetx:text; the nearest .* is text:text"),
        ([[Text("a" * 40, context=True), Text("b" * 30)]], None, "document 0: 42 tokens of context and 31 that follow"),
    ],
)
def test_what_cannot_be_measured_is_said(tmp_path, documents, asked, message):
    with pytest.raises(OmniError, match=message):
        evaluate_documents(FakeModel(), Listed(tuple(documents)), tmp_path, SMALL, directions=asked)
