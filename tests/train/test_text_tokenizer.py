"""Training a text tokenizer on the texts of documents."""

import json

import pytest

import omni_tokenizers
from omni.data.json_lines import JsonLines
from omni.train.text import TextTokenizerConfig
from omni_tokenizers.errors import OmniError, UsageError


def make(folder, *documents):
    folder.mkdir(exist_ok=True)
    (folder / "a.jsonl").write_text("\n".join(d if isinstance(d, str) else json.dumps({"parts": d}) for d in documents))
    return TextTokenizerConfig(str(folder / "text"), JsonLines(str(folder)), vocabulary_size=270)


def test_it_reads_texts_and_no_files(tmp_path, caplog):
    """Pieces of the texts, though a picture is missing; bad lines are counted; a second run trains nothing anew."""
    config = make(tmp_path / "a", [{"text": "bell bell bell"}, {"image": "absent.png"}], "{", [{"text": "bell"}])
    config.run()
    tokenizer = omni_tokenizers.load(config.output)
    assert len(tokenizer.encode("bell bell")) < 5 and tokenizer.decode(tokenizer.encode("Zoë")) == "Zoë"
    assert "1 of 3 documents are bad" in caplog.text
    before = (tmp_path / "a" / "text" / "text.model").stat().st_mtime_ns
    config.run()
    assert (tmp_path / "a" / "text" / "text.model").stat().st_mtime_ns == before


def test_few_documents_are_spread_over_the_source(tmp_path):
    """Of many, those that are read are not only the first."""
    config = make(tmp_path / "a", *[[{"text": "abc" if i < 90 else "xyz " * 9}] for i in range(100)])
    TextTokenizerConfig(config.output, config.source, 270, most_documents=10).run()
    assert len(omni_tokenizers.load(config.output).encode("xyz")) == 1


def test_what_is_no_use_is_said(tmp_path):
    """Documents without any text; sizes that cannot be."""
    with pytest.raises(OmniError, match="none of the documents"):
        make(tmp_path / "a", [{"image": "a.png"}]).run()
    with pytest.raises(UsageError, match="at least 258"):
        TextTokenizerConfig("a", JsonLines("b"), vocabulary_size=10)
