"""Token shards: what is written is read, and what does not belong together is refused."""

import json

import numpy as np
import pytest
from documents import make_documents, make_grammar
from etils import epath

from omni.data import shards as shards_module
from omni.data.shards import ShardWriter, TokenShards, write_manifest, write_shards
from omni_tokenizers.errors import OmniError


@pytest.fixture
def written(tmp_path):
    grammar = make_grammar()
    documents = make_documents(grammar, 30)
    write_shards(tmp_path / "shards", documents, grammar.vocabulary, grammar, {"source": "test"})
    return tmp_path / "shards", documents, grammar


def test_documents_come_back(written):
    """Ids, targets and lengths are read as they were written, and the manifest counts them."""
    directory, documents, grammar = written
    shards = TokenShards(directory, grammar.vocabulary, grammar)
    assert len(shards) == 30
    for i, document in enumerate(documents):
        np.testing.assert_array_equal(shards[i]["ids"], document.ids)
        np.testing.assert_array_equal(shards[i]["target"], document.target)
        assert shards.lengths[i] == len(document.ids)
    assert shards.manifest["tokens"] == sum(len(document.ids) for document in documents)
    assert shards.manifest["provenance"] == {"source": "test"}


def test_many_files(tmp_path, monkeypatch):
    """Documents keep their numbers across files."""
    monkeypatch.setattr(shards_module, "DOCUMENTS_PER_SHARD", 7)
    grammar = make_grammar()
    documents = make_documents(grammar, 15)
    shards = TokenShards(write_shards(tmp_path / "s", documents, grammar.vocabulary, grammar, {}))
    assert len(shards.manifest["shards"]) == 3
    for i in (0, 6, 7, 14):
        np.testing.assert_array_equal(shards[i]["ids"], documents[i].ids)


def test_interrupted_writing_leaves_nothing(tmp_path):
    """A directory appears only when it is whole, and what an interrupted attempt left is no obstacle."""
    grammar = make_grammar()
    documents = make_documents(grammar, 3)

    def broken():
        yield documents[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path / "s", broken(), grammar.vocabulary, grammar, {})
    assert not (tmp_path / "s").exists()
    write_shards(tmp_path / "s", documents, grammar.vocabulary, grammar, {})
    assert len(TokenShards(tmp_path / "s")) == 3
    with pytest.raises(OmniError, match="exists already"):
        write_shards(tmp_path / "s", documents, grammar.vocabulary, grammar, {})


def test_documents_say_where_they_come_from(tmp_path):
    """In their own records, which hold the same arrays as those that do not say it, from before it was recorded."""
    grammar = make_grammar()
    documents = make_documents(grammar, 4)
    origins = ["a.jsonl:1", None, "größer.tar:b/c:d", "x" * 10_000]
    with ShardWriter(epath.Path(tmp_path), 0) as writer:
        for document, origin in zip(documents, origins, strict=True):
            writer.write(document, origin)
    write_manifest(epath.Path(tmp_path), [writer.shard], grammar.vocabulary, grammar, {})
    shards = TokenShards(tmp_path)
    assert [shards.origin(i) for i in range(4)] == origins
    for i, document in enumerate(documents):
        assert shards[i].keys() == {"ids", "target"}
        np.testing.assert_array_equal(shards[i]["ids"], document.ids)
        np.testing.assert_array_equal(shards[i]["target"], document.target)


def test_another_vocabulary_is_refused(written):
    """The difference is shown."""
    directory, _, _ = written
    other = make_grammar(text=21)
    with pytest.raises(OmniError, match=r"another vocabulary.*block 'text': 21 codes.*20 codes"):
        TokenShards(directory, other.vocabulary, other)


def test_another_grammar_is_refused(written):
    """Shards of the same vocabulary but another grammar are refused."""
    directory, _, grammar = written
    declaration = json.loads(json.dumps(grammar.declaration))
    declaration["modalities"]["image"]["shapes"] = [{"rows": 3, "columns": 2}]
    with pytest.raises(OmniError, match="another grammar"):
        TokenShards(directory, grammar.vocabulary, type(grammar)(declaration, grammar.vocabulary))


@pytest.mark.parametrize("damage", ["manifest", "truncate", "vocabulary", "lengths"])
def test_damage_is_one_line(written, damage):
    """Missing, truncated and exchanged files are found on opening."""
    directory, _, _ = written
    if damage == "manifest":
        (directory / "manifest.json").unlink()
    elif damage == "truncate":
        file = next(directory.glob("*.array_record"))
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "vocabulary":
        (directory / "vocabulary.json").write_text(json.dumps(make_grammar(text=21).vocabulary.to_json()))
    else:
        (directory / "lengths.npy").unlink()
    with pytest.raises(OmniError) as error:
        TokenShards(directory)
    assert "\n" not in str(error.value)


def test_codebooks_come_back_and_must_fit(tmp_path):
    """Vectors of codes are read as they were written; those of another codebook are refused."""
    grammar = make_grammar()
    block = next(iter(grammar.vocabulary.blocks))
    vectors = np.random.default_rng(0).normal(size=(len(grammar.vocabulary.block(block)), 3)).astype(np.float32)
    for name, rows in (("whole", vectors), ("short", vectors[:-1])):
        write_shards(
            tmp_path / name, make_documents(grammar, 3), grammar.vocabulary, grammar, {}, codebooks={block: rows}
        )
    np.testing.assert_array_equal(TokenShards(tmp_path / "whole").codebooks[block], vectors)
    with pytest.raises(OmniError, match=r"codebooks.safetensors.*does not fit"):
        _ = TokenShards(tmp_path / "short").codebooks
    books, others = (tmp_path / name / "codebooks.safetensors" for name in ("whole", "short"))
    books.write_bytes(others.read_bytes())
    with pytest.raises(OmniError, match="do not belong together"):
        _ = TokenShards(tmp_path / "whole").codebooks
    books.write_bytes(b"short")
    with pytest.raises(OmniError, match="cannot be read"):
        _ = TokenShards(tmp_path / "whole").codebooks


def test_codebooks_come_in_one_order(tmp_path, monkeypatch):
    """Whatever order the file is read in (it differs between processes), for random numbers are drawn by codebook."""
    grammar = make_grammar()
    books = {name: np.zeros((len(grammar.vocabulary.block(name)), 2)) for name in grammar.vocabulary.blocks}
    write_shards(tmp_path / "shards", make_documents(grammar, 3), grammar.vocabulary, grammar, {}, codebooks=books)
    for reverse in (False, True):
        order = dict(sorted(books.items(), reverse=reverse))
        monkeypatch.setattr(shards_module.safetensors.numpy, "load", lambda data, order=order: order)
        assert list(TokenShards(tmp_path / "shards").codebooks) == sorted(books)
