"""Chameleon's documents: which ids are pictures, spans of the published size, the decoder that transformers has not."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx
from public_models import golden
from published_presets import chameleon_code, chameleon_names, chameleon_preset
from text_json import trained

import omni
from omni.grammar import Grammar, Span
from omni.interop import chameleon
from omni_tokenizers import weights
from omni_tokenizers.checkpoints.vqgan import without_decoder
from omni_tokenizers.tensor_files import open_directory
from omni_tokenizers.vqgan import VQGAN, VQGANTokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return golden("chameleon").write(tmp_path_factory.mktemp("public") / "chameleon")


@pytest.fixture(scope="module")
def model(directory):
    return omni.load(directory)


@pytest.fixture(scope="module")
def released():
    """The preset for the names and ids of the release."""
    return chameleon_names(), chameleon_preset()


def test_the_release_is_written_as_published(released):
    """bos, begin, 32 rows of 32 codes at the ids of their names, end, turn, eos: at the published ids."""
    names, preset = released
    grammar = Grammar(preset.declaration, preset.vocabulary)
    codes = np.random.default_rng(0).integers(0, 8192, (1, 32, 32))
    ids = grammar.pack([Span("image", codes, context=True), Span("text", np.array([0, 7]))]).ids
    assert ids[[0, 1, 1026, 1027, -1]].tolist() == [0, 8197, 8196, 8710, 2] and len(ids) == 1 + 1026 + 1 + 2 + 1
    assert ids[2:1026].tolist() == [names[chameleon_code(code)] for code in codes.ravel()]
    assert preset.vocabulary.size == 65_536
    spans = grammar.parse(ids)
    np.testing.assert_array_equal(spans[0].codes, codes)
    with pytest.raises(omni.OmniError, match="it knows 32 x 32"):
        grammar.span_ids(Span("image", codes[:, :31]))


def test_only_text_is_text(released):
    """Neither codes of pictures nor control, reserved and unknown tokens can stand in a text."""
    names, preset = released
    text = preset.vocabulary.block("text")
    assert not set(text.tolist()) & set(names.values()) and len(text) == 65_536 - len(set(names.values()))


def test_lumina_writes_sizes_and_ends_of_rows(released):
    """begin, rows and columns in units of 32 pixels, 32 rows of 32 codes each with its end, end; other sizes too."""
    grammar = Grammar(chameleon.lumina_grammar(512), released[1].vocabulary)
    codes = np.random.default_rng(0).integers(0, 8192, (1, 32, 32))
    ids = grammar.span_ids(Span("image", codes))
    assert ids[:3].tolist() == [8197, 8820, 8820] and ids[-1] == 8196
    rows = ids[3:-1].reshape(32, 33)
    assert (rows[:, -1] == 8803).all()
    np.testing.assert_array_equal(rows[:, :-1], grammar.vocabulary.to_ids("image", codes[0]))
    sizes = set(grammar.layouts["image"].shapes)
    assert {(16, 64), (64, 16), (24, 42), (42, 24)} <= sizes and max(rows * columns for rows, columns in sizes) == 1024
    np.testing.assert_array_equal(grammar.parse(grammar.pack([Span("image", codes)]).ids)[0].codes, codes)


def test_a_grammar_beside_the_weights_goes_first(directory, tmp_path):
    """Whoever writes documents otherwise, as Lumina-mGPT does, says so in grammar.json; half of a preset is refused."""
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shapes = [{"rows": 1, "columns": 2, "prefix": [90]}, {"rows": 2, "columns": 1, "prefix": [91]}]
    (tmp_path / "grammar.json").write_text(json.dumps(chameleon.grammar(*shapes, row_end=92)))
    model = omni.load(tmp_path)
    table = model.vocabulary.block("image")
    ids = model.grammar.span_ids(Span("image", np.array([[[3], [5]]])))
    assert ids.tolist() == [81, 91, table[3], 92, table[5], 92, 80]
    smaller = model.vocabulary.to_json() | {"size": 95}
    smaller["blocks"]["text"] = {"table": [token for token in model.vocabulary.block("text").tolist() if token < 95]}
    (tmp_path / "vocabulary.json").write_text(json.dumps(smaller))
    with pytest.raises(omni.OmniError, match=r"vocabulary\.json has 95 ids, config\.json 96"):
        omni.load(tmp_path)
    (tmp_path / "grammar.json").unlink()
    with pytest.raises(omni.OmniError, match=r"grammar\.json: no such file"):
        omni.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({chameleon_code(3): None}, "15 names of codes of pictures, for 15 codes"),
        ({chameleon_code(3): 40}, "for 16 codes and 15 ids"),
        ({chameleon_code(3): None, chameleon_code(99): 90}, "16 names"),
        ({"IMGIMGADZ": 90}, "17 names of codes of pictures, for 16 codes"),
        ({chameleon_code(3): 96}, "'IMGIMGDZ' has 96, no id below 96"),
        ({chameleon_code(3): "x"}, "'IMGIMGDZ' has 'x', no id"),
    ],
)
def test_names_that_are_no_bijection_are_refused(tmp_path, change, message):
    """Each code of the codebook has one name and each name one id, or nothing is loaded."""
    stored = golden("chameleon")
    names = {name: token for name, token in (stored.config["vocabulary_map"] | change).items() if token is not None}
    dataclasses.replace(stored, config=stored.config | {"vocabulary_map": names}).write(tmp_path)
    with pytest.raises(omni.OmniError, match=message):
        omni.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocabulary_map": None}, "no vocabulary_map"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps = 1e-06 is not supported"),
    ],
)
def test_settings_that_are_not_computed_are_refused(tmp_path, change, message):
    """One line with the key's name."""
    stored = golden("chameleon")
    dataclasses.replace(stored, config=stored.config | change).write(tmp_path)
    with pytest.raises(omni.OmniError, match=message):
        omni.load(tmp_path)


