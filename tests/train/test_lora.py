"""Training adapters of a model that stays: what moves, what is kept, how it goes on, and what is written in the end."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from test_loop import assert_same_bits
from training_cases import language

from omni.bundle import Model
from omni.model.lora import Lora, merged
from omni.train.loop import TrainConfig, train
from omni.train.metrics import read_metrics
from omni.train.optimizer import OptimizerConfig, matrix_axes
from omni.train.program import Program
from omni.train.run_directory import write_json
from omni.train.stages import Stage
from omni.train.starting import start_from
from omni_tokenizers.errors import OmniError, UsageError

LORA = Lora(rank=2, alpha=6.0, matrices=("query", "output", "gate"), trained=("embedding",))


def on_adapters(config: TrainConfig, output, **settings) -> TrainConfig:
    """The run that goes on from `config`'s model with adapters."""
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, **settings)
    task = dataclasses.replace(config.task, lora=LORA)
    changes = {"task": task, "optimizer": optimizer, "steps": 6, "checkpoint_every": 3, "start_from": config.output}
    return dataclasses.replace(config, output=str(output), **changes)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> TrainConfig:
    """A finished run of all parameters."""
    config = language(tmp_path_factory.mktemp("base") / "run", steps=4)
    train(config)
    return config


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """(configuration, final state) of a run of adapters, in microbatches, every block's inside computed anew."""
    config = on_adapters(base, tmp_path_factory.mktemp("adapters") / "run", accumulation=2)
    model = dataclasses.replace(config.task.model, remat="blocks")
    config = dataclasses.replace(config, task=dataclasses.replace(config.task, model=model))
    return config, train(config)


def values(params: nnx.State) -> dict[str, np.ndarray]:
    return {".".join(path): np.asarray(variable.get_value()) for path, variable in nnx.to_flat_state(params)}


def test_the_model_stays_and_what_is_asked_for_moves(base, trained):
    """Adapters and what `trained` names move, all else keeps the bits of the model that the run starts from; the state
    holds the model once and, of what moves alone, two moments."""
    config, state = trained
    found, before = values(state.params), values(start_from(Program(config).start(), base.output, ("*",)).params)
    moving = {name for name in found if "_lora_" in name or name == "embedding"}
    assert len(moving) == 7 and set(values(Program(base).shapes.params)) == set(found) - moving | {"embedding"}
    for name, value in found.items():
        assert np.array_equal(value, before[name]) != (name in moving), name
    counted = sum(leaf.nbytes for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim)
    assert counted == 2 * sum(found[name].nbytes for name in moving)


def test_microbatches_and_recomputation_change_nothing(base, trained, tmp_path):
    """The losses are those of whole batches, of which all is kept; they fall."""
    whole = on_adapters(base, tmp_path / "whole")
    train(whole)
    losses, expected = ([line["loss"] for line in read_metrics(each.output)] for each in (trained[0], whole))
    np.testing.assert_allclose(losses, expected, atol=1e-5)
    assert losses[-1] < losses[0] - 0.05


def test_cut_in_two_it_has_the_same_bits(trained, tmp_path):
    """A checkpoint holds the adapters and the model they belong to, so what was there at first is not needed again."""
    config, state = trained
    half = dataclasses.replace(config, output=str(tmp_path / "half"))
    shutil.copytree(config.output, half.output)
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "6")
    (tmp_path / "half" / "finished.json").unlink()
    assert_same_bits(train(half), state)


def test_what_is_written_has_no_adapters(trained):
    """The finished model loads as any other, and its logits are those of the net that was trained."""
    config, state = trained
    model = Model.load(config.output)
    net = nnx.merge(Program(config).graphdef, state.params, state.rest)
    row = config.task.dataset(0)[0]
    ids, positions = row["ids"][None], row["positions"][None]
    logits, expected = (nnx.jit(lambda m: m(ids, positions, None))(each) for each in (model.transformer, net))
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    plain = nnx.jit(lambda m: m(ids, positions, None))(Model.load(config.start_from).transformer)
    assert np.abs(np.asarray(logits) - plain).max() > 1e-2


