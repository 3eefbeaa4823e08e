"""Emu3.5's documents and names: no end behind the last row, an answer's own end, guidance on codes alone."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from public_models import golden
from published_presets import emu3_5_preset

import omni
from omni.grammar import Grammar, Span
from omni.interop import emu3_5
from omni.interop.family import Preset
from omni.model import TransformerConfig
from omni_tokenizers.checkpoints.family import Settings


@pytest.fixture(scope="module")
def released():
    """The grammar at the release's ids, with the squares of either area alone."""
    preset = emu3_5_preset()
    shapes = preset.declaration["modalities"]["image"]["shapes"]
    return Grammar(emu3_5.grammar([shape for shape in shapes if shape["rows"] == shape["columns"]]), preset.vocabulary)


def names() -> dict[str, int]:
    """The control tokens and codes in the order in which the release's text tokenizer numbers them."""
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205))]
    visual = ["<|image token|>", "<|image start|>", "<|image end|>", *(f"<|visual {code}|>" for code in range(131_072))]
    return {name: 151_643 + place for place, name in enumerate([*control, *visual])}


def written(codes: np.ndarray) -> list[int]:
    """The ids of a picture, put together name by name; sizes are less than 100."""
    ids, characters = names(), {"*": 9} | {str(digit): 15 + digit for digit in range(10)}
    rows = [[ids[f"<|visual {code}|>"] for code in row] for row in codes.tolist()]
    size = [characters[character] for character in f"{len(rows)}*{len(rows[0])}"]
    lines = rows[0] + [token for row in rows[1:] for token in (ids["<|extra_200|>"], *row)]
    return [ids["<|image start|>"], *size, ids["<|image token|>"], *lines, ids["<|image end|>"]]


def test_the_release_is_written_as_published(released):
    """Size as text, rows with ends between them alone; an answer between <|extra_100|> and <|extra_101|>; read back."""
    codes, ids = np.random.default_rng(0).integers(0, 131_072, (1, 45, 45)), names()
    assert released.span_ids(Span("image", codes)).tolist() == written(codes[0])
    document = released.pack([Span("text", np.array([5]), context=True), Span("image", codes)])
    assert document.ids[:3].tolist() == [ids["<|extra_203|>"], 5, ids["<|extra_100|>"]]
    assert document.ids[-1] == ids["<|extra_101|>"] and released.control["pad"] == ids["<|endoftext|>"]
    np.testing.assert_array_equal(released.parse(document.ids)[1].codes, codes)
    thoughts = [ids[f"<|extra_{number}|>"] for number in (50, 51, 60, 61)]
    assert released.vocabulary.block("text").tolist() == [*range(151_643), *thoughts]
    assert released.vocabulary.size == 282_926 and released.vocabulary.block("image")[-1] == 282_925


def test_sizes_are_those_of_the_tools():
    """Eight sizes of about a megapixel, and what 720 x 720 pixels become at their ratios."""
    shapes = emu3_5_preset().declaration["modalities"]["image"]["shapes"]
    assert [(shape["rows"], shape["columns"]) for shape in shapes[:2]] == [(55, 73), (41, 97)] and len(shapes) == 16
    for shape, width, height in zip(shapes[8:], (4, 21, 16, 3, 1, 3, 9, 2), (3, 9, 9, 2, 1, 4, 16, 3), strict=True):
        pixels = int((720 * 720 * height / width) ** 0.5)
        assert shape["rows"] == (pixels + 8) // 16 and shape["columns"] == (int(pixels * width / height) + 8) // 16


def with_pictures(tmp_path):
    """A small model whose context holds the smallest of the release's pictures, 29 x 69 codes."""
    stored = golden("emu3.5")
    return dataclasses.replace(stored, config=stored.config | {"max_position_embeddings": 2070}).write(tmp_path)


def test_a_directory_is_a_model_with_pictures(tmp_path):
    """Grammar, context and the tools' settings come from config.json; what is missing for pixels is named."""
    model = omni.load(with_pictures(tmp_path))
    assert list(model.grammar.layouts["image"].shapes) == [(29, 69)] and model.generation == emu3_5.GENERATION
    assert model.grammar.control == {"bos": 303, "turn": 200, "eos": 201, "pad": 97}
    assert len(model.vocabulary.block("image")) == 140 and len(model.vocabulary.block("text")) == 97 + 4
    with pytest.raises(omni.OmniError, match="without its image tokenizer: add the directory tokenizers/image"):
        model.decode(model.grammar.pack([Span("image", np.zeros((1, 29, 69), int))]).ids)


