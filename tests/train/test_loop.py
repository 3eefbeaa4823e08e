"""The loop: an interrupted run ends where an undisturbed one does, to the last bit, and its log holds no step twice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import training_cases
from etils import epath
from training_cases import Regression, regression

from omni.sharding import MeshConfig
from omni.train import metrics as metrics_module
from omni.train import run_directory
from omni.train.checkpoints import restore_params
from omni.train.loop import make_progress, train
from omni.train.metrics import MetricsLog, read_metrics
from omni_tokenizers.errors import OmniError, UsageError


def assert_same_bits(first, second):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


def without_times(lines):
    times = ("steps_per_second", "tokens_per_second", "goodput")
    return [{k: v for k, v in line.items() if k not in times and not k.startswith("time/")} for line in lines]


def without_held_out(lines):
    """A run that is stopped is saved, and measured, at one more step."""
    return [{k: v for k, v in line.items() if not k.startswith("held_out/")} for line in without_times(lines)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(final state, log) of a run that nothing interrupts."""
    config = regression(tmp_path_factory.mktemp("undisturbed") / "run", log_every=1)
    return train(config), read_metrics(config.output)


def stop_at(monkeypatch, step, action):
    """`action` happens when the step is logged."""
    write = MetricsLog.write

    def writing(self, at, values):
        write(self, at, values)
        if at == step:
            action()

    monkeypatch.setattr(MetricsLog, "write", writing)


def crash():
    raise RuntimeError("crash")


@pytest.mark.parametrize("step", [2, 4, 11])
def test_resumed_equals_undisturbed(tmp_path, monkeypatch, undisturbed, step):
    """A crash before, at or after a checkpoint changes no bit of parameters, moments, averages, statistics and log."""
    config = regression(tmp_path / "run", log_every=1)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="crash"):
        stop_at(patch, step, crash)
        train(config)
    assert not (tmp_path / "run" / "finished.json").exists()
    state = train(config)
    assert_same_bits(state, undisturbed[0])
    assert without_times(read_metrics(config.output)) == without_times(undisturbed[1])


def test_interrupt_saves(tmp_path, monkeypatch, undisturbed):
    """Ctrl-C ends the run with a checkpoint of that very step and one line; the same command goes on."""
    config = regression(tmp_path / "run", log_every=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="saved at step 7: the same command"):
        stop_at(patch, 6, lambda: os.kill(os.getpid(), signal.SIGINT))
        train(config)
    assert (tmp_path / "run" / "checkpoints" / "7").exists()
    assert_same_bits(train(config), undisturbed[0])
    assert [line["step"] for line in read_metrics(config.output)] == list(range(1, 13))


def test_a_stop_between_lines_leaves_no_trace_in_the_log(tmp_path, monkeypatch):
    """Each line is of the steps since the last one, those before a stop too, with the bits of an undisturbed run's."""
    settings = {"log_every": 4, "checkpoint_every": 100}
    whole, config = (regression(tmp_path / name, **settings) for name in ("whole", "run"))
    train(whole)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="saved at step 5"):
        stop_at(patch, 4, lambda: os.kill(os.getpid(), signal.SIGINT))
        train(config)
    train(config)
    assert [line["step"] for line in read_metrics(config.output)] == [4, 8, 12]
    assert without_times(read_metrics(config.output)) == without_times(read_metrics(whole.output))


@pytest.mark.slow
def test_sigterm_saves_and_has_its_own_code(tmp_path):
    """SIGTERM ends a run with code 75 and a checkpoint of that very step, Ctrl-C with 130; both go on to the bits of a
    run that nothing stopped."""
    command = [sys.executable, str(Path(training_cases.__file__)), "regression", str(tmp_path / "run")]
    command += ["steps=400", "log_every=1", "checkpoint_every=1000"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    for sent, code in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
        before = read_metrics(tmp_path / "run")[-1:]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        while read_metrics(tmp_path / "run")[-1:] == before:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.001)
        process.send_signal(sent)
        printed = process.communicate(timeout=120)[1]
        assert process.returncode == code, printed
        step = read_metrics(tmp_path / "run")[-1]["step"]
        assert f"saved at step {step}: the same command goes on" in printed
        assert (tmp_path / "run" / "checkpoints" / str(step)).exists()
    settings = {"steps": 400, "log_every": 1, "checkpoint_every": 1000}
    state = train(regression(tmp_path / "run", **settings))
    assert_same_bits(state, train(regression(tmp_path / "whole", **settings)))
    logs = (without_held_out(read_metrics(tmp_path / name)) for name in ("run", "whole"))
    assert next(logs) == next(logs)


def test_finished_run_returns_at_once(tmp_path, monkeypatch):
    """What is finished is not touched; a longer run goes on from it, and is not taken for a shorter one."""
    config = regression(tmp_path / "run", steps=4)
    train(config)
    with monkeypatch.context() as patch:
        patch.setattr(Regression, "dataset", lambda *_: crash())
        assert train(config) is None
    longer = train(regression(tmp_path / "run", steps=6))
    assert int(longer.step) == 6
    with pytest.raises(UsageError, match="finished after 6 steps; steps is 4"):
        train(config)
    (tmp_path / "run" / "finished.json").unlink()
    with pytest.raises(UsageError, match="at step 6 already"):
        train(config)


