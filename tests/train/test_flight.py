"""The flight recorder: shares and times that add up, MFU by its stated convention, traces of the steps asked for."""

import dataclasses
import sys
import time

import jax
import numpy as np
import pytest
from training_cases import Regression, language, regression

from omni.data.loader import batches
from omni.train import flight as flight_module
from omni.train.flight import FlightRecorder, peak_flops, speed
from omni.train.loop import train
from omni.train.metrics import Window, mean, read_metrics
from omni.train.step import accumulate, make_state
from omni.train.task import Work
from omni_tokenizers.errors import OmniError, UsageError


def test_what_is_recorded_of_a_transformer(tmp_path):
    """Loss, z and share of each modality (shares sum to one), the update beside the weights, speed and times."""
    config = language(tmp_path / "run", steps=4, checkpoint_every=2)
    train(config)
    for line in read_metrics(config.output):
        assert {"gradient_norm", "update_to_weight", "tokens_per_second", "goodput"} <= line.keys()
        assert sum(line[f"share/{name}"] for name in ("text", "image", "audio")) == pytest.approx(1, abs=1e-6)
        parts = [line[f"z_loss/{name}"] * line[f"share/{name}"] for name in ("text", "image", "audio")]
        assert sum(parts) == pytest.approx(line["z_loss"], rel=1e-5)
        assert line["tokens_per_second"] == pytest.approx(line["steps_per_second"] * 8 * 48)
        assert -5 < line["largest/attention_logit"] < 5 and 0 < line["output_norm"] < 10
        assert 0 < line["update_to_weight"] < 0.1 and 0 <= line["goodput"] < 1
        assert "mfu" not in line  # of a CPU
    assert {"time/start", "time/data", "time/checkpoint"} <= line.keys()


def test_the_largest_of_microbatches_and_steps(tmp_path):
    """It is that of the whole batch and of all steps since the last line, not a mean, and says nothing of none."""
    found = []
    for accumulation in (1, 4):
        config = language(tmp_path / "run", accumulation=accumulation)
        graphdef, state = make_state(config.task, config.optimizer, config.steps, 0)
        batch = next(iter(batches(config.task.dataset(0), config.batch_size)))
        arguments = (graphdef, config.task, accumulation, state, batch, jax.random.key(0))
        found.append(jax.jit(lambda a=arguments: accumulate(*a)[2])())
    name = "largest/attention_logit"
    np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-5)
    assert found[0][name][1] == 1 and found[1]["output_norm"][1] == found[0]["output_norm"][1] > 8
    window = Window()
    window.add([{name: (value, weight), "x": (value, 1)} for value, weight in ((-3.0, 1), (-2.0, 1), (9.0, 0))])
    assert window.mean() == {name: -2.0, "x": pytest.approx(4 / 3)}
    assert mean([{name: (-np.inf, 0)}]) == {}


def test_update_to_weight(tmp_path):
    """It is the norm of what a step adds to the parameters over that of the parameters."""
    from test_skipping import first_step

    before, after, metrics = first_step(regression("unused"))
    pairs = zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True)
    moved, whole = np.sqrt(np.sum([(np.square(b - a).sum(), np.square(a).sum()) for a, b in pairs], axis=0))
    assert float(metrics["update_to_weight"][0]) == pytest.approx(moved / whole, rel=1e-4)


def test_time_is_where_it_was_spent(monkeypatch):
    """Seconds since the last call by what was waited for; goodput is of the whole attempt."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    recorder = FlightRecorder()

    def spend(what, seconds):
        with recorder.spending(what):
            now[0] += seconds

    spend("start", 2.0)
    now[0] += 5.0
    spend("data", 1.0)
    assert recorder.values() == {"time/data": 1.0, "time/start": 2.0, "goodput": 5 / 8}
    spend("data", 1.0)
    now[0] += 1.0
    assert recorder.values() == {"time/data": 1.0, "time/start": 0.0, "goodput": 6 / 10}


def test_flops_are_those_of_the_convention(tmp_path):
    """6 for each parameter but a table that is looked up, and causal attention, of a model counted by hand."""
    task = language(tmp_path / "run").task
    config = task.model
    block = config.dim * (4 + 2 * 2 + 4) * 8 + 3 * config.dim * config.mlp_dim + 2 * config.dim + 2 * 8
    matrices = 2 * block + config.dim + config.vocabulary_size * config.dim
    attention = 3 * 2 * (2 * 2 * 4 * 8 * 48) / 2  # forward and backward, layers, two products, half the square
    assert task.work() == Work(48, 6 * matrices + attention)
    untied = dataclasses.replace(task, model=dataclasses.replace(config, tied_embeddings=False))
    assert untied.work() == task.work()


def test_mfu_where_the_device_is_known(monkeypatch, tmp_path):
    """Tokens a second times FLOPs a token, over what all devices can do; the longest name that fits counts."""
    assert peak_flops("TPU v5 lite") == 197e12 and peak_flops("TPU v5") == 459e12 and peak_flops("cpu") is None
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and peak_flops("NVIDIA H100 PCIe") == 756e12
    monkeypatch.setattr(flight_module, "peak_flops", lambda kind: 1e9)
    task = language(tmp_path / "run").task
    values = speed(task.work(), 8, steps_per_second=2.0)
    assert speed(Regression().work(), 8, 2.0) == {}
    assert values["mfu"] == pytest.approx(2 * 8 * 48 * task.work().flops_per_token / (1e9 * jax.device_count()))


def test_profile_traces_the_steps_asked_for(tmp_path):
    """A trace that xprof reads appears in the run's directory, of these steps alone, and the run's bits stay."""
    traced = regression(tmp_path / "run", profile="3:5")
    state = train(traced)
    (trace,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    events = [dict(event.stats) for plane in planes for line in plane.lines for event in line.events]
    assert {event["step_num"] for event in events if "step_num" in event} == {3, 4, 5}
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(train(regression(tmp_path / "plain"))), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not (tmp_path / "plain" / "profile").exists()


def test_wandb_gets_the_metrics(tmp_path, monkeypatch):
    """With W&B itself, offline: what it would send holds the metrics and the configuration."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(regression(tmp_path / "run", steps=4, wandb="a-project"))
    (sent,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    wanted = (b"gradient_norm", b"held_out/loss", b"a-project", b"warmup_steps")
    deadline = time.monotonic() + 60  # W&B's own process writes the file, and may not have got to it yet
    while missing := [word for word in wanted if word not in sent.read_bytes()]:
        assert time.monotonic() < deadline, missing
        time.sleep(0.1)


def test_without_wandb_it_is_said_how_to_get_it(tmp_path, monkeypatch):
    """The error names the extra."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(OmniError, match=r"pip install 'omni-any-to-any\[wandb\]'"):
        train(regression(tmp_path / "run", steps=4, wandb="a-project"))


@pytest.mark.parametrize("steps", ["10", "15:10", "0:3", "a:b"])
def test_what_is_no_range_of_steps_is_refused(steps):
    """A usage error shows how to write one."""
    with pytest.raises(UsageError, match="such as 10:15"):
        regression("unused", profile=steps)
