"""Emu3's documents and names: sizes in plain text, rows with ends, tensors of either version."""

import dataclasses
import json
import re

import numpy as np
import pytest
from public_models import golden
from published_presets import DIGITS, emu3_preset

import omni
from omni.grammar import Grammar, Span
from omni.interop import emu3
from omni.model import TransformerConfig
from omni_tokenizers.checkpoints.family import Settings


@pytest.fixture(scope="module")
def released():
    """The grammar at the release's ids."""
    preset = emu3_preset()
    return Grammar(preset.declaration, preset.vocabulary)


def test_the_release_is_written_as_published(released):
    """begin, "90*90" as text, image, ninety rows with their ends, last, end; and read back."""
    codes = np.random.default_rng(0).integers(0, 32_768, (1, 90, 90))
    ids = released.span_ids(Span("image", codes))
    size = [DIGITS[character] for character in "90*90"]
    assert ids[:7].tolist() == [151_852, *size, 151_851] and ids[-2:].tolist() == [151_847, 151_853]
    rows = ids[7:-2].reshape(90, 91)
    assert (rows[:, -1] == 151_846).all()
    np.testing.assert_array_equal(rows[:, :-1], codes[0] + 151_854)
    document = released.pack([Span("text", np.array([5])), Span("image", codes)])
    assert document.ids[0] == 151_849 and document.ids[-1] == 151_850
    np.testing.assert_array_equal(released.parse(document.ids)[1].codes, codes)
    assert {"turn": 184_622}.items() <= released.control.items() and released.vocabulary.size == 184_704
    assert {(64, 64), (78, 104), (104, 78), (120, 68)} <= released.layouts["image"].shapes.keys()


def test_sizes_are_text_elsewhere(released):
    """The digits that open a picture are text everywhere else; only sizes that there are follow a begin."""
    digits = released.vocabulary.to_codes("text", np.array([DIGITS["9"], DIGITS["0"], DIGITS["*"]]))
    assert (digits >= 0).all()
    released.annotate(released.pack([Span("text", digits)]).ids)
    with pytest.raises(omni.OmniError, match="may not stand there"):
        released.annotate(np.array([151_849, 151_852, DIGITS["3"]]))


def test_any_size_is_written_where_a_tokenizer_keeps_digits_apart(released):
    """A picture that is read has the release's ids of its size; a tokenizer that joins two digits writes none so."""
    assert released.layouts["image"].spelling == DIGITS
    ids = released.prompt([Span("image", np.zeros((1, 57, 3), int), context=True)])
    assert ids[1:7].tolist() == [151_852, *(DIGITS[character] for character in "57*3"), 151_851]

    def joined(size: str) -> list[int]:
        return [DIGITS.get(piece, 99) for piece in re.findall("57|.", size)]

    assert emu3.spelled(joined) == {} and emu3.spelled(lambda size: [7, *joined(size)]) == {}


def test_small_grids_are_drawn_whole():
    """Random weights draw grids of declared sizes, with ends of rows, whose ids parse; the parts are pictures."""
    stored = golden("emu3")
    names = stored.config["vocabulary_map"]
    shapes = [
        {"rows": rows, "columns": columns, "prefix": [names[character] for character in f"{rows}*{columns}"]}
        for rows, columns in ((2, 2), (2, 3), (3, 2), (10, 1))
    ]
    vocabulary = emu3.preset(Settings(stored.config, "x"), TransformerConfig(vocabulary_size=96), None).vocabulary
    grammar = Grammar(emu3.grammar(shapes), vocabulary)
    assert grammar.control == {"bos": 1, "turn": 96, "eos": 2, "pad": 0}
    config = TransformerConfig(vocabulary_size=128, depth=1, dim=16, heads=2, key_value_heads=1, head_dim=8, mlp_dim=16)
    transformer = omni.bundle.Transformer(config, rngs=omni.bundle.nnx.Rngs(0))
    model = omni.Model(transformer, vocabulary, grammar, {}, context_length=160)
    prepared = model.prepare([omni.Request([], ["image", "image"], seed=seed, temperature=1.0) for seed in range(24)])
    found = set()
    for reply in model.engine.generate(prepared):
        spans = grammar.parse(np.concatenate([grammar.prompt([]), reply.ids]))
        assert reply.well_formed and len(spans) == 2
        found |= {span.codes.shape[1:] for span in spans}
    assert found == {(2, 2), (2, 3), (3, 2), (10, 1)}


def test_names_of_either_version_are_the_same_model(tmp_path):
    """Tensors under the names that transformers 5 has in memory are read as those that its files have."""
    stored = golden("emu3")
    rules = (
        ("^text_model.model.", "model.text_model."),
        ("^vqmodel.", "model.vqmodel."),
        ("^text_model.lm_head.", "lm_head."),
    )
    tensors = {}
    for name, value in stored.tensors.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        tensors[name] = value
    assert tensors.keys().isdisjoint(stored.tensors)
    assert any(name.startswith("text_model.model.layers.") for name in stored.tensors)
    one, other = (dataclasses.replace(stored, tensors=each) for each in (stored.tensors, tensors))
    ours, newer = omni.load(one.write(tmp_path / "one")), omni.load(other.write(tmp_path / "other"))
    np.testing.assert_array_equal(ours.logits(stored.ids), newer.logits(stored.ids))
    assert ours.tokenizers["image"].hash == newer.tokenizers["image"].hash


def test_without_spelling_there_is_text_alone(tmp_path, caplog):
    """Where nothing says how a size is written, pictures are left out, and the log says which file to add."""
    stored = golden("emu3")
    names = {name: token for name, token in stored.config["vocabulary_map"].items() if name != "*"}
    model = omni.load(dataclasses.replace(stored, config=stored.config | {"vocabulary_map": names}).write(tmp_path))
    assert model.grammar.modalities == ("text",) and "add tokenizer.json" in caplog.text
    assert model.logits(stored.ids).shape == (3, 12, 128)


def test_names_of_codes_are_checked(tmp_path):
    """A code without a name is refused."""
    stored = golden("emu3")
    names = {name: token for name, token in stored.config["vocabulary_map"].items() if "000003" not in name}
    with pytest.raises(omni.OmniError, match="15 names of codes of pictures"):
        omni.load(dataclasses.replace(stored, config=stored.config | {"vocabulary_map": names}).write(tmp_path))


def test_an_export_without_the_tokenizer_of_pictures_says_what_it_is(tmp_path, caplog):
    """The language model alone has Llama's shape and is written as such; the log says so, and what to add."""
    stored = golden("emu3")
    tensors = {name: value for name, value in stored.tensors.items() if "vqmodel" not in name}
    dataclasses.replace(stored, tensors=tensors).write(tmp_path / "language")
    names = stored.config["vocabulary_map"]
    shapes = [{"rows": 2, "columns": 2, "prefix": [names[character] for character in "2*2"]}]
    (tmp_path / "language" / "grammar.json").write_text(json.dumps(emu3.grammar(shapes)))
    omni.load(tmp_path / "language").export(tmp_path / "out")
    assert "written as llama; it came without its image tokenizer: add the directory tokenizers/image" in caplog.text
