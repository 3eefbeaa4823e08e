"""A grammar made for tokenizers: the one that the model in the box was trained with, for that model's tokenizers."""

import pytest

import omni_tokenizers
from omni.bundle import MODELS
from omni.data.layouts import code_vectors, make_grammar
from omni.data.shards import read_grammar
from omni.recipes import digits_data
from omni_tokenizers.errors import UsageError


@pytest.fixture(scope="module")
def tokenizers():
    return {name: omni_tokenizers.load(MODELS / "digits" / "tokenizers" / name) for name in ("text", "image", "audio")}


def test_it_is_that_of_the_model_in_the_box(tokenizers):
    """The same ids and the same declaration, so that shards written today fit models of before."""
    made, boxed = make_grammar(tokenizers, digits_data.LONGEST), read_grammar(MODELS / "digits")
    assert made.vocabulary.hash == boxed.vocabulary.hash and made.hash == boxed.hash
    vectors = code_vectors(made, tokenizers)
    assert list(vectors) == ["image", "audio0", "audio1"]
    assert all(len(made.vocabulary.block(name)) == len(vectors[name]) for name in vectors)


def test_fewer_modalities(tokenizers):
    """Text and sound alone make a grammar of both; nothing is made without text."""
    made = make_grammar({name: tokenizers[name] for name in ("text", "audio")}, 16000)
    assert made.modalities == ("text", "audio") and "<image>" not in made.vocabulary.special
    assert max(columns for _, columns in made.layouts["audio"].shapes) == 25
    with pytest.raises(UsageError, match="these are of image"):
        make_grammar({"image": tokenizers["image"]}, 0)
