"""A model as its user meets it: load, generate, stream, encode, decode, save."""

import dataclasses
import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import omni
from omni.evaluate import Examples
from omni.parts import Text
from omni.prompts import Request
from omni.stopping import StopStrings
from omni.train.step import TrainState
from omni_tokenizers.errors import OmniError, UsageError


@pytest.fixture
def everything(tone):
    """A prompt of all three modalities."""
    return ["this is seven:", omni.Image(np.full((8, 8, 3), 90, np.uint8)), omni.Audio(tone, 16000)]


def test_one_reply_holds_text_picture_and_sound_in_the_order_wanted(tiny_model, everything):
    reply = tiny_model.generate(everything, want=["audio", "text", "image"], seed=3)
    assert [part.modality for part in reply.parts] == ["audio", "text", "image"] and reply.well_formed
    assert reply.images[0].pixels.shape == (8, 8, 3) and reply.audio[0].sample_rate == 16000 and reply.text
    assert reply.audio[0].samples.shape[1] % 640 == 0


def test_a_request_is_answered_alike_alone_and_in_any_batch(tiny_model, everything):
    requests = [
        Request(["seven"], ["image"], seed=1),
        Request(everything, ["text", "audio"], seed=2, temperature=1.0),
        Request(["draw seven"], None, seed=3, max_tokens=20),
        Request(["say it"], ["audio"], seed=4, guidance=1.0, top_k=3),
    ]
    together = tiny_model.generate_batch(requests)
    for request, reply in zip(requests, together, strict=True):
        alone = tiny_model.generate_batch([request])[0]
        np.testing.assert_array_equal(alone.ids, reply.ids)
    assert [[part.modality for part in reply.parts] for reply in together[:2]] == [["image"], ["text", "audio"]]


def test_stream_tells_the_same_as_generate(tiny_model, everything):
    whole = tiny_model.generate(everything, want=["text", "image", "audio"], seed=5)
    events = list(tiny_model.stream(everything, want=["text", "image", "audio"], seed=5))
    assert "".join(event.text for event in events if event.kind == "text" and event.index == 0) == whole.parts[0].text
    parts = [event.part for event in events if event.kind == "part"]
    assert [part.modality for part in parts] == ["text", "image", "audio"]
    np.testing.assert_array_equal(parts[1].pixels, whole.images[0].pixels)
    np.testing.assert_allclose(parts[2].samples, whole.audio[0].samples, atol=1e-6)
    assert events[-1].kind == "end" and [event.index for event in events] == sorted(event.index for event in events)


def test_another_prompt_of_the_same_padded_length_needs_no_compilation(tiny_model):
    """Free replies, too, whose budget is what the prompt leaves of the context."""
    for word in ("seven", "draw seven", "say seven, then draw it"):
        tiny_model.generate([word], seed=1)
        if word == "seven":
            compiled = {name: tiny_model.engine.counts[name] for name in ("read_prompts", "advance")}
    assert {name: tiny_model.engine.counts[name] for name in compiled} == compiled


def test_a_prompt_that_leaves_no_room_for_what_is_wanted_is_called_too_long(tiny_model):
    """It is not called a wrong `max_tokens`, which nobody gave."""
    prompt = next("x" * n for n in range(200) if len(tiny_model.encode([omni.Text("x" * n, context=True)])) == 126)
    with pytest.raises(OmniError, match="reads at most 128"):
        tiny_model.generate([prompt], want=["image"])


def test_settings_reach_the_engine_by_modality(tiny_model, monkeypatch):
    """min_p and repetition_penalty: the request's own before the model's, and what neither names stays off."""
    monkeypatch.setitem(tiny_model.generation, "repetition_penalty", {"text": 1.2, "audio": 1.1})
    prepared = tiny_model.prepare([Request(["seven"], min_p=0.1, repetition_penalty={"audio": 2}), Request(["seven"])])
    np.testing.assert_allclose([each.min_p for each in prepared], [[0.1] * 3, [0] * 3])
    np.testing.assert_allclose([each.repetition_penalty for each in prepared], [[1.2, 1, 2], [1.2, 1, 1.1]])


