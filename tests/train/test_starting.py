"""A run that starts from another's parameters: what fits is taken, what does not is fresh, and a report says which."""

import dataclasses
import logging

import numpy as np
import pytest
from test_loop import assert_same_bits, crash, stop_at
from training_cases import language, regression

from omni.train.checkpoints import restore_params
from omni.train.loop import train
from omni.train.program import Program
from omni.train.starting import start_from
from omni_tokenizers.errors import OmniError, UsageError


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A finished run, 16 wide."""
    config = regression(tmp_path_factory.mktemp("other") / "run", steps=4)
    train(config)
    return config


def test_parameters_are_taken_by_pattern(other, caplog):
    """Named ones are the other run's averages, in the averages too; the rest, moments and statistics are fresh."""
    fresh = Program(regression("unused", seed=1)).start()
    with caplog.at_level(logging.INFO, "omni"):
        state = start_from(fresh, other.output, ("up.*",))
    theirs = restore_params(other.output)[0]
    for tree in (state.params, state.ema):
        for name in ("kernel", "bias"):
            np.testing.assert_array_equal(tree["up"][name][...], theirs["up"][name])
        np.testing.assert_array_equal(tree["down"]["kernel"][...], fresh.params["down"]["kernel"][...])
    assert_same_bits((state.rest, state.optimizer), (fresh.rest, fresh.optimizer))
    assert "2 of 4 parameters are taken" in caplog.text
    assert "taken: up.kernel [4, 16]" in caplog.text and "fresh: down.bias (not asked for)" in caplog.text


def test_another_shape_is_fresh(other, caplog):
    """What has another shape there is said with both shapes."""
    fresh = Program(regression("unused", width=8)).start()
    with caplog.at_level(logging.INFO, "omni"):
        state = start_from(fresh, other.output, ("*",))
    assert "fresh: up.kernel ([4, 16] there, [4, 8] here)" in caplog.text and "1 of 4 parameters" in caplog.text
    np.testing.assert_array_equal(state.params["up"]["kernel"][...], fresh.params["up"]["kernel"][...])


def test_a_run_starts_and_goes_on(other, tmp_path, monkeypatch):
    """A run from another's parameters begins with its loss, and goes on from its own checkpoint, not anew."""
    config = regression(tmp_path / "run", start_from=other.output, seed=5)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        stop_at(patch, 6, crash)
        train(config)
    state = train(config)
    assert_same_bits(state, train(dataclasses.replace(config, output=str(tmp_path / "whole"))))
    fresh = train(regression(tmp_path / "fresh", seed=5))
    assert np.any(state.params["up"]["kernel"][...] != fresh.params["up"]["kernel"][...])


def test_what_fits_nothing_is_refused(other, tmp_path):
    """A pattern without a parameter, a run without one that fits, no run, and names without a run."""
    with pytest.raises(UsageError, match=r"'upp\.\*', which fits no parameter; there are down.bias"):
        start_from(Program(regression("unused")).start(), other.output, ("upp.*",))
    with pytest.raises(UsageError, match="has none of the parameters"):
        start_from(Program(language(tmp_path / "language")).start(), other.output, ("*",))
    with pytest.raises(OmniError, match=r"config\.json"):
        start_from(Program(regression("unused")).start(), tmp_path, ("*",))
    with pytest.raises(UsageError, match="start_from names no run"):
        regression("unused", start_names=("up.*",))
