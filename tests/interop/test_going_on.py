"""From a published model to shards in its ids, a training that begins where it stands, and back to such files."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from public_models import golden
from text_json import trained

import omni
from omni.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
PIECES = 400
DOCUMENTS = [
    [{"text": "What is quick?", "context": True}, {"text": "The brown fox."}],
    [{"text": "你好", "context": True}, {"text": "says hello to nobody at all"}],
    [{"text": "over and over"}],
]
TINY = ("--batch-size", "2", "--task.row-length", "64", "--optimizer.warmup-steps", "0")


def write_published(directory: Path) -> None:
    """A golden Llama with as many rows as a small tokenizer has pieces, and that tokenizer."""
    random, stored = np.random.default_rng(0), golden("llama tied")
    rows = {"model.embed_tokens.weight": random.normal(size=(PIECES, 16)).astype(np.float32)}
    config = stored.config | {"vocab_size": PIECES}
    dataclasses.replace(stored, config=config, tensors=stored.tensors | rows).write(directory)
    (directory / "tokenizer.json").write_text(trained(PIECES))


def test_an_imported_model_goes_on_and_is_exported(tmp_path, monkeypatch, run, caplog):
    """By the commands of docs/checkpoints.md: before it learns, its held-out loss is what the published model pays for
    these tokens; with the blocks frozen only the embedding changes, with adapters only their matrices do; what is
    exported is what was trained."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    write_published(Path("published"))
    for name in ("train", "held_out"):
        folder = Path("my", name)
        folder.mkdir(parents=True)
        (folder / "documents.jsonl").write_text("".join(json.dumps({"parts": parts}) + "\n" for parts in DOCUMENTS))

    def done(*words: str) -> str:
        code, out, err = run(*words)
        assert code == 0, err
        return out + err

    done("import", "published", "models/imported")
    done("tokenize", "experiments/imported/tokens.py")
    held_out = ("--source.path", "my/held_out", "--output", "runs/imported/held_out")
    done("tokenize", "experiments/imported/tokens.py", *held_out)
    train = ("train", "experiments/imported/model.py", *TINY)
    done(*train, "--steps", "1", "--optimizer.learning-rate", "1e-12", "--output", "runs/still")

    model = omni.load("models/imported")
    packed = [
        model.processor.tokens([omni.Text(part["text"], context=part.get("context", False)) for part in parts])
        for parts in DOCUMENTS
    ]
    nats = [losses[each.target] for losses, each in zip(model.token_losses(packed), packed, strict=True)]
    metrics = read_metrics("runs/still")[-1]
    assert metrics["held_out/loss/text"] == pytest.approx(np.concatenate(nats).mean(), rel=1e-5)

    frozen = ("--optimizer.frozen", "blocks.*", "norm")
    done(*train, "--steps", "3", "--optimizer.learning-rate", "1e-2", *frozen)
    done("export", "runs/imported/model", "theirs", "--format", "transformers")
    again, before = omni.load("theirs"), model.transformer
    assert again.config.vocabulary_size == before.config.vocabulary_size
    np.testing.assert_array_equal(again.transformer.blocks.query[...], before.blocks.query[...])
    assert np.abs(again.transformer.embedding[...] - before.embedding[...]).max() > 1e-3
    assert again.encode(["The brown fox"]).tolist() == model.encode(["The brown fox"]).tolist()

    adapters = ("--task.lora.rank", "2", "--task.lora.matrices", "query", "down", "--optimizer.learning-rate", "1e-2")
    done("train", "experiments/imported/adapters.py", *TINY, "--steps", "3", *adapters)
    done("export", "runs/imported/adapters", "adapted", "--format", "transformers")
    after = omni.load("adapted").transformer
    for name in ("query", "down"):
        assert np.abs(getattr(after.blocks, name)[...] - getattr(before.blocks, name)[...]).max() > 1e-3
    np.testing.assert_array_equal(after.blocks.key[...], before.blocks.key[...])
    np.testing.assert_array_equal(after.embedding[...], before.embedding[...])
