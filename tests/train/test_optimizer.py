"""Schedules, what decays and what is frozen by name, and that each optimizer learns and resumes."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from training_cases import language

from omni.train.loop import train
from omni.train.metrics import read_metrics
from omni.train.optimizer import OptimizerConfig, decay_mask, make_optimizer, make_schedule
from omni.train.step import make_state
from omni_tokenizers.errors import UsageError


def parameters(config):
    return jax.jit(lambda: make_state(config.task, config.optimizer, config.steps, 0)[1])().params


def test_schedules():
    """All rise alike; wsd stays at the peak until its last share, which ends at the floor; constant stays for ever."""
    values = {}
    for name in ("cosine", "wsd", "constant"):
        config = OptimizerConfig(
            learning_rate=2.0, final_learning_rate=0.1, warmup_steps=4, schedule=name, decay_share=0.25
        )
        values[name] = np.array([float(make_schedule(config, 20)(step)) for step in range(20)])
        np.testing.assert_allclose(values[name][:4], [0.5, 1.0, 1.5, 2.0], rtol=1e-6)
    np.testing.assert_allclose(values["wsd"][3:15], 2.0)
    np.testing.assert_allclose(values["wsd"][14:], np.linspace(2.0, 0.2, 6), rtol=1e-6)
    np.testing.assert_allclose(values["constant"][3:], 2.0)
    assert values["cosine"][19] == pytest.approx(0.2)


def test_what_decays_by_name(tmp_path):
    """A pattern takes parameters out of the decay; the others still decay."""
    params = parameters(language(tmp_path / "run"))
    mask = nnx.to_pure_dict(decay_mask(params, ("embedding", "blocks.g*")))
    assert mask["embedding"] is False and mask["blocks"]["gate"] is False
    assert mask["blocks"]["up"] is True and mask["blocks"]["mlp_norm"] is False


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_frozen_parameters_stay(tmp_path, name):
    """They keep every bit and have no moments, under whatever optimizer and decay; all others move."""
    config = language(tmp_path / "run", steps=3)
    frozen = OptimizerConfig(name=name, warmup_steps=0, frozen=("embedding", "blocks.query*"))
    config = dataclasses.replace(config, optimizer=frozen)
    before, state = parameters(config), train(config)
    for (path, old), (_, new) in zip(nnx.to_flat_state(before), nnx.to_flat_state(state.params), strict=True):
        is_frozen = path == ("embedding",) or path[-1].startswith("query")
        assert np.array_equal(old.get_value(), new.get_value()) == is_frozen, path
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer))
    everything = jax.eval_shape(make_optimizer(dataclasses.replace(frozen, frozen=()), 3).init, before)
    assert moments < sum(leaf.size for leaf in jax.tree.leaves(everything)) - before["embedding"].get_value().size / 9


def test_a_pattern_that_names_nothing(tmp_path):
    """It is refused by name, before anything is trained."""
    for setting in ("frozen", "no_decay"):
        config = language(tmp_path / setting)
        optimizer = dataclasses.replace(config.optimizer, **{setting: ("blocks.gates",)})
        with pytest.raises(UsageError, match=f"optimizer {setting}: no parameter is named 'blocks.gates'"):
            train(dataclasses.replace(config, optimizer=optimizer))


def test_adafactor_has_small_moments(tmp_path):
    """Of a matrix of 128 rows and more, its squared gradients are kept as sums over rows and columns."""
    params = parameters(language(tmp_path / "run", dim=128))
    config = OptimizerConfig(name="adafactor", beta1=0.0)
    moments = jax.eval_shape(make_optimizer(config, 10).init, params)
    moments, values = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (moments, params))
    assert moments < 0.6 * values


@pytest.mark.parametrize(
    "optimizer",
    [
        OptimizerConfig(name="adafactor", learning_rate=1e-2, warmup_steps=2, schedule="wsd"),
        OptimizerConfig(name="muon", learning_rate=3e-3, warmup_steps=2),
    ],
    ids=lambda optimizer: optimizer.name,
)
def test_learns_and_resumes_its_state(tmp_path, optimizer):
    """A run learns, and its moments are restored: two halves are one whole, bit for bit."""
    config = language(tmp_path / "whole", steps=20, checkpoint_every=10, log_every=10)
    config = dataclasses.replace(config, optimizer=optimizer)
    whole = train(config)
    first, last = read_metrics(config.output)
    assert last["loss"] < first["loss"]
    half = dataclasses.replace(config, output=str(tmp_path / "half"))
    train(half)
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "20")
    (tmp_path / "half" / "finished.json").unlink()
    for a, b in zip(jax.tree.leaves(train(half)), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)