def test_a_run_with_adapters_is_started_from_by_its_finished_model(base, trained, tmp_path):
    """Never by its parameters without their adapters."""
    config, _ = trained
    state = start_from(Program(base).start(), config.output, ("*",))
    written = values(nnx.state(Model.load(config.output).transformer, nnx.Param))
    for name, value in values(state.params).items():
        np.testing.assert_array_equal(value, written[name])
    for finished in (None, {"steps": 3}):  # the second time it was, three steps earlier, and has a model of then
        unfinished = tmp_path / f"unfinished {finished}"
        shutil.copytree(config.output, unfinished)
        write_json(unfinished / "finished.json", finished) if finished else (unfinished / "finished.json").unlink()
        with pytest.raises(OmniError, match="a run with adapters, which are merged at its end; let it finish"):
            start_from(Program(base).start(), unfinished, ("*",))


def test_nothing_that_stays_is_random(base, tmp_path):
    """What is neither trained nor taken from the model is named, with why; what is trained may begin anew."""
    config = on_adapters(base, tmp_path / "run")
    with pytest.raises(UsageError, match=r"start_from: blocks\.attention_norm \(not asked for\), .* would stay random"):
        train(dataclasses.replace(config, start_names=("embedding", "norm")))
    task = dataclasses.replace(config.task, model=dataclasses.replace(config.task.model, mlp_dim=128))
    wider = dataclasses.replace(config, task=task)
    with pytest.raises(UsageError, match=r"blocks\.gate \(\[2, 32, 64\] there, \[2, 32, 128\] here\), .*blocks\.up \("):
        start_from(Program(wider).start(), base.output, ("*",), wider.task.trained())
    start_from(Program(config).start(), base.output, ("blocks.*", "norm"), config.task.trained())


def test_averages_are_of_adapters_and_what_is_written_of_averages(base, tmp_path):
    """What stays is in the averages bit for bit; the finished model has the averaged adapters merged."""
    config = dataclasses.replace(on_adapters(base, tmp_path / "run", ema_decay=0.9), steps=3)
    state = train(config)
    mean, last = values(state.ema), values(state.params)
    for name in mean:
        assert np.array_equal(mean[name], last[name]) != ("_lora_" in name or name == "embedding"), name
    found = values(nnx.state(Model.load(config.output).transformer, nnx.Param))
    averaged = values(nnx.state(merged(nnx.merge(Program(config).graphdef, state.ema, state.rest)), nnx.Param))
    assert found.keys() == averaged.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, averaged[name])


def test_muon_moves_both_sides(base, tmp_path):
    """As matrices of one side "rank", one for each layer, whichever of them has "embed"."""
    lora = Lora(rank=3, trained=("embedding",))
    config = on_adapters(base, tmp_path / "run")
    params = Program(dataclasses.replace(config, task=dataclasses.replace(config.task, lora=lora))).shapes.params
    found = matrix_axes(params)["blocks"]
    for name, (inputs, outputs) in {"query": (1, 2), "output": (2, 1), "gate": (1, 1), "down": (1, 1)}.items():
        sides = {"a": ({*range(1, 1 + inputs)}, {1 + inputs}), "b": ({1}, {*range(2, 2 + outputs)})}
        for side, expected in sides.items():
            numbers = found[f"{name}_lora_{side}"].get_value()
            assert {frozenset(axes) for axes in numbers} == {frozenset(axes) for axes in expected}, (name, side)


def test_all_stages_train_the_same_adapters(base, tmp_path):
    """A stage cannot give them another scale."""
    config = on_adapters(base, tmp_path / "run")
    stages = (Stage(2), Stage(4, {"task.lora.alpha": 600.0}))
    with pytest.raises(
        UsageError, match=r"stage 2: it changes the adapters \(task\.lora\.alpha: 600\.0 here, 6\.0 there\)"
    ):
        train(dataclasses.replace(config, stages=stages))


def test_what_cannot_be_is_said(base, tmp_path):
    """Adapters of a net that begins fresh, a pattern that names nothing, and nothing that moves."""
    config = on_adapters(base, tmp_path / "run")
    with pytest.raises(UsageError, match="name it with start_from"):
        dataclasses.replace(config, start_from=None)
    task = dataclasses.replace(config.task, lora=dataclasses.replace(LORA, trained=("embeddings",)))
    with pytest.raises(UsageError, match="trained: no parameter is named 'embeddings'"):
        train(dataclasses.replace(config, task=task))
    with pytest.raises(UsageError, match="no parameter is left to train"):
        Program(on_adapters(base, tmp_path / "run", frozen=("embedding", "blocks.*")))