def test_killed_before_the_end_was_written(tmp_path, monkeypatch):
    """A run that stopped between its last checkpoint and the end only writes what is missing."""
    config = regression(tmp_path / "run", steps=4)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(Regression, "save", lambda *_: crash())
        train(config)
    assert int(train(config).step) == 4
    assert (tmp_path / "run" / "net.npz").exists()
    assert json.loads((tmp_path / "run" / "finished.json").read_text()) == {"steps": 4}


def test_saved_net_is_the_averaged_one(tmp_path):
    """What is written in the end and what `restore_params` reads are the averages, with the configuration."""
    config = regression(tmp_path / "run", steps=4)
    state = train(config)
    params, found = restore_params(tmp_path / "run")
    saved = np.load(tmp_path / "run" / "net.npz")
    assert (saved["kernel"] != state.params["up"]["kernel"][...]).any()
    np.testing.assert_array_equal(saved["kernel"], state.ema["up"]["kernel"][...])
    np.testing.assert_array_equal(saved["mean"], state.rest["mean"][...])
    np.testing.assert_array_equal(params["up"]["kernel"], saved["kernel"])
    assert found["task"]["type"] == "Regression"
    plain = regression(tmp_path / "plain", steps=4, ema_decay=0.0)
    state = train(plain)
    params, _ = restore_params(tmp_path / "plain")
    np.testing.assert_array_equal(params["up"]["kernel"], state.params["up"]["kernel"][...])


def test_other_settings_are_refused(tmp_path):
    """Another run's directory is refused with the keys that differ; how often it logs may change."""
    train(regression(tmp_path / "run", steps=2))
    with pytest.raises(OmniError, match=r"task\.width: 8 here, 16 there; seed: 1 here, 0 there") as error:
        train(regression(tmp_path / "run", steps=2, width=8, seed=1))
    assert "\n" not in str(error.value)
    assert train(regression(tmp_path / "run", steps=2, log_every=1, keep=5)) is None


def test_a_setting_that_came_later_stops_no_run(tmp_path):
    """A run begun before a setting existed goes on while that setting is null, and is refused once it is chosen."""
    config = regression(tmp_path / "run", steps=2)
    before = run_directory.to_json(config)
    run_directory.claim(epath.Path(config.output), before)
    now = {**before, "optimizer": {**before["optimizer"], "later": None}, "new": None}
    run_directory.claim(epath.Path(config.output), now)
    run_directory.claim(epath.Path(config.output), before)
    with pytest.raises(OmniError, match=r"\(new: 3 here, none there\)"):
        run_directory.claim(epath.Path(config.output), {**now, "new": 3})


def test_what_does_not_fit_is_refused(tmp_path):
    """A batch that does not split into microbatches and a mesh that the devices cannot make are usage errors."""
    with pytest.raises(UsageError, match="multiple of 3"):
        train(regression(tmp_path / "a", accumulation=3))
    with pytest.raises(UsageError, match="does not fit"):
        train(regression(tmp_path / "b", mesh=MeshConfig(tensor=3, data=1)))
    with pytest.raises(UsageError, match="steps is 0"):
        regression(tmp_path / "c", steps=0)


def test_held_out_batches_are_measured(tmp_path):
    """Held-out metrics stand in the log at every checkpoint, and only there."""
    config = regression(tmp_path / "run", steps=6, log_every=1, checkpoint_every=3)
    train(config)
    assert [line["step"] for line in read_metrics(config.output) if "held_out/loss" in line] == [3, 6]


def test_log_drops_what_comes_again(tmp_path):
    """Reopened at a step, the log loses what lies behind it, and a line that was cut off."""
    with MetricsLog(tmp_path, 0) as log:
        for step in range(1, 6):
            log.write(step, {"loss": float(step)})
    with (tmp_path / metrics_module.FILE).open("a") as file:
        file.write('{"step": 6, "lo')
    with MetricsLog(tmp_path, 3) as log:
        log.write(4, {"loss": 40.0})
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_training_seconds_are_those_that_steps_took(tmp_path):
    """Lines of unequal length add up, over attempts too; time and steps that an attempt lost do not count."""
    with MetricsLog(tmp_path, 0) as log:
        log.write(20, {"steps_per_second": 10.0})
        log.write(30, {"steps_per_second": 5.0})
        log.write(40, {"steps_per_second": 0.1})
    with MetricsLog(tmp_path, 30) as log:
        log.write(40, {"steps_per_second": 2.0})
    assert metrics_module.training_seconds(tmp_path) == pytest.approx({20: 2.0, 30: 4.0, 40: 9.0})
    assert metrics_module.training_seconds(tmp_path / "nowhere") == {}


def test_the_bar_heeds_the_environment(tmp_path, monkeypatch):
    """The first process leaves it to tqdm, and so to TQDM_DISABLE, whether there is a bar; others have none."""
    given = []
    monkeypatch.setattr("omni.train.loop.tqdm", lambda **settings: given.append(settings))
    config = regression(tmp_path / "run", steps=3)
    make_progress(config, 1)
    monkeypatch.setattr("jax.process_index", lambda: 1)
    make_progress(config, 1)
    assert "disable" not in given[0] and given[1]["disable"] is True
    assert (given[0]["total"], given[0]["initial"], given[0]["desc"]) == (3, 1, "run")


def test_means_are_weighted():
    """The mean over steps weighs each by its weight and leaves out what weighs nothing."""
    first = {"a": (np.float32(2), np.float32(1)), "b": (np.float32(0), np.float32(0))}
    second = {"a": (np.float32(4), np.float32(3)), "b": (np.float32(0), np.float32(0))}
    assert metrics_module.mean([first, second]) == {"a": 1.5}