def test_an_export_has_the_release_s_keys(tmp_path):
    """config.json is what the release's own class reads, and the directory is the same model here."""
    model = omni.load(with_pictures(tmp_path / "theirs"))
    model.export(tmp_path / "again")
    theirs, again = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "again"))
    kept = ("model_type", "architectures", "rope_theta", "head_dim", "bos_token_id", "eos_token_id", "pad_token_id")
    for key in (*kept, *emu3_5.PICTURE, "vocab_size", "num_key_value_heads", "rms_norm_eps", "hidden_act"):
        assert again[key] == theirs[key], key
    assert "rope_parameters" not in again
    other = omni.load(tmp_path / "again")
    assert other.grammar.hash == model.grammar.hash and other.generation == model.generation
    model.save(tmp_path / "ours")
    omni.load(tmp_path / "ours").export(tmp_path / "third")
    assert json.loads((tmp_path / "third" / "config.json").read_text())["model_type"] == "Emu3"


def test_guidance_is_theirs():
    """Of a prompt of text and a picture the tools take log-probabilities without its text + 3 x (with it - those), for
    codes alone: what a reply draws from is the same, by the family's own settings."""
    shapes = [{"rows": 2, "columns": 3, "prefix": [5]}]
    preset = emu3_5.preset(Settings(golden("emu3.5").config, "x"), TransformerConfig(vocabulary_size=448), None)
    grammar = Grammar(emu3_5.grammar(shapes), preset.vocabulary)
    prompts = omni.prompts.Prompts(omni.processor.Processor(preset.vocabulary, grammar, {}), 160, emu3_5.GENERATION)
    message = [Span("text", np.array([7, 8])), Span("image", np.arange(6).reshape(1, 2, 3))]
    turn = omni.prompts.Turn(None, (omni.Text("x"), omni.Image(np.zeros((8, 8, 3), np.uint8))), tuple(message))
    prepared = prompts.of_turns(omni.Request([], ["image"]), [turn])
    draw = np.random.default_rng(0)
    logits = {tuple(prepared.ids): draw.normal(size=448), tuple(grammar.prompt(message[1:])): draw.normal(size=448)}
    logits[tuple(grammar.prompt([]))] = draw.normal(size=448)
    with_text, without_text, _ = logits.values()
    for modality in ("text", "image"):
        place = grammar.index(modality)
        ours = with_text + sum(
            shadow.weight[place] * (logits[tuple(shadow.ids)] - with_text) for shadow in prepared.shadows
        )
        one, other = jax.nn.log_softmax(jnp.asarray(with_text)), jax.nn.log_softmax(jnp.asarray(without_text))
        theirs = 3.0 * (one - other) + other if modality == "image" else one
        np.testing.assert_allclose(jax.nn.softmax(jnp.asarray(ours)), jax.nn.softmax(theirs), rtol=1e-4, atol=1e-7)
    assert prepared.top_k.tolist() == [1024, 10_240] and prepared.top_p.tolist() == pytest.approx([0.9, 1.0])


def test_small_contexts_know_text_alone(tmp_path, caplog):
    """Where no picture fits, none can be asked for, and the log says so."""
    model = omni.load(golden("emu3.5").write(tmp_path))
    assert model.grammar.modalities == ("text",) and model.generation == {}
    assert "no picture fits 160 tokens" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": None}, "this is Emu3 under its first names; take the directory for transformers"),
        ({"eol_token_id": 203}, "of 448 ids none are left to text"),
        ({"eoi_token_id": 447}, "of 448 ids none are left to text, or to codes"),
        ({"boi_token_id": 305}, "id 305 belongs to"),
        ({"boi_token_id": "305"}, "boi_token_id = '305' is not of the type"),
    ],
)
def test_ids_that_do_not_fit_are_one_line(tmp_path, changes, message):
    """Each mistake names the file."""
    stored = golden("emu3.5")
    with pytest.raises(omni.OmniError, match=message) as caught:
        omni.load(dataclasses.replace(stored, config=stored.config | changes).write(tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_end_that_config_leaves_out_is_the_release_s():
    """Without eos_token_id, null or missing, it is <|extra_204|>, four behind a row's end."""
    values = golden("emu3.5").config | {"eos_token_id": None}
    preset: Preset = emu3_5.preset(Settings(values, "x"), TransformerConfig(vocabulary_size=448), None)
    assert preset.vocabulary.special[emu3_5.END] == 304