def test_media_guidance_drops_the_texts_of_the_prompt(tiny_model):
    """Its shadow reads the pictures and sounds alone; where it is not given there is the one that reads nothing."""
    picture = omni.Image(np.full((8, 8, 3), 90, np.uint8))
    settings = {"guidance": {"image": 3}, "media_guidance": {"image": 1.2}}
    asked, plain = tiny_model.prepare([Request(["seven", picture], **settings), Request(["seven", picture])])
    nothing, media = asked.shadows
    np.testing.assert_array_equal(media.ids, tiny_model.prepare([Request([picture])])[0].ids)
    np.testing.assert_allclose([nothing.weight, media.weight], [[0, -0.2, 0], [0, -1.8, 0]], atol=1e-6)
    np.testing.assert_array_equal([each.weight for each in plain.shadows], [[0, -1, 0]])


def test_log_probabilities_on_request(tiny_model):
    """One for each token of the reply, none unless asked for; a stream's reply has them, too."""
    asked, plain = (tiny_model.generate(["seven"], ["image"], seed=1, log_probabilities=ask) for ask in (True, False))
    np.testing.assert_array_equal(asked.ids, plain.ids)
    assert plain.log_probabilities is None and asked.log_probabilities.shape == asked.ids.shape
    assert (
        asked.log_probabilities[0] == 0 and asked.log_probabilities[1:5].max() < 0
    )  # the only one admitted, and codes
    *_, end = tiny_model.stream(["seven"], ["image"], seed=1, log_probabilities=True)
    np.testing.assert_allclose(end.reply.log_probabilities, asked.log_probabilities, atol=1e-5)
    with pytest.raises(UsageError, match="one reply"):
        tiny_model.stream(["seven"], samples=2)


def test_a_stop_string_ends_the_text_before_it(tiny_model):
    """In a reply and in a stream, though it comes in several tokens; the ids end with the token that completes it."""
    settings = {"want": ["text", "image"], "max_tokens": 60, "temperature": 1.0}
    wholes = [tiny_model.generate(["say"], seed=seed, **settings) for seed in range(4)]
    seed, found = next((i, hit) for i, each in enumerate(wholes) if (hit := re.search(r"(?<=...)[!-~]{2}", each.text)))
    whole, text = wholes[seed], wholes[seed].text[: wholes[seed].text.index(found[0])]
    stops = ["not in it", found[0]]
    reply = tiny_model.generate(["say"], seed=seed, stop=stops, **settings)
    assert [part.modality for part in reply.parts] == ["text"] and reply.text == text and reply.well_formed
    np.testing.assert_array_equal(reply.ids, whole.ids[: len(reply.ids)])
    decoded = [tiny_model.tokenizers["text"].decode(whole.spans[0].codes[: len(reply.ids) - n]) for n in (0, 1)]
    assert found[0] in decoded[0] and found[0] not in decoded[1]
    events = list(tiny_model.stream(["say"], seed=seed, stop=stops, **settings))
    assert "".join(event.text for event in events) == text
    assert [event.part.text for event in events if event.kind == "part"] == [text]


def test_text_that_may_become_a_stop_string_is_held_back():
    stop = StopStrings(["\n\nUser:", "##"])
    assert stop.settled("so\n\nUs") == stop.settled("so\n") == stop.settled("so#") == "so"
    assert stop.settled("so\nUs") == "so\nUs" and stop.cut("a ## b\n\nUser:") == "a " and stop.cut("ab") == "ab"
    assert StopStrings().settled("ab") == StopStrings().cut("ab") == "ab"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop": "end"}, "stop is a list of strings"),
        ({"stop": [""]}, "not empty"),
        ({"stop_tokens": [1.5]}, "stop_tokens is a list of ids"),
        ({"samples": 0}, "samples is 0"),
    ],
)
def test_wrong_stops_and_samples_are_refused(tiny_model, settings, message):
    with pytest.raises(UsageError, match=message):
        tiny_model.generate(["seven"], **settings)


