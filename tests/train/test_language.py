"""The transformer's loss: which tokens count, and for how much."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from documents import make_documents, make_grammar
from flax import nnx
from training_cases import language

from omni.bundle import Model
from omni.data.shards import write_shards
from omni.experiment import override
from omni.train.loop import train
from omni.train.metrics import read_metrics
from omni_tokenizers.errors import OmniError, UsageError


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return language(tmp_path_factory.mktemp("language") / "run")


def test_loss_is_the_obvious_sum(config):
    """Total, weight and metrics equal a loop over the tokens of each document, each read alone by the model."""
    task = dataclasses.replace(config.task, z_loss=0.01)
    model = nnx.merge(*jax.jit(lambda: nnx.split(task.build(nnx.Rngs(0))))())
    forward = jax.jit(lambda ids, positions: model(ids, positions, None))
    rows, grammar = task.dataset(0), task.shards.grammar
    row = rows[0]
    total = weight = 0.0
    sums = {name: [0.0, 0.0] for name in grammar.modalities}
    for segment in range(1, row["segments"].max() + 1):
        place = row["segments"] == segment
        ids = row["ids"][place]
        alone, positions = np.zeros((1, 48), np.int32), np.zeros((1, 48, 3), np.int32)
        alone[0, : len(ids)], positions[0, : len(ids)] = ids, row["positions"][place]
        logits = np.asarray(forward(alone, positions)[0, : len(ids)], np.float64)
        denominator = np.log(np.exp(logits).sum(-1))
        for i in range(1, len(ids)):
            entropy = denominator[i - 1] - logits[i - 1, ids[i]]
            name = grammar.modalities[row["modalities"][place][i]]
            target = row["target"][place][i]
            w = {"image": 0.5}.get(name, 1.0) * (1.0 if target else 0.1)
            total += w * (entropy + 0.01 * denominator[i - 1] ** 2)
            weight += w
            if target:
                sums[name][0] += entropy
                sums[name][1] += 1
    batch = {key: jnp.array(value[None]) for key, value in row.items()}
    found, found_weight, metrics = jax.jit(lambda b: task.loss(model, b, jax.random.key(0), training=True))(batch)
    np.testing.assert_allclose(found, total, rtol=1e-5)
    np.testing.assert_allclose(found_weight, weight, rtol=1e-6)
    for name, expected in sums.items():
        np.testing.assert_allclose(metrics[f"loss/{name}"], expected, rtol=1e-5)


@pytest.mark.slow
def test_it_learns_and_its_directory_loads(tmp_path):
    """Losses fall, held-out ones are logged, and the directory opens as a model with the trained weights."""
    config = language(tmp_path / "run", steps=60, log_every=20, checkpoint_every=30)
    grammar = make_grammar()
    held_out = write_shards(tmp_path / "held", make_documents(grammar, 20, 7), grammar.vocabulary, grammar, {})
    config = dataclasses.replace(config, task=dataclasses.replace(config.task, held_out=str(held_out)))
    state = train(config)
    lines = read_metrics(config.output)
    assert lines[-1]["loss/image"] < lines[0]["loss/image"] - 0.3
    assert lines[-1]["held_out/loss/audio"] > 0
    model = Model.load(config.output)
    ids = make_documents(grammar, 1)[0].ids[None]
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: config.task.build(nnx.Rngs(0))))
    expected = nnx.merge(graphdef, state.ema, state.rest)
    positions = grammar.positions(grammar.annotate(ids[0]), np.arange(ids.size))[None]
    logits = np.asarray(jax.jit(lambda ids, positions: expected(ids, positions, None))(ids, positions))
    found = model.logits(ids)
    np.testing.assert_allclose(found, logits[..., : found.shape[-1]], atol=1e-4)


def test_configuration_that_does_not_fit(config):
    """A vocabulary of another size and an unknown modality are named before anything is computed."""
    task = config.task
    wrong = dataclasses.replace(task, model=dataclasses.replace(task.model, vocabulary_size=256))
    with pytest.raises(UsageError, match=r"256.*128"):
        wrong.dataset(0)
    with pytest.raises(UsageError, match=r"'imge'.*'image'"):
        dataclasses.replace(task, loss_weights={"imge": 2.0}).dataset(0)


def test_a_mixture_is_of_one_model(config, tmp_path):
    """Sets with their shares; those of another vocabulary or of other tokenizers are refused, before any step."""
    grammar, other = make_grammar(), make_grammar(text=21)
    for name, one, hashes in [("more", grammar, {}), ("text", other, {}), ("codes", grammar, {"image": "abc"})]:
        provenance = {"tokenizers": hashes} if hashes else {}
        write_shards(tmp_path / name, make_documents(one, 10, 7), one.vocabulary, one, provenance)

    def mixed(name):
        return dataclasses.replace(config.task, data={config.task.data: 0.7, str(tmp_path / name): 0.3})

    lengths = [int((mixed("more").dataset(0)[i]["segments"] > 0).sum()) for i in range(20)]
    assert min(lengths) > 0 and len(mixed("more").mixture) == 2
    with pytest.raises(OmniError, match="another vocabulary"):
        mixed("text").dataset(0)
    with pytest.raises(UsageError, match=r"different tokenizers.*abc"):
        mixed("codes").dataset(0)
    with pytest.raises(UsageError, match="names no shard directory"):
        dataclasses.replace(config.task, data={}).dataset(0)


def test_a_mixture_on_the_command_line(config):
    """One directory as ever; several with their shares."""
    assert override(config, ["--task.data", "elsewhere"], "omni train").task.data == "elsewhere"
    changed = override(config, ["--task.data", "a", "0.5", "b", "0.5"], "omni train")
    assert changed.task.data == {"a": 0.5, "b": 0.5}
