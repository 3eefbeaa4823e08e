"""Imported models learn as transformers' do, all of them or adapters alone: on eight devices, beside torch on the same
rows."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from going_on_worker import LENGTH, ROWS, STEPS, config_of, on_adapters
from host_devices import host_devices
from text_json import trained

import omni
from omni.data.json_lines import JsonLines
from omni.data.loader import stack
from omni.interop import emu3
from omni.interop.family import LAYER
from omni.model.transformer import INPUTS, Transformer
from omni.sharding import MeshConfig
from omni.tokenize import TokenizeConfig, tokenize
from omni.train.loop import TrainConfig
from omni.train.metrics import read_metrics
from omni.vocabulary import Vocabulary
from omni_tokenizers import ImageTokenizer
from omni_tokenizers.image import ImageTokenizerConfig, ImageVQ
from omni_tokenizers.text_json import JsonTextTokenizer

torch = pytest.importorskip("torch", reason="needs torch: pip install 'omni-any-to-any[parity]'")
pytest.importorskip("transformers", reason="needs transformers: pip install 'omni-any-to-any[parity]'")

from their_models import CASES, loaded  # noqa: E402

pytestmark = pytest.mark.parity
WORKER = Path(__file__).with_name("going_on_worker.py")
PIECES = 400
LLAMA_NEW = ("turn", "begin", "end")
WORDS = "the model reads what is written, and draws seven of them; nothing else was said about pictures"


def write_published(name: str, directory: Path) -> None:
    """A case with a text tokenizer, whose pieces stand below the ids of codes; the tiny Emu3 with pictures that its
    context holds, Llama with blocks of a picture tokenizer of one's own behind its ids."""
    case = CASES[name]
    dataclasses.replace(case, settings=grown(case.settings)).write(directory)
    (directory / "tokenizer.json").write_text(trained(PIECES))
    text = JsonTextTokenizer.from_file(directory / "tokenizer.json")
    own = {}
    if name == "emu3":
        size = text.ids[text.encode("4*4")].tolist()
        own["grammar"] = emu3.grammar([{"rows": 4, "columns": 4, "prefix": size}])
    if name == "llama":
        special = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"<{new}>": 528 + at for at, new in enumerate(LLAMA_NEW)}}
        blocks = {"text": np.arange(3, PIECES, dtype=np.int32), "image": np.arange(512, 528, dtype=np.int32)}
        own["vocabulary"] = Vocabulary(640, blocks, special).to_json()
        control = {role: f"<{role}>" for role in ("bos", "turn", "eos", "pad")}
        image = {"codebooks": ["image"], "open": ["<begin>"], "close": ["<end>"], "shapes": [{"rows": 2, "columns": 2}]}
        modalities = {"text": {"block": "text"}, "image": image}
        own["grammar"] = {"format": 1, "control": control, "modalities": modalities}
        config = ImageTokenizerConfig(image_size=8, patch_size=2, channels=8, codebook_size=16, code_dim=4)
        ImageTokenizer(config, ImageVQ(config, rngs=nnx.Rngs(0))).save(directory / "tokenizers" / "image")
    for file, content in own.items():
        (directory / f"{file}.json").write_text(json.dumps(content))


def grown(settings: dict) -> dict:
    """A config.json with more ids, named ones behind the text's pieces, and pictures of 8 x 8 pixels."""
    found = {key: grown(value) if key == "text_config" else value for key, value in settings.items()}
    found |= {"vocab_size": 512} if "vocab_size" in found else {}
    if "vocabulary_map" in found:
        found["vocabulary_map"] = {name: PIECES + token for name, token in found["vocabulary_map"].items()}
        found["vq_config"] = found["vq_config"] | {"image_size": 8}
    return found


def write_documents(folder: Path) -> None:
    """JSON lines of texts and pictures of several sizes, in any order, some of them given."""
    folder.mkdir()
    draw, lines = np.random.default_rng(0), []
    for number in range(120):
        parts = []
        for place in range(count := int(draw.integers(1, 4))):
            part = {"text": " ".join(draw.choice(WORDS.split(), draw.integers(1, 8)))}
            if draw.integers(2):
                part = {"image": f"{number}-{place}.png"}
                height, width = draw.integers(8, 20, size=2)
                pixels = draw.integers(256, size=(height, width, 3), dtype=np.uint8)
                omni.Image(pixels).save(folder / part["image"])
            parts.append(part | {"context": place == 0 and count > 1 and bool(draw.integers(2))})
        lines.append(json.dumps({"parts": parts}))
    (folder / "documents.jsonl").write_text("\n".join(lines) + "\n")


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
    """A case's run on eight devices, from JSON lines: (configuration, the rows of each step, losses). What it starts
    from is in DIRECTORY/start, too, as transformers has it."""
    write_published(name, directory / "published")
    model = omni.load(directory / "published")
    model.save(directory / "model")
    model.export(directory / "start")
    write_documents(directory / "documents")
    tokenizers = {modality: str(directory / "model" / "tokenizers" / modality) for modality in ("text", "image")}
    source = JsonLines(str(directory / "documents"))
    manifest = tokenize(TokenizeConfig(str(directory / "tokens"), source, tokenizers, str(directory / "model")))
    assert manifest["documents"] == 120
    environment = host_devices(8)
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
    """Losses within 1e-4 on documents of texts and pictures; what is exported then is what transformers learned, within
    a hundredth of how far it went, and has the same tokenizer of pictures."""
    config, batches, found = start(name, tmp_path)
    assert min(batch["modalities"].max() for batch in batches) == 1  # there are pictures in every step
    theirs, _ = loaded(tmp_path / "start")
    before = theirs.lm_head.weight.detach().clone()
    parameters = [value for name, value in theirs.named_parameters() if "vqmodel" not in name]
    expected = their_losses(theirs, parameters, config.optimizer.learning_rate, batches)
    assert len(found) == STEPS and expected[0] - expected[-1] > 0.05
    np.testing.assert_allclose(found, expected, atol=1e-4)

    omni.load(config.output).export(tmp_path / "theirs")
    exported, wrong = loaded(tmp_path / "theirs")
    moved = (theirs.lm_head.weight - before).abs().max()
    assert wrong == [] and (exported.lm_head.weight - theirs.lm_head.weight).abs().max() < 0.01 * moved
    tokenizers = [omni.load(tmp_path / each).tokenizers["image"].hash for each in ("published", "theirs")]
    assert tokenizers[0] == tokenizers[1]


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