def test_samples_are_the_replies_to_seeds_in_turn(tiny_model):
    """Beside another request, and a list even of one where samples were asked for."""
    requests = [Request(["seven"], ["image"], seed=5, samples=3), Request(["say"], ["audio"], seed=1)]
    replies = tiny_model.generate_batch(requests)
    assert len(replies) == 4
    for seed, reply in zip((5, 6, 7), replies, strict=False):
        np.testing.assert_array_equal(reply.ids, tiny_model.generate(["seven"], ["image"], seed=seed).ids)
    assert len(tiny_model.generate(["seven"], ["image"], seed=7, samples=1)) == 1


@pytest.mark.parametrize("ids", [[0, 99999], [0, -1]])
def test_ids_outside_the_vocabulary_are_refused(tiny_model, ids):
    with pytest.raises(OmniError, match=r"outside 0\.\."):
        tiny_model.decode(np.array(ids))


@pytest.mark.parametrize("seed", range(8))
def test_stream_of_a_free_reply_tells_the_same_as_generate(tiny_model, seed):
    settings = {"seed": seed, "max_tokens": 40, "temperature": 1.0}
    whole = tiny_model.generate(["say seven"], **settings)
    events = list(tiny_model.stream(["say seven"], **settings))
    assert [e.part.modality for e in events if e.kind == "part"] == [p.modality for p in whole.parts]
    streamed = {index: "".join(e.text for e in events if e.kind == "text" and e.index == index) for index in range(20)}
    for index, part in enumerate(whole.parts):
        if part.modality == "text":
            assert streamed[index] == part.text


def test_saved_and_loaded_it_is_the_same_model(tiny_model, tiny_bundle, everything):
    again = omni.load(tiny_bundle)
    np.testing.assert_array_equal(again.encode(everything), tiny_model.encode(everything))
    ids = tiny_model.encode(["draw seven"])[None]
    np.testing.assert_array_equal(again.logits(ids), tiny_model.logits(ids))
    reply, other = (model.generate(["seven"], want=["image"], seed=9) for model in (again, tiny_model))
    np.testing.assert_array_equal(reply.images[0].pixels, other.images[0].pixels)


def test_half_precision_files_are_about_half_as_large(tiny_model, tiny_bundle, tmp_path):
    tiny_model.save(tmp_path, dtype="bfloat16")
    small, large = ((path / "weights.safetensors").stat().st_size for path in (tmp_path, tiny_bundle))
    assert small < 0.55 * large
    assert omni.load(tmp_path).generate(["seven"], want=["image"]).well_formed


def test_encode_and_decode_return_the_parts(tiny_model, everything):
    parts = tiny_model.decode(tiny_model.encode(everything))
    assert [part.modality for part in parts] == ["text", "image", "audio"] and parts[0].text == "this is seven:"


def test_boundary_tokens_typed_by_a_user_stay_text(tiny_model):
    typed = "<image> </image> <turn> <eos>"
    ids = tiny_model.encode([omni.Text(typed, context=True)])
    inside = set(ids[1:-2].tolist())
    assert not inside & set(tiny_model.vocabulary.special.values())
    assert tiny_model.decode(ids)[0].text == typed


