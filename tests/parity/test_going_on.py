"""Imported models learn as transformers' do: twenty steps on eight devices, beside torch on the same rows."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from going_on_worker import LENGTH, RATE, ROWS, STEPS, config_of

import omni
from omni.data.loader import stack
from omni.data.shards import write_shards
from omni.grammar import Grammar, Span
from omni.interop import emu3
from omni.sharding import MeshConfig
from omni.train.metrics import read_metrics

torch = pytest.importorskip("torch", reason="needs torch: pip install 'omni-any-to-any[parity]'")
pytest.importorskip("transformers", reason="needs transformers: pip install 'omni-any-to-any[parity]'")

from their_models import CASES, loaded  # noqa: E402

pytestmark = pytest.mark.parity
WORKER = Path(__file__).with_name("going_on_worker.py")


def grammar_of(name: str, model: omni.Model) -> Grammar:
    """The model's own; of the tiny Emu3, whose context holds none of the published sizes, one with small pictures."""
    if name != "emu3":
        return model.grammar
    text = model.vocabulary.block("text").tolist()
    shapes = [{"rows": rows, "columns": 2, "prefix": [text[rows], text[0], text[2]]} for rows in (2, 3)]
    return Grammar(emu3.grammar(shapes), model.vocabulary)


def documents(grammar: Grammar) -> list:
    """Texts, and pictures where there are any, in any order, some of them given."""
    draw, found = np.random.default_rng(0), []
    for _ in range(300):
        spans = []
        for place in range(draw.integers(1, 4)):
            modality = grammar.modalities[draw.integers(len(grammar.modalities))]
            context = place == 0 and bool(draw.integers(2))
            if modality == "text":
                codes = draw.integers(len(grammar.vocabulary.block("text")), size=draw.integers(2, 20))
            else:
                shapes = list(grammar.layouts[modality].shapes)
                size = len(grammar.layouts[modality].tables[0])
                codes = draw.integers(size, size=(1, *shapes[draw.integers(len(shapes))]))
            spans.append(Span(modality, codes.astype(np.int32), context))
        found.append(grammar.pack(spans))
    return found


def their_losses(model, batches: list[dict[str, np.ndarray]]) -> list[float]:
    """Mean nats of target tokens in each step of AdamW, by transformers' forward pass under a mask of documents."""
    parameters = [value for name, value in model.named_parameters() if "vqmodel" not in name]
    for value in parameters:
        value.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    losses = []
    for batch in batches:
        ids, segments = (torch.tensor(batch[name]).long() for name in ("ids", "segments"))
        causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        seen = (segments[:, :, None] == segments[:, None, :]) & causal
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]
        positions = torch.tensor(batch["positions"][..., 0]).long()
        hidden = model.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        logits = model.lm_head(hidden.last_hidden_state)[:, :-1]
        nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        target = torch.tensor(batch["target"])[:, 1:].float() * (segments[:, 1:] == segments[:, :-1])
        loss = (nats * target).sum() / target.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", ["llama", "chameleon", "emu3"])
def test_twenty_steps_are_those_of_torch(name, tmp_path):
    """Losses within 1e-4; what is exported then is what transformers learned, within a hundredth of how far it went."""
    CASES[name].write(tmp_path / "published")
    model = omni.load(tmp_path / "published")
    model.save(tmp_path / "model")
    model.export(tmp_path / "start")
    grammar = grammar_of(name, model)
    write_shards(tmp_path / "tokens", documents(grammar), grammar.vocabulary, grammar, {})
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(WORKER), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]

    config = config_of(str(tmp_path), MeshConfig())
    rows = config.task.dataset(config.seed)
    batches = [stack([rows[step * ROWS + row] for row in range(ROWS)]) for step in range(STEPS)]
    theirs, _ = loaded(tmp_path / "start")
    before = theirs.lm_head.weight.detach().clone()
    expected = their_losses(theirs, batches)
    found = [entry["loss"] for entry in read_metrics(config.output) if "loss" in entry]
    assert len(found) == STEPS and expected[0] - expected[-1] > 0.05
    np.testing.assert_allclose(found, expected, atol=1e-4)

    head = torch.tensor(np.asarray(omni.load(config.output).transformer.output_weights()))
    moved = (theirs.lm_head.weight - before).abs().max()
    assert (head - theirs.lm_head.weight).abs().max() < 0.01 * moved
