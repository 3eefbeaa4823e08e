"""Text by a tokenizer.json: the package's own ids, nothing but text out of a string, exact round trips."""

import json
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_json import SAMPLE, SPECIAL, THINK, trained

import omni_tokenizers
import tokenizers
from omni_tokenizers.errors import OmniError
from omni_tokenizers.text_json import JsonTextTokenizer, Names


@pytest.fixture(scope="module")
def tokenizer() -> JsonTextTokenizer:
    return JsonTextTokenizer(trained().encode())


def test_ids_are_those_of_the_package(tokenizer):
    """Many scripts, code and emoji become the ids that the package gives, without special tokens around them."""
    theirs = tokenizers.Tokenizer.from_str(trained())
    theirs.encode_special_tokens = True
    for text in SAMPLE:
        codes = tokenizer.encode(text)
        assert codes.dtype == np.int32
        assert tokenizer.ids[codes].tolist() == theirs.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(codes) == text


def test_special_tokens_are_never_typed(tokenizer):
    """The name of a special token in a text is text; an added token that is none is itself."""
    special = {tokenizers.Tokenizer.from_str(trained()).token_to_id(name) for name in SPECIAL}
    assert not special & set(tokenizer.ids.tolist()) and tokenizer.vocabulary_size == 397
    for name in SPECIAL:
        codes = tokenizer.encode(f"a{name}b")
        assert len(codes) > 3 and tokenizer.decode(codes) == f"a{name}b"
    assert len(tokenizer.encode(THINK)) == 1


def test_ids_that_are_no_text_to_a_model_cannot_be_typed():
    """Of a token that the file counts as text and the vocabulary does not, the name is spelled out; a piece that cannot
    be spelled otherwise is refused."""
    whole = JsonTextTokenizer(trained().encode())
    think = whole.ids[whole.encode(THINK)[0]]
    less = JsonTextTokenizer(trained().encode(), np.setdiff1d(whole.ids, [think]))
    assert less.decode(less.encode(THINK)) == THINK and len(less.encode(THINK)) > 1
    letter = whole.ids[whole.encode("Q")[0]]
    with pytest.raises(OmniError, match="the piece 'Q', which is no text to the model"):
        JsonTextTokenizer(trained().encode(), np.setdiff1d(whole.ids, [letter])).encode("a Q")


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    """This package's directory and the public file give the same codes; other ids are another tokenizer."""
    tokenizer.save(tmp_path)
    again = omni_tokenizers.load(tmp_path)
    assert again.hash == tokenizer.hash
    for text in SAMPLE:
        np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))
    tokenizer.write_original(tmp_path / "..")
    assert (tmp_path / ".." / "tokenizer.json").read_text() == trained()
    assert JsonTextTokenizer(trained().encode(), tokenizer.ids[1:]).hash != tokenizer.hash


def test_any_codes_decode(tokenizer):
    """Half characters read as U+FFFD, codes that are none as nothing."""
    codes = tokenizer.encode("🙂")
    assert "\ufffd" in tokenizer.decode(codes[:1])
    assert tokenizer.decode([-1, 10**6]) == ""


def test_without_the_package_the_extra_is_named(monkeypatch):
    """The file is opened without the package; text needs it."""
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    tokenizer = JsonTextTokenizer(trained().encode())
    with pytest.raises(OmniError, match=r"pip install 'omni-any-to-any\[checkpoints\]'"):
        tokenizer.encode("a")


@settings(max_examples=200)
@given(names=st.lists(st.text("ab<", max_size=4)), text=st.text("ab<", min_size=1, max_size=12))
def test_the_longest_name_is_found(names, text):
    """At each place, that of all names which begin there; an empty one is none."""
    found = Names(names)
    for place in range(len(text)):
        begun = [name for name in names if name and text.startswith(name, place)]
        assert found.at(text, place) == max(begun, key=len, default=None)


@pytest.mark.parametrize("ends", ["", ">"])
def test_strange_names_take_no_long_time(ends):
    """Thousands of names of as many lengths, in texts that could begin with any of them."""
    names = Names(["<" * length + ends for length in range(1, 3000)])
    begun = time.process_time()
    for text in ("<" * 5000, "<" * 1000 + "z"):
        names.broken([text])
    assert time.process_time() - begun < 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "expected a JSON object"),
        ("{", "not valid JSON"),
        ("{}", "not a tokenizer.json"),
        ('{"model": {"vocab": {"a": "b"}}}', "not a tokenizer.json"),
        ('{"model": {"vocab": {"a": 5000000000}}}', "not a tokenizer.json"),
        ('{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 0}]}', "not a tokenizer.json"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, content, message):
    """One line that names the file."""
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(OmniError, match=message) as caught:
        JsonTextTokenizer.from_file(tmp_path / "tokenizer.json")
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_the_package_cannot_read_is_one_line():
    """A file of the right form with a model that there is not."""
    content = json.loads(trained())
    content["model"]["type"] = "Nothing"
    with pytest.raises(OmniError, match="cannot be read by the package tokenizers") as caught:
        JsonTextTokenizer(json.dumps(content).encode()).encode("a")
    assert "\n" not in str(caught.value)


def test_strings_alone_are_text(tokenizer):
    """Bytes and lone surrogates are refused."""
    for wrong in (b"a", "\ud800"):
        with pytest.raises(OmniError, match=r"must be a string|not valid Unicode"):
            tokenizer.encode(wrong)