def test_loud_fast_many_channelled_sound_is_mixed_and_resampled(tiny_model):
    noise = np.random.default_rng(0).uniform(-1, 1, (8, 192000 // 10)).astype(np.float32)
    assert tiny_model.generate([omni.Audio(noise, 192000)], want=["text"]).text is not None


def test_a_directory_without_a_model_hides_no_model_in_the_box(tiny_model, tmp_path, monkeypatch):
    """Somebody's directory called digits is only read where it holds a model; as a path it is always meant."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert omni.load("digits").config != tiny_model.config
    with pytest.raises(omni.OmniError, match="not a run or a model"):
        omni.load("./digits")
    tiny_model.save(tmp_path / "digits")
    assert omni.load("digits").config == tiny_model.config


def test_what_a_user_meets_shows_itself_in_a_line(tiny_model):
    """The repr of a model's pieces and of what it gives holds neither the content of an array nor an address."""
    reply = tiny_model.generate(["seven"], want=["image"], seed=1)
    params = nnx.state(tiny_model.transformer, nnx.Param)
    pieces = [tiny_model, tiny_model.vocabulary, tiny_model.grammar, *tiny_model.tokenizers.values()]
    given = [reply, *reply.parts, *reply.spans, tiny_model.processor.tokens([Text("seven")])]
    made = [Examples(reply.parts, np.array([7])), TrainState(jnp.int32(3), params, nnx.State({}), None, None)]
    for each in (*pieces, *given, *made):
        shown = repr(each)
        assert type(each).__name__ in shown and len(shown) < 120 and "\n" not in shown
        assert not re.search(r"rray\(|dtype| 0x|[a-z]=\[", shown), shown
    assert repr(reply.spans[0]) == "Span(image, codes=int32[1, 2, 2])"
    assert (
        repr(tiny_model.vocabulary)
        == "Vocabulary(384 ids: 300 of text, 16 of image, 8 of audio0, 8 of audio1, 8 special)"
    )
    assert repr(made[1]).startswith("TrainState(step 3, 0.0 million")


def test_reply_shows_and_saves_itself(tiny_model, tmp_path):
    reply = tiny_model.generate(["seven"], want=["text", "image", "audio"], seed=0)
    assert "array" not in repr(reply) and len(repr(reply)) < 300
    assert "<audio" in reply._repr_html_() and "<img" in reply._repr_html_()
    assert [path.name for path in reply.save(tmp_path / "out")] == ["1.txt", "2.png", "3.wav"]
    np.testing.assert_array_equal(omni.Image.read(tmp_path / "out" / "2.png").pixels, reply.images[0].pixels)


def test_a_shorter_reply_leaves_nothing_of_a_longer_one(tiny_model, tmp_path):
    """Files of the reply before are removed, all others stay, whatever an index says."""
    reply = tiny_model.generate(["seven"], want=["text", "image", "audio"], seed=0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "7.png").write_text("the user's own")
    reply.save(tmp_path / "out")
    dataclasses.replace(reply, parts=reply.parts[1:]).save(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["1.png", "2.wav", "7.png", "reply.json"]
    assert json.loads((tmp_path / "out" / "reply.json").read_text())["files"] == ["1.png", "2.wav"]
    (tmp_path / "1.png").write_text("outside")
    (tmp_path / "out" / "reply.json").write_text('{"files": ["../1.png", "7.png/..", "2.wav"]}')
    reply.save(tmp_path / "out")
    assert (tmp_path / "1.png").exists() and (tmp_path / "out" / "7.png").exists()
    assert not (tmp_path / "out" / "2.wav").exists()


@pytest.mark.parametrize("index", ["[]", "no JSON", '{"files": null}', '{"files": [3]}', '{"my": "settings"}'])
def test_a_foreign_index_is_left_alone(tiny_model, tmp_path, index):
    """reply.json of another program, and all that lies beside it, stays as it is."""
    reply = tiny_model.generate(["seven"], want=["text"], seed=0)
    (tmp_path / "reply.json").write_text(index)
    with pytest.raises(OmniError, match=r"reply.json: is there, and lists no reply"):
        reply.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["reply.json"] and (
        tmp_path / "reply.json"
    ).read_text() == index


def test_a_reply_that_cannot_be_written_leaves_the_one_before(tiny_model, tmp_path, monkeypatch):
    """Nothing is removed before everything is written."""
    reply = tiny_model.generate(["seven"], want=["text", "image"], seed=0)
    reply.save(tmp_path)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def refuse(*_):
        raise OmniError("no sound can be written")

    monkeypatch.setattr(omni.Audio, "save", refuse)
    with pytest.raises(OmniError, match="no sound"):
        tiny_model.generate(["seven"], want=["text", "audio"], seed=0).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"parts": "seven"}, UsageError, "a list of parts"),
        ({"parts": ["seven"], "want": ["smell"]}, UsageError, "unknown modality 'smell'"),
        ({"parts": ["seven"], "want": ["imge"]}, UsageError, "did you mean 'image'"),
        ({"parts": ["seven"], "want": ["text", "text"]}, UsageError, "twice in a row"),
        ({"parts": ["seven"], "want": ["image"], "max_tokens": 3}, UsageError, "at least 7"),
        ({"parts": ["seven"], "temperature": -1}, UsageError, "temperature"),
        ({"parts": ["zqx " * 100]}, OmniError, "reads at most 128"),
        ({"parts": [omni.Audio(np.zeros(16000 * 4, np.float32), 16000)]}, OmniError, "too long"),
        ({"parts": [7]}, UsageError, None),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(tiny_model, arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        tiny_model.generate(**arguments)
    assert "\n" not in str(caught.value)


def damage_json(key, value):
    def damage(directory):
        path = directory / "vocabulary.json"
        data = json.loads(path.read_text())
        data[key] = value
        path.write_text(json.dumps(data))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "model.json").unlink(), "not a run or a model"),
        (lambda d: (d / "grammar.json").unlink(), "grammar.json: no such file"),
        (lambda d: (d / "grammar.json").write_text("{"), "not JSON"),
        (lambda d: (d / "weights.safetensors").write_bytes(b"short"), "not a whole safetensors file"),
        (damage_json("size", 1024), "has 384 ids, its vocabulary.json 1024"),
        (damage_json("blocks", {}), "no block 'image'"),
        (lambda d: (d / "tokenizers" / "image" / "weights.safetensors").unlink(), "no such file"),
    ],
)
def test_damaged_directories_are_named(tiny_bundle, tmp_path, damage, message):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    damage(copy)
    with pytest.raises(OmniError, match=message):
        omni.load(copy)


