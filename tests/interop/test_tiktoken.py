"""Text tokenizers in the form of tiktoken: the ids are those of its own rule, and a model reads and writes them."""

import base64
import dataclasses
import itertools
import json

import numpy as np
import pytest
from public_models import golden
from text_json import SAMPLE, SPECIAL, THINK, trained

import omni
import tokenizers
from omni.interop import emu3_5
from omni.interop.tiktoken import read_ranks
from omni_tokenizers.text_json import JsonTextTokenizer

WHOLE = "zqxjzq"
"""A piece to which no two others join: a word that is it becomes it all the same."""


def pieces() -> list[bytes]:
    """Pieces of bytes in the order of their ranks: a small trained tokenizer's, and one more."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    letter = {character: ord(character) for character in alphabet if ord(character) < 256}
    hidden = sorted(set(range(256)) - set(letter.values()))
    letter |= dict(zip(sorted(set(alphabet) - set(letter)), hidden, strict=True))
    vocabulary = json.loads(trained(700))["model"]["vocab"]
    names = sorted((name for name in vocabulary if name not in (*SPECIAL, THINK)), key=vocabulary.get)
    return [*(bytes(letter[character] for character in name) for name in names), WHOLE.encode()]


def write(directory):
    """The file, beside nothing else."""
    lines = [f"{base64.b64encode(piece).decode()} {rank}" for rank, piece in enumerate(pieces())]
    (directory / emu3_5.TIKTOKEN).write_text("\n".join(lines) + "\n")


def slowly(ranks: dict[bytes, int], word: bytes) -> list[int]:
    """tiktoken's rule: again and again the first two neighbours that together have the lowest rank are joined."""
    if word in ranks:
        return [ranks[word]]
    parts = [bytes([byte]) for byte in word]
    while True:
        joined = [ranks.get(one + other, len(ranks)) for one, other in itertools.pairwise(parts)]
        if not joined or min(joined) == len(ranks):
            return [ranks[part] for part in parts]
        place = joined.index(min(joined))
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def test_ids_are_those_of_the_rule(tmp_path):
    """Many scripts, code and emoji; and every text comes back."""
    write(tmp_path)
    ranks, text = read_ranks(tmp_path / emu3_5.TIKTOKEN), emu3_5.text(tmp_path)
    words = tokenizers.pre_tokenizers.Split(tokenizers.Regex(emu3_5.PATTERN), "isolated")
    assert len(ranks) > 600
    for said in (*SAMPLE, "aaaaaaa ababab banana", f"{WHOLE} {WHOLE}\n{WHOLE}", "l'été, we'll  see\n\n  1234"):
        composed = tokenizers.normalizers.NFC().normalize_str(said)
        expected = [token for word, _ in words.pre_tokenize_str(composed) for token in slowly(ranks, word.encode())]
        assert text.ids[text.encode(said)].tolist() == expected
        assert text.decode(text.encode(said)) == composed


def test_a_model_reads_and_writes_text(tmp_path):
    """Beside the weights the file gives prompts and replies; sizes are spelled by it; an export has tokenizer.json."""
    write(tmp_path)
    first, stored, random = len(pieces()), golden("emu3.5"), np.random.default_rng(0)
    shift = first - 97
    size = 448 + shift
    rows = {
        name: random.normal(size=(size, 16)).astype(np.float32)
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    config = {key: value + shift if key.endswith("token_id") else value for key, value in stored.config.items()}
    config |= {"vocab_size": size, "max_position_embeddings": 2070}
    dataclasses.replace(stored, config=config, tensors=stored.tensors | rows).write(tmp_path)
    model = omni.load(tmp_path)
    reply = model.generate(["Hello <|extra_100|>"], want=["text"], seed=0, max_tokens=12)
    assert reply.well_formed and reply.text
    text = model.tokenizers["text"]
    assert text.decode(text.encode("<|extra_100|> <|extra_60|>")) == "<|extra_100|> <|extra_60|>"
    assert first + 3 + 60 in text.ids and len(text.encode("<|extra_60|>")) == 1 < len(text.encode("<|extra_100|>"))
    shape = model.grammar.layouts["image"].shapes[29, 69]
    assert shape.prefix == tuple(text.ids[text.encode("29*69")].tolist())
    model.export(tmp_path / "again")
    again = omni.load(tmp_path / "again")
    assert isinstance(again.tokenizers["text"], JsonTextTokenizer) and again.vocabulary.hash == model.vocabulary.hash
    np.testing.assert_array_equal(again.encode(list(SAMPLE)), model.encode(list(SAMPLE)))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("!!! 900", "line 1 is no piece in base 64"),
        ("YQ==", "line 1 is no piece in base 64"),
        ("YWFhYWFh x", "line 1 is no piece in base 64"),
        ("YWFhYWFh 5", "an id stands there twice"),
        ("YQ== 900", r"line \d+ is no piece"),
        (base64.b64encode(b"a" * 600).decode() + " 900", "line 1 is no piece"),
    ],
)
def test_what_is_no_such_file_is_one_line(tmp_path, line, message):
    """Each mistake names the file and its line."""
    write(tmp_path)
    path = tmp_path / emu3_5.TIKTOKEN
    path.write_text(line + "\n" + path.read_text())
    with pytest.raises(omni.OmniError, match=message) as caught:
        read_ranks(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
