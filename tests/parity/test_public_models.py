"""Whole public models against transformers, every parameter noise: logits, greedy replies, the way in and out."""

import dataclasses
import functools
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import omni
from omni_tokenizers import weights

torch = pytest.importorskip("torch", reason="needs torch: pip install 'omni-any-to-any[parity]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'omni-any-to-any[parity]'")

from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "interop"))
import text_pieces  # noqa: E402
from chameleon_reference import forward, random_ranks  # noqa: E402
from public_models import greedy_with_cache, largest_error  # noqa: E402
from text_json import SAMPLE, trained, write_chameleon_names  # noqa: E402
from their_models import CASES, greedy, loaded, their_logits  # noqa: E402

from omni.bundle import Model  # noqa: E402
from omni.image_processor import ImageProcessor  # noqa: E402
from omni.interop.verification import verify  # noqa: E402
from omni_tokenizers.text_json import JsonTextTokenizer  # noqa: E402
from omni_tokenizers.text_pieces import PieceTextTokenizer  # noqa: E402

pytestmark = pytest.mark.parity

TOLERANCE = 1e-4
"""Of the largest logit, or of 1."""
SHAPES = ((1, 1), (3, 7), (1, 24), (3, 40))
"""Batches and lengths."""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The model of a case and the directory that transformers wrote."""

    @functools.cache
    def made(name):
        directory = tmp_path_factory.mktemp(name.replace(" ", "_"))
        return CASES[name].write(directory), directory

    return made


def ids_of(model, batch: int, length: int) -> np.ndarray:
    """Random published ids: of a family with pictures, text and codes of pictures alike."""
    return np.random.default_rng(length).integers(0, model.config.get_text_config().vocab_size, (batch, length))


def logits(model, ids: np.ndarray) -> np.ndarray:
    """Our logits in full precision."""
    with jax.default_matmul_precision("highest"):
        return model.logits(ids)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_theirs(name, theirs, capsys):
    """A directory that transformers wrote gives its logits, at several lengths, alone and in a batch."""
    model, directory = theirs(name)
    ours, errors = omni.load(directory), []
    for shape in SHAPES:
        ids = ids_of(model, *shape)
        expected = their_logits(model, ids)
        assert expected.std() > 0.1
        errors.append(largest_error(logits(ours, ids), expected))
    with capsys.disabled():
        print(f"\n{name}: logits {max(errors):.1e}", end="")
    assert max(errors) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_matters(name, theirs, tmp_path):
    """With any one imported tensor changed the comparison fails."""
    model, directory = theirs(name)
    for file in directory.glob("*.json"):
        (tmp_path / file.name).write_text(file.read_text())
    tensors = weights.read(directory / "model.safetensors")
    tensors = {key: value for key, value in tensors.items() if "vqmodel" not in key}
    of_pictures = ("vision_model", "aligner", "generation_")  # those that ids of text never reach: test_janus.py
    keys = [key for key in tensors if not any(part in key for part in of_pictures)]
    ids, random = ids_of(model, 1, 12), np.random.default_rng(0)
    expected = their_logits(model, ids)
    assert len(keys) > 3 * 9
    for key in keys:
        noise = 0.3 * random.standard_normal(tensors[key].shape).astype(np.float32)
        weights.write(tmp_path / "model.safetensors", tensors | {key: tensors[key] + noise})
        assert largest_error(logits(omni.load(tmp_path), ids), expected) > 10 * TOLERANCE, key


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_equal_theirs_with_and_without_cache(name, theirs):
    """64 likeliest tokens, one after the other: with our cache, without it, and theirs are the same."""
    model, directory = theirs(name)
    ours, prompt = omni.load(directory), ids_of(model, 2, 9)
    published = model.config.get_text_config().vocab_size
    cached = greedy_with_cache(ours, prompt, 64, published)
    whole = np.concatenate([prompt, cached], axis=1)
    np.testing.assert_array_equal(logits(ours, whole)[:, 8:-1, :published].argmax(-1), cached)
    np.testing.assert_array_equal(greedy(model, prompt, 64), cached)
    assert len(np.unique(cached)) > 4


@pytest.mark.parametrize("name", CASES)
def test_export_is_what_transformers_loads(name, theirs, tmp_path, capsys):
    """Read, written, and read by transformers: every key known, none missing, the same logits; and so again here."""
    model, directory = theirs(name)
    ours, ids = omni.load(directory), ids_of(model, 3, 24)
    ours.export(tmp_path / "theirs")
    again, unknown = loaded(tmp_path / "theirs", CASES[name].kind if CASES[name].itself else None)
    assert unknown == [] and again.config.model_type == model.config.model_type
    found = (
        largest_error(logits(ours, ids), their_logits(again, ids)),
        largest_error(their_logits(again, ids), their_logits(model, ids)),
    )
    with capsys.disabled():
        print(f"\n{name}: exported {max(found):.1e}", end="")
    assert max(found) < TOLERANCE
    back = omni.load(tmp_path / "theirs")
    assert back.vocabulary.hash == ours.vocabulary.hash and back.grammar.hash == ours.grammar.hash
    np.testing.assert_array_equal(back.logits(ids), ours.logits(ids))


def test_a_model_made_here_is_transformers_own(tiny_model, tmp_path):
    """What this package trains, written for transformers, gives the same logits there at all ids."""
    tiny_model.export(tmp_path)
    theirs, unknown = loaded(tmp_path)
    ids = np.random.default_rng(0).integers(0, tiny_model.vocabulary.size, (2, 20))
    assert unknown == [] and largest_error(logits(tiny_model, ids), their_logits(theirs, ids)) < TOLERANCE


def test_text_ids_equal_theirs(theirs, tmp_path):
    """Many scripts, code and emoji: ids of transformers' tokenizer, from a checkpoint and from its export."""
    (tmp_path / "tokenizer.json").write_text(trained())
    mine = JsonTextTokenizer.from_file(tmp_path / "tokenizer.json")
    mine.write_original(tmp_path)
    (tmp_path / "config.json").write_text((theirs("llama")[1] / "config.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in SAMPLE:
        expected = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert mine.ids[mine.encode(text)].tolist() == expected


def test_ids_of_a_sentencepiece_model_equal_theirs(theirs, tmp_path):
    """The same of a tokenizer.model alone; but where a text begins with a space, transformers 5 takes that away."""
    (tmp_path / "tokenizer.model").write_bytes(text_pieces.trained())
    mine = PieceTextTokenizer.from_file(tmp_path / "tokenizer.model")
    mine.write_original(tmp_path)
    (tmp_path / "config.json").write_text((theirs("llama")[1] / "config.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in SAMPLE:
        expected = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        if text.startswith(" "):
            assert mine.ids[mine.encode(text[1:])].tolist() == expected and tokenizer.decode(expected) == text[1:]
        else:
            assert mine.ids[mine.encode(text)].tolist() == expected


@pytest.mark.parametrize("ranks", [1, 2])
def test_chameleons_release_is_read_by_torch(tmp_path, ranks, run):
    """Files of PyTorch, one or one a rank, in bfloat16 and beside params.json, are the model that the slow pass is."""
    parameters = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "swin_norm": ranks > 1}
    numbers = random_ranks(parameters, ranks, 448, 48)
    tensors = [{name: torch.tensor(value).bfloat16() for name, value in rank.items()} for rank in numbers]
    for number, rank in enumerate(tensors):
        name = "consolidated.pth" if ranks == 1 else f"consolidated.{number:02}.pth"
        torch.save(rank | {"rope.freqs": torch.zeros(4)}, tmp_path / name)
    (tmp_path / "params.json").write_text(json.dumps({"model": parameters}))
    write_chameleon_names(tmp_path)
    code, _, err = run("import", tmp_path, tmp_path / "ours", "--torch-reader")
    assert code == 0, err
    model, ids = omni.load(tmp_path / "ours"), np.random.default_rng(0).integers(0, 448, (1, 12))
    rounded = [{name: value.float().numpy() for name, value in rank.items()} for rank in tensors]
    found = logits(model, ids)[0, :, :448]
    assert largest_error(found, forward(parameters, rounded, ids[0])) < TOLERANCE
    assert model.decode(model.encode([omni.Text("IMGIMGAZ", context=True)]))[0].text == "IMGIMGAZ"


def test_import_verifies_what_a_user_has(tmp_path, run, monkeypatch):
    """`omni import --verify` passes on what transformers wrote, and where a logit is not theirs it writes nothing."""
    source = tmp_path / "source"
    source.mkdir()
    dataclasses.replace(CASES["llama"], settings=CASES["llama"].settings | {"vocab_size": 400}).write(source)
    (source / "tokenizer.json").write_text(trained())
    code, out, err = run("import", source, tmp_path / "ours", "--verify", "--dtype", "bfloat16")
    assert code == 0, err
    assert [line.split()[:2] for line in out.splitlines()[:4]] == [
        ["pass", "logits"],
        ["pass", "text"],
        ["none", "pixels"],
        ["none", "codes"],
    ]
    assert omni.load(tmp_path / "ours").config.compute_dtype == "bfloat16"
    whole = Model.logits
    monkeypatch.setattr(Model, "logits", lambda self, ids: whole(self, ids) * 1.001)
    code, out, err = run("import", source, tmp_path / "other", "--verify")
    assert code == 1 and out.startswith("FAIL  logits") and "nothing was written" in err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["chameleon", "emu3"])
def test_import_verifies_pictures(name, theirs, tmp_path, monkeypatch):
    """Pixels and codes of a picture are theirs, and where scaling or the codebook is another the check says so."""
    source = shutil.copytree(theirs(name)[1], tmp_path / "source")
    if name == "chameleon":  # the context of this Emu3 holds no picture of any size, so that it scales none
        square = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
        ChameleonImageProcessorPil(**square).save_pretrained(source)
    ours, scales = omni.load(source), True if name == "chameleon" else None

    def found() -> dict:
        return {check.name: check.passed for check in verify(ours, source)}

    assert found() == {"logits": True, "text": None, "pixels of a picture": scales, "codes of a picture": True}
    values = ImageProcessor.values
    monkeypatch.setattr(ImageProcessor, "values", lambda self, pixels: values(self, pixels) + np.float32(1e-4))
    assert found()["pixels of a picture"] is (scales and False)
    tensors = weights.read(source / "model.safetensors")
    (codebook,) = (key for key in tensors if key.endswith("quantize.embedding.weight"))
    weights.write(source / "model.safetensors", tensors | {codebook: tensors[codebook][::-1].copy()})
    assert found()["codes of a picture"] is False


def test_import_verifies_text_without_running_code(tmp_path, monkeypatch):
    """Other ids of a text are seen; code that lies in the directory is not run, whatever its files say."""
    source = tmp_path / "source"
    source.mkdir()
    dataclasses.replace(CASES["llama"], settings=CASES["llama"].settings | {"vocab_size": 400}).write(source)
    (source / "tokenizer.json").write_text(trained())
    ours = omni.load(source)
    content = json.loads(trained())
    content["normalizer"] = {"type": "Lowercase"}
    (source / "tokenizer.json").write_text(json.dumps(content))
    assert {check.name: check.passed for check in verify(ours, source)}["text"] is False
    (source / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what transformers asks before it runs such code
    list(verify(ours, source))
    assert not (tmp_path / "ran").exists()