def test_what_belongs_to_another_model_is_refused(tiny_bundle, tiny_tokenizers, tmp_path):
    """A vocabulary, a grammar or a tokenizer of the same sizes but of another model gives a line, not nonsense."""
    image, text = tiny_tokenizers["image"], tiny_tokenizers["text"]
    other = type(image)(image.config, type(image.net)(image.config, rngs=nnx.Rngs(7)))

    def shorten(directory):
        declaration = json.loads((directory / "grammar.json").read_text())
        declaration["modalities"]["audio"]["shapes"][0]["columns"]["max"] -= 1
        (directory / "grammar.json").write_text(json.dumps(declaration))

    changes = {
        "image": lambda d: other.save(d / "tokenizers" / "image"),
        "text": lambda d: type(text).train(["another text altogether"], 300).save(d / "tokenizers" / "text"),
        "grammar": shorten,
    }
    for name, change in changes.items():
        shutil.copytree(tiny_bundle, tmp_path / name)
        change(tmp_path / name)
        with pytest.raises(OmniError, match=f"made with another {name}"):
            omni.load(tmp_path / name)


@pytest.mark.parametrize("damage", [{"open": 5}, {"shapes": 5}, {"shapes": [{"columns": "x"}]}])
def test_a_grammar_of_another_form_is_one_line(tiny_bundle, tmp_path, damage):
    shutil.copytree(tiny_bundle, tmp_path / "model")
    path = tmp_path / "model" / "grammar.json"
    declaration = json.loads(path.read_text())
    declaration["modalities"]["image"] |= damage
    path.write_text(json.dumps(declaration))
    with pytest.raises(OmniError, match="grammar"):
        omni.load(tmp_path / "model")


def test_a_model_without_a_tokenizer_still_gives_logits_and_says_what_is_missing(tiny_bundle, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    shutil.rmtree(copy / "tokenizers" / "image")
    model = omni.load(copy)
    assert model.logits(np.zeros((1, 3), np.int32)).shape == (1, 3, 384)
    with pytest.raises(OmniError, match="tokenizers/image"):
        model.generate(["seven"], want=["image"])


def test_constrained_replies_always_parse(tiny_model):
    """Random weights at temperature 1 wander everywhere; no reply may be malformed, and some would be unconstrained."""
    requests = [Request(["seven"], None, seed=seed, temperature=1.0, max_tokens=30) for seed in range(64)]
    replies = tiny_model.generate_batch(requests)
    for reply in replies:
        assert reply.well_formed
        tiny_model.grammar.parse(np.concatenate([tiny_model.grammar.prompt([]), reply.ids]))
    loose = [Request(["seven"], seed=s, temperature=1.0, max_tokens=30, constrained=False) for s in range(64)]
    assert not all(reply.well_formed for reply in tiny_model.generate_batch(loose))