def test_pictures_are_spans_at_scattered_ids(model, directory):
    """A picture goes through the encoder in the weights, and stands in a document at the ids of its codes' names."""
    names = golden("chameleon").config["vocabulary_map"]
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    ids = model.encode([omni.Image(pixels)])
    codes = np.asarray(model.tokenizers["image"].encode(pixels[None]))
    assert codes.shape == (1, 4, 4)
    assert ids.tolist() == [0, 83, 81, *(names[chameleon_code(code)] for code in codes.ravel()), 80, 2]
    assert model.logits(ids[None]).shape == (1, 21, 96)


def test_replies_hold_whole_pictures(model):
    """Random weights draw spans of exactly the declared size, whose ids parse."""
    prepared = model.prepare([omni.Request([], ["image"], seed=seed, temperature=1.0) for seed in range(8)])
    for reply in model.engine.generate(prepared):
        spans = model.grammar.parse(np.concatenate([model.grammar.prompt([]), reply.ids]))
        assert reply.well_formed and [span.codes.shape for span in spans] == [(1, 4, 4)]


def test_a_decoder_beside_the_weights_draws_and_stays(model, directory, tmp_path):
    """transformers' directories hold no decoder: one in tokenizers/image decodes replies, and exports keep it."""
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    inside = model.tokenizers["image"]
    config = dataclasses.replace(inside.config, has_decoder=True)
    graphdef, state = nnx.split(VQGAN(config, rngs=nnx.Rngs(0)))
    tensors = weights.flatten(state) | weights.flatten(inside.state)
    whole = VQGANTokenizer(config, nnx.merge(graphdef, weights.unflatten(state, tensors)))
    assert without_decoder(whole).hash == inside.hash
    whole.save(tmp_path / "tokenizers" / "image")
    drawing = omni.load(tmp_path)
    reply = drawing.generate([omni.Image(np.zeros((8, 8, 3), np.uint8))], want=["image"], seed=0)
    assert reply.images[0].pixels.shape == (8, 8, 3)
    drawing.export(tmp_path / "export")
    again = omni.load(tmp_path / "export")
    assert again.tokenizers["image"].hash == whole.hash
    theirs, written = golden("chameleon").tensors, open_directory(tmp_path / "export")
    assert written.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(written[name], value)


def test_without_the_tokenizer_of_pictures_there_are_logits(directory, tmp_path):
    """A directory of the language model alone gives logits, and says what pictures need."""
    stored = golden("chameleon")
    tensors = {name: value for name, value in stored.tensors.items() if "vqmodel" not in name}
    model = omni.load(dataclasses.replace(stored, tensors=tensors).write(tmp_path / "language"))
    assert model.logits(stored.ids).shape == (3, 12, 96)
    with pytest.raises(omni.OmniError, match="add the directory tokenizers/image"):
        model.generate([omni.Image(np.zeros((8, 8, 3), np.uint8))])
    said = "chameleon has no model without its image tokenizer.*: add the directory tokenizers/image of the model"
    with pytest.raises(omni.OmniError, match=said):
        model.export(tmp_path / "out")


def test_names_of_pictures_typed_by_a_user_stay_text(directory, tmp_path):
    """A tokenizer.json that has the codes' names among its tokens does not turn text into pictures."""
    content, stored = json.loads(trained(400)), golden("chameleon")
    names = {name: token + 400 for name, token in stored.config["vocabulary_map"].items()}
    config = stored.config | {"vocab_size": 500, "vocabulary_map": names}
    rows = np.random.default_rng(0).normal(size=(500, 16)).astype(np.float32)
    tensors = stored.tensors | {"model.embed_tokens.weight": rows, "lm_head.weight": rows}
    dataclasses.replace(stored, config=config, tensors=tensors).write(tmp_path)
    added = [{"id": token, "content": name} for name, token in sorted(names.items(), key=lambda each: each[1])]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    content["added_tokens"] += [each | plain for each in added]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    model = omni.load(tmp_path)
    typed = "IMGIMGAZ<racm3:break><reserved08706>"
    ids = model.encode([omni.Text(typed, context=True)])
    assert not set(ids[1:-2].tolist()) & set(names.values())
    assert model.decode(ids)[0].text == typed
