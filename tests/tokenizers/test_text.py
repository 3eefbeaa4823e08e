"""Text tokenizer: lossless, deterministic, and safe against any text and any ids."""

import json

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import omni_tokenizers
from omni_tokenizers.errors import OmniError, UsageError
from omni_tokenizers.text import TextTokenizer

CORPUS = ["draw a red seven on a blue ground", "say the number seven", "<s> </s> <unk> <0x41> a  b"] * 20
TOKENIZER = TextTokenizer.train(CORPUS, 384)


@given(st.text() | st.text(alphabet="a \n\t\r\x00<>/s_\u2581\u2047\u2585é漢😀"))
@example("  two leading spaces\n\n\ttab ")
@example("</s><s><unk><pad><0x41>")
@example("\u2581 \u2581\u2581a")
@example("e\u0301 \ufb01 \ufeff\u200b\ufffd")
def test_decoding_gives_the_text_back(text):
    """decode(encode(s)) == s for any string, and no control piece is among the ids."""
    ids = TOKENIZER.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert TOKENIZER.decode(ids) == text
    assert ((ids > 0) & (ids < TOKENIZER.vocabulary_size)).all()


@given(st.lists(st.integers(-(2**40), 2**40) | st.integers(-1, 400)))
def test_decoding_never_raises(ids):
    """Any integers decode to some valid string."""
    TOKENIZER.decode(np.array(ids, np.int64)).encode()


def test_invalid_ids_show():
    """The unknown id, ids out of range and broken bytes read as replacement characters."""
    assert TOKENIZER.decode([0, -1, 10**6]) == "\ufffd" * 3


def test_words_of_the_corpus_become_few_ids():
    """Training learns: a sentence of the corpus takes fewer ids than half its letters."""
    assert len(TOKENIZER.encode(CORPUS[0])) < len(CORPUS[0]) / 2


@pytest.mark.parametrize(
    ("texts", "size"),
    [
        ([], 384),
        ([""], 258),
        (["a"], 384),
        (["hello\nworld"], 260),
        (["x" * 9000], 300),
        ([chr(0x4E00 + i) for i in range(500)], 300),
        (["^]-\\[a"], 260),
        (["\u2581 a\x00b"], 300),
    ],
)
def test_any_corpus_trains(texts, size):
    """Empty, tiny, long and many-lettered corpora train within the limit and stay lossless."""
    tokenizer = TextTokenizer.train(texts, size)
    assert tokenizer.vocabulary_size <= size
    for text in [*texts, " spaces  ", "\n"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_is_deterministic_and_follows_the_corpus():
    """The same corpus gives the same hash, another corpus another; an iterator serves as well as a list."""
    assert TextTokenizer.train(iter(CORPUS), 384).hash == TOKENIZER.hash
    assert TextTokenizer.train(CORPUS[:1], 384).hash != TOKENIZER.hash


def test_saved_and_loaded(tmp_path):
    """A loaded tokenizer has the same hash, sizes and ids."""
    TOKENIZER.save(tmp_path)
    loaded = omni_tokenizers.load(tmp_path)
    assert (loaded.hash, loaded.codebook_sizes) == (TOKENIZER.hash, TOKENIZER.codebook_sizes)
    np.testing.assert_array_equal(loaded.encode(CORPUS[0]), TOKENIZER.encode(CORPUS[0]))


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x0a\x05", None])
def test_damaged_model_is_refused(tmp_path, content):
    """A missing or broken text.model is one clear error that names the file."""
    TOKENIZER.save(tmp_path)
    (tmp_path / "text.model").unlink()
    if content is not None:
        (tmp_path / "text.model").write_bytes(content)
    with pytest.raises(OmniError, match=r"text\.model"):
        omni_tokenizers.load(tmp_path)


def test_exchanged_model_is_refused(tmp_path):
    """Another tokenizer's model under this description fails by its hash."""
    TOKENIZER.save(tmp_path)
    description = (tmp_path / "tokenizer.json").read_text()
    TextTokenizer.train(["other words"], 300).save(tmp_path)
    (tmp_path / "tokenizer.json").write_text(description)
    assert json.loads(description)["hash"] == TOKENIZER.hash
    with pytest.raises(OmniError, match="hash"):
        omni_tokenizers.load(tmp_path)


def test_bad_input_is_an_error_for_people():
    """Bytes, lone surrogates and impossible sizes are refused by name."""
    with pytest.raises(OmniError, match="bytes"):
        TOKENIZER.encode(b"abc")
    with pytest.raises(OmniError, match="surrogate"):
        TOKENIZER.encode("a\ud800")
    with pytest.raises(UsageError, match="258"):
        TextTokenizer.train(CORPUS, 100)
