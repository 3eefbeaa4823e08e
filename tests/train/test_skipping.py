"""Steps whose loss or gradient is no number, or whose loss is a spike, change nothing, are counted and limited."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_loop import assert_same_bits, crash, stop_at, without_held_out, without_times
from training_cases import Duel, regression

from omni.data.loader import stack
from omni.train.checkpoints import Checkpoints
from omni.train.loop import train
from omni.train.metrics import read_metrics
from omni.train.program import Program
from omni.train.skipping import SkipConfig
from omni_tokenizers.errors import OmniError, UsageError

NAN, INF = float("nan"), float("inf")


def first_step(config, adversarial=False):
    """(state before, state after, metrics) of the first step of a run."""
    program = Program(config)
    state = program.start()
    before = jax.tree.map(np.array, state)
    examples = config.task.dataset(config.seed)
    batch = stack([examples[i] for i in range(config.batch_size)])
    return before, *program.train_step(adversarial)(state, batch)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    "fault", [{"bad": {3: NAN}}, {"bad": {3: INF}}, {"explode": "gradient"}], ids=["nan", "infinite", "gradient"]
)
def test_a_bad_step_changes_nothing_but_its_number(fault, accumulation):
    """One bad example of a batch, or a gradient that is no number under a loss that is one: parameters, moments,
    averages and statistics keep every bit, and the step says that it was skipped; a good step changes all of them."""
    before, after, metrics = first_step(regression("unused", accumulation=accumulation, **fault))
    assert metrics["skipped"][0] == 1 and after.step == 1
    assert_same_bits(dataclasses.replace(after, step=before.step), before)
    _, moved, metrics = first_step(regression("unused", accumulation=accumulation))
    assert metrics["skipped"][0] == 0
    for part in ("params", "rest", "optimizer", "ema"):
        pairs = zip(*(jax.tree.leaves(getattr(state, part)) for state in (before, moved)), strict=True)
        assert all(np.any(a != b) for a, b in pairs), part


def test_a_bad_step_changes_no_critic():
    """The critic skips the step, too."""
    task = Duel(bad={3: NAN})
    before, after, metrics = first_step(dataclasses.replace(regression("unused"), task=task), adversarial=True)
    assert metrics["skipped"][0] == 1
    assert_same_bits(dataclasses.replace(after, step=before.step), before)


def test_skipped_steps_are_counted_and_the_data_goes_on(tmp_path, caplog):
    """The log counts them and names the reason; their metrics spoil no mean; the next batch follows."""
    config = regression(tmp_path / "run", bad={35: NAN, 60: INF}, log_every=4)  # of batches 5 and 8, of 8 points each
    with caplog.at_level(logging.WARNING, "omni"):
        state = train(config)
    assert [record.getMessage() for record in caplog.records] == [
        "step 5: loss is not finite; it is skipped (1 in a row, 1 in all)",
        "step 8: loss is not finite; it is skipped (1 in a row, 2 in all)",
    ]
    lines = read_metrics(config.output)
    assert [line["skipped_steps"] for line in lines] == [0, 2, 2]
    assert all(np.isfinite(value) for line in lines for value in line.values())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    with Checkpoints(config.output, 2, {}) as checkpoints:
        position = checkpoints.restore(Program(config).shapes)[1]
    assert position["iterator"] == {"next_index": 12} and position["skipped"]["total"] == 2
    good = train(regression(tmp_path / "good", log_every=4))
    assert np.any(jax.tree.leaves(good.params)[0] != jax.tree.leaves(state.params)[0])


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("limits", [{"in_a_row": 3}, {"total": 3}])
def test_a_limit_stops_the_run(tmp_path, what, limits):
    """A run in which nothing is a number any more ends; what is saved is the last good state."""
    config = regression(tmp_path / "run", explode=what, log_every=1, skip=SkipConfig(**limits))
    with pytest.raises(OmniError, match=rf"3 steps in a row and 3 in all.*step 3: {what}.*not finite") as error:
        train(config)
    assert "\n" not in str(error.value)
    program = Program(config)
    with Checkpoints(config.output, 2, {}) as checkpoints:
        state, _ = checkpoints.restore(program.shapes)
    start = program.start()
    assert int(state.step) == 3
    assert_same_bits(dataclasses.replace(state, step=start.step), start)


def test_a_stopped_run_goes_on_under_a_higher_limit(tmp_path):
    """It ends with the bits of a run that had this limit from the beginning; steps in a row count over the stop."""
    bad = {8 * step: INF for step in (4, 5, 6, 7)}  # of batches 5 to 8
    stopped, patient = (
        regression(tmp_path / "run", bad=bad, log_every=1, skip=SkipConfig(in_a_row=limit)) for limit in (2, 5)
    )
    with pytest.raises(OmniError, match="the last was step 6"):
        train(stopped)
    with pytest.raises(OmniError, match="3 steps in a row"):
        train(dataclasses.replace(stopped, skip=SkipConfig(in_a_row=3)))
    state = train(patient)
    whole = dataclasses.replace(patient, output=str(tmp_path / "whole"))
    assert_same_bits(state, train(whole))
    assert without_held_out(read_metrics(stopped.output)) == without_held_out(read_metrics(whole.output))


def test_spikes_are_skipped_if_wanted(tmp_path, monkeypatch, caplog):
    """A loss far above its running mean is skipped where that is set, and the mean outlives a crash."""
    settings = {"bad": {8 * 9: 30.0}, "log_every": 1, "skip": SkipConfig(spike=5.0)}  # in batch 10
    with caplog.at_level(logging.WARNING, "omni"):
        whole = train(regression(tmp_path / "whole", **settings))
    assert [record.getMessage() for record in caplog.records] == [
        f"step 10: the loss, {_spike(tmp_path):.4g}, is a spike; it is skipped (1 in a row, 1 in all)"
    ]
    crashed = regression(tmp_path / "crashed", **settings)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        stop_at(patch, 9, crash)
        train(crashed)
    assert_same_bits(train(crashed), whole)
    lines = (without_times(read_metrics(tmp_path / name)) for name in ("whole", "crashed"))
    assert next(lines) == next(lines)
    free = train(regression(tmp_path / "free", **settings | {"skip": SkipConfig()}))
    assert np.any(jax.tree.leaves(free.params)[0] != jax.tree.leaves(whole.params)[0])


def _spike(tmp_path):
    """The loss of step 10 in a run that skips nothing; the states before it are the same."""
    run = regression(tmp_path / "spike", bad={8 * 9: 30.0}, log_every=1)
    train(run)
    return read_metrics(run.output)[9]["loss"]


def test_a_first_loss_is_no_spike():
    """Without a mean yet, nothing is one; the mean begins with the first loss."""
    config = regression("unused", skip=SkipConfig(spike=2.0))
    program, examples = Program(config), config.task.dataset(0)
    batch = stack([examples[i] for i in range(8)])
    state, metrics = program.train_step()(program.start(), batch, jnp.float32(np.nan))
    assert metrics["skipped"][0] == 0
    assert float(metrics["usual_loss"][0]) == pytest.approx(float(metrics["loss"][0] / metrics["loss"][1]))
    _, metrics = program.train_step()(state, batch, jnp.float32(1e-6))
    assert metrics["skipped"][0] == 1 and metrics["usual_loss"][0] == np.float32(1e-6)


@pytest.mark.parametrize("setting", [{"in_a_row": 0}, {"total": 0}, {"spike": 1.0}, {"spike": NAN}])
def test_limits_that_mean_nothing_are_refused(setting):
    """They are usage errors that name the setting."""
    with pytest.raises(UsageError, match=f"skip.{next(iter(setting))}"):
        SkipConfig(**setting)
