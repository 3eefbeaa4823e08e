"""AnyGPT's documents and names: a Llama known by the tokens that its text tokenizer adds."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx
from public_models import golden
from published_presets import anygpt_names, anygpt_preset
from text_json import trained

import omni
from omni.grammar import Grammar, Span
from omni.interop import anygpt
from omni.processor import Processor

NAMES = json.loads(golden("anygpt").files["added_tokens.json"])
PIECES = 400


@pytest.fixture(scope="module")
def released():
    """The grammar at the release's names and sizes."""
    preset = anygpt_preset()
    return Grammar(preset.declaration, preset.vocabulary)


def test_the_release_is_written_as_published(released):
    """Music frame by frame with 2048 added for each level, pictures of 32 codes, speech; all read back."""
    random, names = np.random.default_rng(0), anygpt_names()
    image, speech = random.integers(0, 8192, (1, 1, 32)), random.integers(0, 1024, (1, 1, 50))
    music = random.integers(0, 2048, (4, 1, 9))
    frames = [f"<🎶{music[level, 0, frame] + 2048 * level}>" for frame in range(9) for level in range(4)]
    written = {
        "image": ["<soim>", *(f"<👀{code}>" for code in image.ravel()), "<eoim>"],
        "speech": ["<sosp>", *(f"<🗣️{code}>" for code in speech.ravel()), "<eosp>"],
        "audio": ["<somu>", *frames, "<eomu>"],
    }
    spans = [Span("text", np.array([1, 2]), context=True)]
    spans += [Span("image", image), Span("speech", speech), Span("audio", music)]
    for span in spans[1:]:
        assert released.span_ids(span).tolist() == [names[name] for name in written[span.modality]]
    document = released.pack(spans).ids
    assert document[0] == 1 and document[-1] == names["<eos>"] and names["[MMGPT]"] in document.tolist()
    for given, found in zip(spans, released.parse(document), strict=True):
        np.testing.assert_array_equal(found.codes, given.codes)
    assert released.control["pad"] == 0 and released.vocabulary.size == 49_418
    pieces = set(released.vocabulary.block("text").tolist())
    assert pieces == {*range(3, 32_000), names["[Human]"], names["<eoh>"]}


def test_it_is_known_by_either_file(tmp_path):
    """Names in added_tokens.json or in tokenizer.json make of a Llama an AnyGPT, with the tools' settings; without
    them the same files are a text model, with the same logits."""
    stored = golden("anygpt")
    alone = omni.load(stored.write(tmp_path / "alone"))
    assert alone.grammar.modalities == ("text", "image", "speech", "audio") and alone.generation == anygpt.GENERATION
    assert [len(table) for table in alone.grammar.layouts["audio"].tables] == [5] * 4
    assert alone.vocabulary.size == 96 and alone.vocabulary.special["<eos 2>"] == 2
    text = omni.load(dataclasses.replace(stored, files={}).write(tmp_path / "llama"))
    assert text.grammar.modalities == ("text",) and text.generation == {}
    published = jax.tree.map(
        lambda x: x[:96] if x.shape[0] == 128 else x, nnx.to_pure_dict(nnx.state(text.transformer))
    )
    jax.tree.map(np.testing.assert_array_equal, published, nnx.to_pure_dict(nnx.state(alone.transformer)))
    # Of the same parameters, to the bit; heads of other widths are other products, which may be rounded otherwise.
    np.testing.assert_allclose(text.logits(stored.ids)[..., :96], alone.logits(stored.ids), atol=1e-5)


