"""Imported models learn as transformers' do, all of them or adapters alone: on eight devices, beside torch on the same
rows."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from going_on_worker import LENGTH, ROWS, STEPS, config_of, on_adapters

import omni
from omni.data.loader import stack
from omni.data.shards import write_shards
from omni.grammar import Grammar, Span
from omni.interop import emu3
from omni.interop.family import LAYER
from omni.model.transformer import INPUTS, Transformer
from omni.sharding import MeshConfig
from omni.train.loop import TrainConfig
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


def their_losses(model, parameters: list, rate: float, batches: list[dict[str, np.ndarray]]) -> list[float]:
    """Mean nats of target tokens in each step of AdamW on some parameters, by transformers' forward pass under a mask
    of documents."""
    model.requires_grad_(False)
    for value in parameters:
        value.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
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


class Adapted(torch.nn.Module):
    """A linear map and its adapter as peft computes it: base(x) + alpha / rank * B(A(x)), A [rank, inputs], B [outputs,
    rank], which begins with zeros."""

    def __init__(self, base: torch.nn.Linear, a: torch.Tensor, scale: float):
        super().__init__()
        self.base, self.scale = base, scale
        self.a = torch.nn.Parameter(a)
        self.b = torch.nn.Parameter(torch.zeros(base.out_features, a.shape[0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scale * (x @ self.a.T) @ self.b.T

    def merged(self) -> torch.Tensor:
        return self.base.weight + self.scale * self.b @ self.a


def adapt(model, net: Transformer, scale: float) -> dict[str, Adapted]:
    """Puts adapters into each layer of transformers' model, which begin as ours; by the names of their weights."""
    found = {}
    for name, inputs in INPUTS.items():
        path = LAYER[name].removesuffix(".weight")
        sides = np.asarray(getattr(net.blocks, f"{name}_lora_a")[...])
        for number, layer in enumerate(model.model.layers):
            a = sides[number].reshape(int(np.prod(sides.shape[1 : 1 + inputs])), -1).T
            adapted = Adapted(layer.get_submodule(path), torch.tensor(a.copy()), scale)
            layer.set_submodule(path, adapted)
            found[f"model.layers.{number}.{path}.weight"] = adapted
    return found


def start(name: str, directory: Path, *words: str) -> tuple[TrainConfig, list[dict[str, np.ndarray]], list[float]]:
    """A case's run on eight devices: (configuration, the rows of each step, losses). What it starts from is in
    DIRECTORY/start, too, as transformers has it."""
    CASES[name].write(directory / "published")
    model = omni.load(directory / "published")
    model.save(directory / "model")
    model.export(directory / "start")
    grammar = grammar_of(name, model)
    write_shards(directory / "tokens", documents(grammar), grammar.vocabulary, grammar, {})
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(WORKER), str(directory), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    config = config_of(str(directory), MeshConfig())
    config = on_adapters(config) if words else config
    rows = config.task.dataset(config.seed)
    batches = [stack([rows[step * ROWS + row] for row in range(ROWS)]) for step in range(config.steps)]
    return config, batches, [entry["loss"] for entry in read_metrics(config.output) if "loss" in entry]


@pytest.mark.parametrize("name", ["llama", "chameleon", "emu3"])
def test_twenty_steps_are_those_of_torch(name, tmp_path):
    """Losses within 1e-4; what is exported then is what transformers learned, within a hundredth of how far it went."""
    config, batches, found = start(name, tmp_path)
    theirs, _ = loaded(tmp_path / "start")
    before = theirs.lm_head.weight.detach().clone()
    parameters = [value for name, value in theirs.named_parameters() if "vqmodel" not in name]
    expected = their_losses(theirs, parameters, config.optimizer.learning_rate, batches)
    assert len(found) == STEPS and expected[0] - expected[-1] > 0.05
    np.testing.assert_allclose(found, expected, atol=1e-4)

    head = torch.tensor(np.asarray(omni.load(config.output).transformer.output_weights()))
    moved = (theirs.lm_head.weight - before).abs().max()
    assert (head - theirs.lm_head.weight).abs().max() < 0.01 * moved


def test_ten_steps_of_adapters_are_those_of_torch(tmp_path):
    """Losses within 1e-4 of peft's mathematics; what is exported has every matrix with its adapter in it, within a
    hundredth of how far that moved it, the embedding that was trained too, and all else as it was."""
    config, batches, found = start("llama", tmp_path, "adapters")
    theirs, _ = loaded(tmp_path / "start")
    before = {name: value.detach().clone() for name, value in theirs.named_parameters()}
    lora = config.task.lora
    adapters = adapt(theirs, config.task.build(nnx.Rngs(config.seed)), lora.alpha / lora.rank)
    embedding = theirs.get_input_embeddings().weight
    parameters = [embedding, *(side for each in adapters.values() for side in (each.a, each.b))]
    expected = their_losses(theirs, parameters, config.optimizer.learning_rate, batches)
    assert len(found) == 10 and expected[0] - expected[-1] > 0.05
    np.testing.assert_allclose(found, expected, atol=1e-4)

    omni.load(config.output).export(tmp_path / "theirs")
    exported, wrong = loaded(tmp_path / "theirs")
    learned = {"model.embed_tokens.weight": embedding} | {name: each.merged() for name, each in adapters.items()}
    assert wrong == [] and len(learned) == 1 + len(INPUTS) * len(theirs.model.layers)
    for name, value in exported.named_parameters():
        if name not in learned:
            assert torch.equal(value, before[name]), name
            continue
        moved = (learned[name] - before[name]).abs().max()
        assert moved > 1e-3 and (value - learned[name]).abs().max() < 0.01 * moved, name
