"""A public text model with its tokenizer: prompts in, replies out, everything kept on the way through files."""

import dataclasses
import json

import numpy as np
import pytest
from public_models import golden
from text_json import SAMPLE, trained

import omni
from omni_tokenizers.tensor_files import open_directory

PIECES = 400


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A golden Llama with as many rows as a small tokenizer has pieces, and that tokenizer."""
    random, stored = np.random.default_rng(0), golden("llama tied")
    rows = {"model.embed_tokens.weight": random.normal(size=(PIECES, 16)).astype(np.float32)}
    config = stored.config | {"vocab_size": PIECES}
    path = tmp_path_factory.mktemp("llama")
    dataclasses.replace(stored, config=config, tensors=stored.tensors | rows).write(path)
    (path / "tokenizer.json").write_text(trained(PIECES))
    return path


@pytest.fixture(scope="module")
def model(directory):
    return omni.load(directory)


def test_text_becomes_published_ids(model):
    """bos, the tokenizer's own ids, the turn, more text, eos; and back."""
    tokenizer = model.tokenizers["text"]
    for text in filter(None, SAMPLE):
        ids = model.encode([omni.Text(text, context=True), text])
        own = tokenizer.ids[tokenizer.encode(text)].tolist()
        assert ids.tolist() == [1, *own, PIECES, *own, 2]
        assert [part.text for part in model.decode(ids)] == [text, text]


def test_replies_are_text(model):
    """Constrained replies of random weights are text alone, and streams tell the same."""
    reply = model.generate(["Hello"], seed=0, max_tokens=20, temperature=1.0)
    assert reply.well_formed and set(reply.ids.tolist()) <= {2, *model.tokenizers["text"].ids.tolist()}
    events = list(model.stream(["Hello"], seed=0, max_tokens=20, temperature=1.0))
    assert "".join(event.text for event in events if event.kind == "text") == reply.text


@pytest.mark.parametrize("way", ["save", "export"])
def test_the_tokenizer_goes_along(model, directory, tmp_path, way):
    """This package's directory and transformers' hold the tokenizer; ids and replies stay what they were."""
    getattr(model, way)(tmp_path)
    again = omni.load(tmp_path)
    np.testing.assert_array_equal(again.encode(list(SAMPLE)), model.encode(list(SAMPLE)))
    settings = {"seed": 3, "max_tokens": 12, "temperature": 1.0}
    np.testing.assert_array_equal(again.generate(["a"], **settings).ids, model.generate(["a"], **settings).ids)
    if way == "export":
        assert (tmp_path / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()
        assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 512
        assert open_directory(tmp_path).shape("model.embed_tokens.weight") == (512, 16)
