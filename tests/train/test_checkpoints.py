"""Checkpoints: only committed ones count, a failed write spoils none, and any mesh can read them."""

import contextlib
import dataclasses
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from test_loop import crash, stop_at, without_times
from training_cases import regression

from omni.sharding import MeshConfig, ShardingRules, make_mesh, sharding_tree
from omni.train.checkpoints import Checkpoints, restore_params
from omni.train.loop import train
from omni.train.manifests import verify
from omni.train.metrics import read_metrics
from omni.train.optimizer import OptimizerConfig, make_optimizer
from omni.train.step import make_state
from omni_tokenizers.errors import OmniError, UsageError

SCRIPT = Path(__file__).parent / "training_cases.py"


def state_and_shapes(config):
    def make():
        return make_state(config.task, config.optimizer, config.steps, config.seed)[1]

    abstract = jax.eval_shape(make)
    shardings = sharding_tree(abstract, ShardingRules(), make_mesh(MeshConfig()))
    shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    return jax.jit(make, out_shardings=shardings)(), shapes


def at_step(state, step):
    return dataclasses.replace(state, step=state.step * 0 + step)


@pytest.fixture
def saved(tmp_path):
    """A run with checkpoints at steps 1 and 2."""
    state, shapes = state_and_shapes(regression(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    checkpoints = Checkpoints(tmp_path, 2, {"vocabulary": {"size": 128}})
    for step in (1, 2):
        checkpoints.save(at_step(state, step), {"next_index": step})
    checkpoints.wait()
    return tmp_path, checkpoints, state, shapes


def test_round_trip(saved):
    """State and data position come back as they were, and only the newest stay."""
    directory, checkpoints, state, shapes = saved
    restored, data = checkpoints.restore(shapes)
    assert data == {"next_index": 2}
    assert int(restored.step) == 2
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(at_step(state, 2)), strict=True):
        np.testing.assert_array_equal(a, b)
    checkpoints.save(at_step(state, 3), {"next_index": 3})
    checkpoints.wait()
    assert sorted(path.name for path in (directory / "checkpoints").glob("[0-9]*")) == ["2", "3"]
    assert checkpoints.steps() == [2, 3]
    assert [int(checkpoints.restore(shapes, step)[0].step) for step in (2, 3)] == [2, 3]


def test_state_may_change_once_save_returns(tmp_path):
    """What is written is the state at the call, though its buffers are given to the next step while it is written."""
    state, shapes = state_and_shapes(regression(tmp_path, width=50_000))
    expected = jax.tree.map(np.array, state)
    checkpoints = Checkpoints(tmp_path, 2, {})
    spoil = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    checkpoints.save(state, {})
    spoiled = spoil(state)
    jax.block_until_ready(spoiled)
    checkpoints.wait()
    for a, b in zip(jax.tree.leaves(checkpoints.restore(shapes)[0]), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_uncommitted_steps_are_never_chosen(saved):
    """What an interrupted write or an interrupted removal leaves behind is passed over, by every reader."""
    directory, checkpoints, state, shapes = saved
    with checkpoints:
        pass
    root = directory / "checkpoints"
    half = root / "3.orbax-checkpoint-tmp-0"
    shutil.copytree(root / "2", half)
    next((half / "state").glob("d/*")).unlink()
    shutil.rmtree(root / "1" / "state")
    shutil.rmtree(root / "1" / "data")
    again = Checkpoints(directory, 2, {"vocabulary": {"size": 128}})
    assert again.latest() == 2
    assert int(again.restore(shapes)[0].step) == 2
    restore_params(directory)
    again.save(at_step(state, 3), {"next_index": 3})
    again.wait()
    assert int(again.restore(shapes)[0].step) == 3


def flip(path: Path, random) -> None:
    """One bit of one byte of a file changes."""
    content = bytearray(path.read_bytes())
    content[random.integers(len(content))] ^= 1 << random.integers(8)
    path.write_bytes(content)


def test_any_flipped_byte_is_found_and_named(saved):
    """A bit of any one file of a committed checkpoint, the manifest too, is enough; undamaged nothing is found."""
    directory, checkpoints, _, _ = saved
    checkpoints.wait()
    step, random = directory / "checkpoints" / "2", np.random.default_rng(0)
    files = [path for path in step.rglob("*") if path.is_file()]
    assert len(files) > 8 and verify(step) == []
    for path in files * 3:
        content = path.read_bytes()
        flip(path, random)
        assert verify(step) == [f"{path.relative_to(step)} is damaged"]
        path.write_bytes(content)
    for path in files:
        content = path.read_bytes()
        path.unlink()
        if path.name != "manifest.sha256":
            assert verify(step) == [f"{path.relative_to(step)} is missing"]
        path.write_bytes(content)
    (step / "state" / "more").write_text("")
    assert verify(step) == ["state/more is not in the manifest"]


def test_shares_of_a_manifest_find_what_the_whole_does(saved):
    """Three processes that read a third each find a damaged file between them."""
    step = saved[0] / "checkpoints" / "2"
    flip(step / "data" / "metadata", np.random.default_rng(0))
    found = [verify(step, (process, 3)) for process in range(3)]
    assert sorted(found) == [[], [], ["data/metadata is damaged"]]


def test_a_damaged_step_is_passed_over(saved, caplog):
    """A run goes on from the step before, says so once, by name, and later writes the damaged step anew."""
    directory, checkpoints, state, shapes = saved
    with checkpoints:
        pass
    flip(next((directory / "checkpoints" / "2" / "state").glob("ocdbt*/d/*")), np.random.default_rng(0))
    with Checkpoints(directory, 2, {"vocabulary": {"size": 128}}) as again:
        with caplog.at_level(logging.INFO, "omni"):
            assert again.newest_whole() == again.newest_whole() == 1
        (message,) = [record.getMessage() for record in caplog.records]
        assert "checkpoints/2 is damaged: state/ocdbt" in message
        assert (directory / "damaged" / "2").is_dir() and restore_params(directory)
        restored, data = again.restore(shapes, 1)
        assert int(restored.step) == 1 and data == {"next_index": 1}
        again.save(at_step(state, 2), {"next_index": 2})
        again.wait()
        assert again.newest_whole() == 2
    flip(directory / "checkpoints" / "1" / "data" / "metadata", np.random.default_rng(0))
    flip(directory / "checkpoints" / "2" / "data" / "metadata", np.random.default_rng(0))
    with Checkpoints(directory, 2, {}) as again, pytest.raises(OmniError, match="every checkpoint is damaged"):
        again.newest_whole()


def test_a_run_goes_on_from_before_the_damage(tmp_path, monkeypatch):
    """With a damaged newest checkpoint, a run still ends with the bits of an undisturbed one."""
    config = regression(tmp_path / "run", log_every=1)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="crash"):
        stop_at(patch, 10, crash)
        train(config)
    flip(next((tmp_path / "run" / "checkpoints" / "8" / "state").glob("d/*")), np.random.default_rng(0))
    whole = regression(tmp_path / "whole", log_every=1)
    for a, b in zip(*(jax.tree.leaves(train(each)) for each in (config, whole)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert without_times(read_metrics(config.output)) == without_times(read_metrics(whole.output))


def test_a_step_without_manifest_is_taken(saved, caplog):
    """Checkpoints of earlier versions have none; that is said."""
    directory, checkpoints, _, _ = saved
    (directory / "checkpoints" / "2" / "manifest.sha256").unlink()
    with caplog.at_level(logging.INFO, "omni"):
        assert checkpoints.newest_whole() == 2
    assert "has no manifest and is taken unverified" in caplog.text


def test_the_best_stays(tmp_path):
    """Of checkpoints at steps 1 to 5, the newest and that with the lowest metric stay, over a restart too."""
    state, _ = state_and_shapes(regression(tmp_path))
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 4.0, 5: 5.0}
    for steps in ((1, 2, 3), (4, 5)):
        with Checkpoints(tmp_path, 1, {}, best="held_out/loss") as checkpoints:
            for step in steps:
                checkpoints.save(at_step(state, step), {}, {"loss": 0.0, "held_out/loss": losses[step]})
                checkpoints.wait()
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")) == ["2", "5"]
    other = Checkpoints(tmp_path, 1, {}, best="held_out/los")
    with other, pytest.raises(UsageError, match=r"'held_out/los'.*nearest.*'held_out/loss'"):
        other.save(at_step(state, 6), {}, {"loss": 0.0, "held_out/loss": 0.0})


def test_another_vocabulary_is_refused(saved):
    """A checkpoint made with another vocabulary is refused, and the difference shown."""
    directory, _, _, shapes = saved
    other = Checkpoints(directory, 2, {"vocabulary": {"size": 256}})
    with pytest.raises(OmniError, match=r"another vocabulary \(size: 256 here, 128 there"):
        other.restore(shapes)


def test_damaged_checkpoint_is_one_line(saved):
    """A checkpoint whose files are gone is named in one line."""
    directory, checkpoints, _, shapes = saved
    shutil.rmtree(directory / "checkpoints" / "2" / "state")
    for read in (lambda: checkpoints.restore(shapes), lambda: restore_params(directory)):
        with pytest.raises(OmniError, match="checkpoints/2") as error:
            read()
        assert "\n" not in str(error.value)


def of_adamw(directory, **settings):
    """A run with AdamW."""
    return dataclasses.replace(regression(directory), optimizer=OptimizerConfig(**settings))


def test_moments_of_versions_that_masked_what_is_frozen(tmp_path):
    """They are read as this version keeps them, each where it belongs."""
    config = of_adamw(tmp_path, frozen=("up.*", "down.bias"))
    state, shapes = state_and_shapes(config)
    labels = nnx.map_state(lambda path, _: "moving" if path == ("down", "kernel") else "frozen", state.params)
    moving = make_optimizer(config.optimizer, config.steps)
    masked = optax.multi_transform({"moving": moving, "frozen": optax.set_to_zero()}, lambda _: labels)
    optimizer = masked.update(state.params, masked.init(state.params), state.params)[1]  # nothing in it is 0
    expected = jax.tree.leaves(optimizer)
    assert len(expected) == 4 and all(np.any(leaf) for leaf in expected)
    with Checkpoints(tmp_path, 2, {}) as checkpoints:
        checkpoints.save(at_step(dataclasses.replace(state, optimizer=optimizer), 2), {})
        checkpoints.wait()
        restored, _ = checkpoints.restore(shapes)
    assert jax.tree.structure(restored) == jax.tree.structure(state) and int(restored.step) == 2
    for a, b in zip(jax.tree.leaves(restored.optimizer), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(shapes), strict=True):
        assert a.sharding == b.sharding


def test_a_state_of_other_parts_is_no_damage(tmp_path):
    """It is said to be whole and what differs, and nobody is told to remove it."""
    state, _ = state_and_shapes(of_adamw(tmp_path))
    _, shapes = state_and_shapes(of_adamw(tmp_path, name="adafactor"))
    with Checkpoints(tmp_path, 2, {}) as checkpoints:
        checkpoints.save(at_step(state, 2), {})
        checkpoints.wait()
        said = r"the checkpoint is whole, but .*optimizer\.\S+, .* and \d+ more .*the version of omni that wrote it$"
        with pytest.raises(OmniError, match=said) as error:
            checkpoints.restore(shapes)
    assert "remove" not in str(error.value)


def test_no_run_is_one_line(tmp_path):
    """A directory that is no run, and a run without a checkpoint, are said to be that."""
    with pytest.raises(OmniError, match=r"config\.json"):
        restore_params(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OmniError, match="no checkpoint there yet"):
        restore_params(tmp_path)


@pytest.fixture
def small_disk():
    """Files can grow to 256 KiB only: as on a full disk, writing more fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, before[1]))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax's abandoned writes
def test_full_disk(tmp_path, small_disk):
    """A checkpoint that the disk does not take is one line that names the last good one, which still loads."""
    small, shapes = state_and_shapes(regression(tmp_path, width=16))
    large, _ = state_and_shapes(regression(tmp_path, width=400_000))
    (tmp_path / "config.json").write_text("{}")
    checkpoints = Checkpoints(tmp_path, 2, {})
    with checkpoints, pytest.raises(OmniError, match=r"could not be written.*the one of step 1 is whole") as error:
        checkpoints.save(at_step(small, 1), {"next_index": 1})
        checkpoints.wait()
        checkpoints.save(at_step(large, 2), {"next_index": 2})
        checkpoints.wait()
    assert "\n" not in str(error.value)
    small_disk()
    again = Checkpoints(tmp_path, 2, {})
    assert again.latest() == 1
    for a, b in zip(jax.tree.leaves(again.restore(shapes)[0]), jax.tree.leaves(at_step(small, 1)), strict=True):
        np.testing.assert_array_equal(a, b)
    restore_params(tmp_path)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_full_disk_ends_a_run(tmp_path, small_disk):
    """A run whose checkpoint the disk does not take ends with that line, and goes on when there is room."""
    config = regression(tmp_path / "run", width=400_000, steps=2)
    with pytest.raises(OmniError, match="checkpoint could not be written"):
        train(config)
    small_disk()
    assert int(train(config).step) == 2


def test_writes_of_a_failed_run_that_still_come_in(tmp_path):
    """A checkpoint can be written again where an abandoned one of the same process is still being filled."""
    state, _ = state_and_shapes(regression(tmp_path, width=16))
    folder = tmp_path / "checkpoints" / "1.orbax-checkpoint-tmp" / "state"
    folder.mkdir(parents=True)

    def write_on():
        end = time.monotonic() + 1
        while time.monotonic() < end:
            with contextlib.suppress(FileNotFoundError):  # until the folder itself is gone
                (folder / str(time.monotonic())).touch()

    writer = threading.Thread(target=write_on)
    writer.start()
    with Checkpoints(tmp_path, 2, {}) as checkpoints:
        checkpoints.save(at_step(state, 1), {"next_index": 1})
        checkpoints.wait()
        assert checkpoints.steps() == [1]
    writer.join()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["first step", "between checkpoints", "inside a checkpoint's writing"])
def test_kill_at_any_moment(tmp_path, moment):
    """`kill -9`, then the same command: the final state has the bits of an undisturbed run's."""
    settings = ["steps=60", "checkpoint_every=20", "log_every=1", "width=300000"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    run = tmp_path / "run"
    command = [sys.executable, str(SCRIPT), "regression", str(run), *settings]
    root = run / "checkpoints"

    def reached() -> bool:
        logged = (run / "metrics.jsonl").read_text().count("\n") if (run / "metrics.jsonl").exists() else 0
        if moment == "first step":
            return logged >= 1
        if moment == "between checkpoints":
            return (root / "20").exists() and logged >= 25
        return (root / "20").exists() and any(root.glob("40.*"))

    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while not reached():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.0005)
    process.kill()
    process.wait()
    assert not (run / "finished.json").exists()
    if moment.startswith("inside"):
        assert list(root.glob("40.*")) and not (root / "40").exists()
    subprocess.run(command, env=environment, check=True)
    undisturbed = train(regression(tmp_path / "undisturbed", steps=60, checkpoint_every=20, width=300_000))
    _, shapes = state_and_shapes(regression(run, steps=60, width=300_000))
    resumed, _ = Checkpoints(run, 2, {}).restore(shapes)
    for a, b in zip(jax.tree.leaves(resumed), jax.tree.leaves(undisturbed), strict=True):
        np.testing.assert_array_equal(a, b)
