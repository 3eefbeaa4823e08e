"""A public text model with its tokenizer: prompts in, replies out, everything kept on the way through files."""

import dataclasses
import json

import numpy as np
import pytest
import text_pieces
from public_models import golden
from text_json import SAMPLE, trained

import omni
import tokenizers
from omni.grammar import Grammar
from omni.processor import Processor
from omni.streaming import EventStream
from omni.vocabulary import Vocabulary
from omni_tokenizers.tensor_files import open_directory
from omni_tokenizers.text_json import JsonTextTokenizer

PIECES = 400


@pytest.fixture(scope="module", params=["tokenizer.json", "tokenizer.model"])
def directory(tmp_path_factory, request):
    """A golden Llama with as many rows as a small tokenizer has pieces, and that tokenizer, by either file."""
    random, stored = np.random.default_rng(0), golden("llama tied")
    rows = {"model.embed_tokens.weight": random.normal(size=(PIECES, 16)).astype(np.float32)}
    config = stored.config | {"vocab_size": PIECES}
    path = tmp_path_factory.mktemp("llama")
    dataclasses.replace(stored, config=config, tensors=stored.tensors | rows).write(path)
    if request.param == "tokenizer.json":
        (path / request.param).write_text(trained(PIECES))
    else:
        (path / request.param).write_bytes(text_pieces.trained(PIECES))
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


def test_one_token_may_begin_and_end_documents(directory, tmp_path):
    """Where bos and eos are one id, replies still end with it, and documents are read as they were written."""
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    values = json.loads((tmp_path / "config.json").read_text()) | {"bos_token_id": 2}
    (tmp_path / "config.json").write_text(json.dumps(values))
    model = omni.load(tmp_path)
    ids = model.encode([omni.Text("a", context=True), "b"])
    assert ids[[0, -1]].tolist() == [2, 2] and [part.text for part in model.decode(ids)] == ["a", "b"]
    reply = model.generate(["Hello"], want=["text"], seed=0, max_tokens=8, temperature=1.0)
    assert (
        reply.well_formed and reply.ids[-1] == 2 and set(reply.ids[:-1].tolist()) <= set(model.tokenizers["text"].ids)
    )


@pytest.mark.parametrize("way", ["save", "export"])
def test_the_tokenizer_goes_along(model, directory, tmp_path, way):
    """This package's directory and transformers' hold the tokenizer; ids and replies stay what they were."""
    getattr(model, way)(tmp_path)
    again = omni.load(tmp_path)
    np.testing.assert_array_equal(again.encode(list(SAMPLE)), model.encode(list(SAMPLE)))
    settings = {"seed": 3, "max_tokens": 12, "temperature": 1.0}
    np.testing.assert_array_equal(again.generate(["a"], **settings).ids, model.generate(["a"], **settings).ids)
    if way == "export":
        (file,) = (name for name in ("tokenizer.json", "tokenizer.model") if (directory / name).exists())
        assert (tmp_path / file).read_bytes() == (directory / file).read_bytes()
        assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 512
        assert open_directory(tmp_path).shape("model.embed_tokens.weight") == (512, 16)


@pytest.mark.parametrize("directory", ["tokenizer.model"], indirect=True)
@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json"])
def test_pieces_to_which_other_files_add_tokens_are_refused(directory, tmp_path, file):
    """Ids of text would be others than transformers', silently; names that the pieces have change nothing."""
    for each in directory.iterdir():
        (tmp_path / each.name).write_bytes(each.read_bytes())

    def add(tokens):
        decoder = {"added_tokens_decoder": {id: {"content": name} for name, id in tokens.items()}}
        (tmp_path / file).write_text(json.dumps(tokens if file == "added_tokens.json" else decoder))

    own = {"<s>": 1, text_pieces.THINK: 3}
    add(own)
    assert omni.load(tmp_path).vocabulary.hash == omni.load(directory).vocabulary.hash
    for more in ({"<tool>": PIECES}, {"<tool>": 5}):
        add(own | more)
        with pytest.raises(omni.OmniError, match=r"tokenizer\.model: lacks the added token '<tool>'.*tokenizer\.json"):
            omni.load(tmp_path)
    add({"<tool>": 1 << 24})
    with pytest.raises(omni.OmniError, match=f"{file}: the added token '<tool>' has {1 << 24}, which is no id"):
        omni.load(tmp_path)


@pytest.mark.parametrize("hop", [1, 2, 3, 4, 5])
def test_streamed_bytes_are_the_whole_text(hop):
    """A tokenizer of bytes takes back several characters while one is not whole: nothing is shown twice, or lost."""
    bytes_ = {f"<0x{byte:02X}>": byte for byte in range(256)}
    original = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=bytes_, merges=[], byte_fallback=True))
    original.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    text = JsonTextTokenizer(original.to_str().encode())
    vocabulary = Vocabulary.build({"text": 256}, ("<bos>", "<turn>", "<eos>", "<pad>"))
    control = {role: f"<{role}>" for role in ("bos", "turn", "eos", "pad")}
    declaration = {"format": 1, "control": control, "modalities": {"text": {"block": "text"}}}
    processor = Processor(vocabulary, Grammar(declaration, vocabulary), {"text": text})
    for said in ("你好,世界。 こんにちは 🙂👩‍👩‍👧‍👦 naïve", "plain, plain text"):
        ids = np.append(vocabulary.to_ids("text", text.encode(said)), vocabulary.token("<eos>"))
        pieces = [ids[start : start + hop] for start in range(0, len(ids), hop)]
        stream = EventStream(processor)
        shown = [event.text for piece in pieces for event in stream.push(piece) if event.kind == "text"]
        assert "".join(shown) == said
        assert len(shown) > 1
