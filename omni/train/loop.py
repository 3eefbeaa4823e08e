"""The train loop, for whatever is a `Task`; it reads from top to bottom."""

from __future__ import annotations

import functools
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from tqdm import tqdm

from omni.data.loader import batches
from omni.sharding import (
    MeshConfig,
    ShardingRules,
    activations_on,
    batch_sharding,
    make_mesh,
    mesh_axes,
    replicated,
    sharding_tree,
)
from omni.train import run_directory
from omni.train.checkpoints import Checkpoints
from omni.train.metrics import MetricsLog, mean
from omni.train.optimizer import OptimizerConfig
from omni.train.page import Page
from omni.train.step import TrainState, make_gallery_step, make_state, make_train_step, make_validation_step
from omni.train.task import Batch, Task
from omni_tokenizers.errors import OmniError, UsageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    output: str
    """Directory of the run: configuration, checkpoints, log and what it makes."""
    task: Task
    """What is trained, and on what."""
    steps: int = 1000
    """Length of the run; changing it changes the learning rate's cosine too."""
    batch_size: int = 64
    """Examples (packed rows, pictures, clips) in a step, all devices together."""
    seed: int = 0
    """Seed of parameters, data order and everything random in a step."""
    log_every: int = 20
    """Steps between lines of the log; each is the mean since the one before."""
    checkpoint_every: int = 200
    """Steps between checkpoints, at which held-out batches are measured too."""
    keep: int = 2
    """Checkpoints that stay."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How devices are laid out."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer, gradient clipping and accumulation, parameter averaging."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        adversary = self.task.adversary
        if adversary is not None and adversary.start >= self.steps:
            raise UsageError(
                f"the adversary's start is {adversary.start}, which a run of {self.steps} steps never reaches; "
                "set task.adversary.start below steps"
            )

    def run(self) -> None:
        """Trains."""
        train(self)


def train(config: TrainConfig) -> TrainState | None:
    """Runs, or goes on with, a training run until its last step; returns the final state, None if it was done before.

    The same configuration gives the same bits, however often it was interrupted.

    Raises:
      OmniError: the output holds another run, the loss is no number, a checkpoint cannot be written.
      UsageError: mesh, batch size and microbatches do not fit.
      KeyboardInterrupt: after Ctrl-C, when the checkpoint is written.
    """
    output, first = epath.Path(config.output), jax.process_index() == 0
    run_directory.claim(output, run_directory.to_json(config), write=first)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"claimed {output}")
    finished = run_directory.finished_steps(output)
    if finished > config.steps:
        raise UsageError(f"{output} was finished after {finished} steps; steps is {config.steps}")
    if finished == config.steps:
        logger.info("%s: finished before", output)
        return None

    task, rules, mesh = config.task, ShardingRules(), make_mesh(config.mesh)
    rows = batch_sharding(rules, mesh)
    check_batch_size(config, shard_count(rows))
    data = iter(batches(task.dataset(config.seed), config.batch_size, local_rows(rows, config.batch_size)))

    def initial() -> tuple[nnx.GraphDef, TrainState]:
        return make_state(task, config.optimizer, config.steps, config.seed)

    graphdef, abstract = jax.eval_shape(initial)
    shardings = sharding_tree(abstract, rules, mesh)

    checkpoints = Checkpoints(output, config.keep, task.metadata())
    if checkpoints.latest() is None:
        state = jax.jit(lambda: initial()[1], out_shardings=shardings)()
        start = 0
    else:
        shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
        state, position = checkpoints.restore(shapes)
        data.set_state(position)
        start = int(state.step)
        if start > config.steps:
            raise UsageError(f"{output} is at step {start} already; steps is {config.steps}")
        logger.info("%s: goes on from step %d", output, start)

    @functools.cache
    def train_step(adversarial: bool):
        return jax.jit(
            make_train_step(graphdef, task, config.optimizer, config.steps, config.seed, adversarial=adversarial),
            in_shardings=(shardings, rows),
            out_shardings=(shardings, replicated(mesh)),
            donate_argnums=0,
        )

    validation = task.validation()
    gallery = task.gallery()
    if gallery:
        page = Page(output, gallery, averaged=config.optimizer.ema_decay > 0)
        gallery_step = jax.jit(make_gallery_step(graphdef, gallery), out_shardings=replicated(mesh))
    validation_step = jax.jit(make_validation_step(graphdef, task), out_shardings=replicated(mesh))

    progress = tqdm(
        total=config.steps,
        initial=start,
        desc=output.name,
        unit="step",
        disable=not first,
        mininterval=0.2 if sys.stderr.isatty() else 10,
    )
    window, since = [], time.monotonic()
    log = MetricsLog(output if first else None, start)
    with activations_on(mesh, rules), checkpoints, log, progress, interruptible() as interrupted:
        for step in range(start + 1, config.steps + 1):
            adversarial = task.adversary is not None and step > task.adversary.start
            state, metrics = train_step(adversarial)(state, place(next(data), rows, config.batch_size))
            window.append(metrics)
            if len(window) > 2:
                jax.block_until_ready(window[-3])  # the host stays at most two steps ahead
            progress.update()

            due = step % config.log_every == 0 or step == config.steps
            stop = interrupted.is_set() if jax.process_count() == 1 else due and anywhere(interrupted.is_set())
            save = stop or step % config.checkpoint_every == 0 or step == config.steps
            if save or due:
                values = mean(jax.device_get(window)) | {"steps_per_second": len(window) / (time.monotonic() - since)}
                # The loss is from before the step, the gradients made the step.
                for name in ("loss", "gradient_norm", "critic/gradient_norm"):
                    if not math.isfinite(values.get(name, 0.0)):
                        raise OmniError(f"{output}: {name} at step {step} is not finite; lower the learning rate")
                if save and validation:
                    measured = [validation_step(state, place_whole(batch, rows)) for batch in validation]
                    values |= {f"held_out/{name}": value for name, value in mean(jax.device_get(measured)).items()}
                log.write(step, values)
                progress.set_postfix(loss=f"{values['loss']:.4g}", refresh=False)
                window, since = [], time.monotonic()
            if save:
                checkpoints.save(state, data.get_state())
            if save and gallery:
                made = np.asarray(gallery_step(state, place_whole(gallery.batch, rows)))
                if first:
                    page.add(step, made)
            if stop:
                checkpoints.wait()
                raise KeyboardInterrupt(f"interrupted; {output} is saved at step {step}: the same command goes on")
        checkpoints.wait()

    params, rest = on_host((state.ema or state.params, state.rest))
    if first:
        with run_directory.writing(output):
            task.save(nnx.merge(graphdef, params, rest), output)
        run_directory.write_json(output / run_directory.FINISHED, {"steps": config.steps})
    return state


def check_batch_size(config: TrainConfig, shards: int) -> None:
    """Raises `UsageError` unless every microbatch splits evenly over the devices that share a batch."""
    if config.batch_size % (shards * config.optimizer.accumulation):
        raise UsageError(
            f"batch_size {config.batch_size} does not split into {config.optimizer.accumulation} microbatches "
            f"over {shards} devices; use a multiple of {shards * config.optimizer.accumulation}"
        )


def local_rows(rows: NamedSharding, batch_size: int) -> list[int]:
    """The rows of a batch that lie on this process's devices, in order."""
    indices = rows.addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for (index,) in indices for row in range(batch_size)[index]})