@pytest.mark.parametrize(("context", "speech", "music"), [(32, 1, 1), (100, 68, 17), (65_536, 16_384, 16_376)])
def test_any_context_has_lengths(tmp_path, context, speech, music):
    """Speech and music are as long as the context has room for, at least one frame, at most what a layout holds."""
    stored = golden("anygpt")
    config = stored.config | {"max_position_embeddings": context}
    layouts = omni.load(dataclasses.replace(stored, config=config).write(tmp_path)).grammar.layouts
    assert [max(layouts[name].shapes) for name in ("speech", "audio")] == [(1, speech), (1, music)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The small model with a text tokenizer, whose added tokens stand behind its pieces."""
    stored, random = golden("anygpt"), np.random.default_rng(0)
    size = PIECES + len(NAMES)
    rows = {name: random.normal(size=(size, 16)).astype(np.float32) for name in ("model.embed_tokens.weight",)}
    rows["lm_head.weight"] = random.normal(size=(size, 16)).astype(np.float32)
    content = json.loads(trained(PIECES))
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    names = {name: PIECES + place for place, name in enumerate(NAMES)}
    content["added_tokens"] += [{"id": token, "content": name} | plain for name, token in names.items()]
    files = {"tokenizer.json": json.dumps(content)}
    config = stored.config | {"vocab_size": size}
    model = dataclasses.replace(stored, config=config, tensors=stored.tensors | rows, files=files)
    return omni.load(model.write(tmp_path_factory.mktemp("anygpt")))


def test_typed_names_of_codes_are_letters(whole):
    """What opens a picture cannot be typed; what stands before a question and behind it can, as the template has it."""
    text = whole.tokenizers["text"]
    for typed in ("<👀3>", "<soim>", "[MMGPT]"):
        assert text.decode(text.encode(typed)) == typed and len(text.encode(typed)) > 1
    for typed in ("[Human]", "<eoh>"):
        assert len(text.encode(typed)) == 1
    ids = whole.encode([omni.Text("[Human]: Draw.<eoh> ", context=True), "yes"])
    names = [whole.vocabulary.special["<turn>"], PIECES + list(NAMES).index("<eoh>")]
    assert all(token in ids.tolist() for token in names)


class Codec:
    """A codec of four levels of five codes that gives silence."""

    codebook_sizes, samples_per_frame, sample_rate = (5, 5, 5, 5), 640, 32_000

    def decode(self, codes):
        return np.zeros((len(codes.ids), 1, codes.ids.shape[2] * 640), np.float32)


def test_music_is_sound_and_speech_is_codes_alone(whole):
    """With a codec music becomes audio; of speech the message says how to have its ids."""
    processor = Processor(whole.vocabulary, whole.grammar, {"audio": Codec()})
    sound = processor.parts([[Span("audio", np.zeros((4, 1, 3), int))]])[0][0]
    assert isinstance(sound, omni.Audio) and sound.sample_rate == 32_000 and sound.samples.shape == (1, 1920)
    speech = Span("speech", np.zeros((1, 1, 3), int))
    with pytest.raises(omni.OmniError, match=r"speech is codes alone.*model\.engine\.generate"):
        processor.parts([[Span("audio", np.zeros((4, 1, 3), int)), speech]])
    prepared = whole.prepare([omni.Request(["say"], ["speech"], max_tokens=20, seed=3)])
    reply = whole.engine.generate(prepared)[0]
    spans = whole.grammar.parse(np.concatenate([prepared[0].ids, reply.ids]))
    assert [span.modality for span in spans if not span.context] == ["speech"]


def test_it_is_exported_as_a_llama(whole, tmp_path):
    """transformers reads a Llama with the text tokenizer; here it is the model that it was."""
    whole.export(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "llama" and config["eos_token_id"] == [whole.grammar.control["eos"], 2]
    again = omni.load(tmp_path)
    assert again.grammar.hash == whole.grammar.hash and again.vocabulary.hash == whole.vocabulary.hash
    assert again.generation == whole.generation


def without(*names):
    return {name: token for name, token in NAMES.items() if name not in names}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (without("<👀3>"), "of 7 codes of image, the added tokens lack <👀3>"),
        (without("<🎶19>"), "19 codes of music are not 4 levels"),
        (without("<eosp>"), "the added tokens lack <eosp>"),
        (without(*(f"<🗣️{code}>" for code in range(6))), "of 0 codes of speech, the added tokens lack all"),
        (NAMES | {"<🎶7>": 96}, "'<🎶7>' has an id that is none below 96"),
        (NAMES | {"<🎶7>": NAMES["<🎶8>"]}, "block 'audio 1' is empty or names an id twice"),
    ],
)
def test_names_that_do_not_fit_are_one_line(tmp_path, names, message):
    """Each mistake names the directory."""
    files = {"added_tokens.json": json.dumps(names)}
    with pytest.raises(omni.OmniError, match=message) as caught:
        omni.load(dataclasses.replace(golden("anygpt"), files=files).write(tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