def place(batch: dict[str, np.ndarray], rows: NamedSharding, batch_size: int) -> Batch:
    """A global batch on the devices, from the rows that this process loaded."""
    return {
        name: jax.make_array_from_process_local_data(rows, array, (batch_size, *array.shape[1:]))
        for name, array in batch.items()
    }


def place_whole(batch: dict[str, np.ndarray], rows: NamedSharding) -> Batch:
    """A batch that every process holds whole, on the devices; copied to each if it does not split evenly."""
    size = len(next(iter(batch.values())))
    sharding = replicated(rows.mesh) if size % shard_count(rows) else rows
    return {name: jax.make_array_from_callback(x.shape, sharding, x.__getitem__) for name, x in batch.items()}


def shard_count(rows: NamedSharding) -> int:
    """Into how many pieces a batch is split."""
    return math.prod(rows.mesh.shape[axis] for axis in mesh_axes(rows.spec[0]))


def on_host(tree: Any) -> Any:
    """A tree of arrays that may lie on many processes, whole on each as numpy."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.device_get(tree)


def anywhere(flag: bool) -> bool:
    """Whether the flag is set in any process; all of them must ask."""
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Ctrl-C or SIGTERM sets the event that this yields, so that a step can be finished; a second one acts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only there can signals be received
        yield event
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def interrupt(*_) -> None:
        restore()
        event.set()
        os.write(2, b"\nomni: this step is finished and saved first; once more stops at once\n")  # a log could deadlock

    for number in signals:
        signal.signal(number, interrupt)
    try:
        yield event
    finally:
        restore()
