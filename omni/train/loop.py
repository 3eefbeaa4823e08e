"""The train loop, for whatever is a `Task`; it reads from top to bottom."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from tqdm import tqdm

from omni.data.loader import batches
from omni.sharding import MeshConfig, activations_on
from omni.train import run_directory
from omni.train.checkpoints import Checkpoints
from omni.train.flight import FlightRecorder, Profile, profile_steps, speed
from omni.train.lost import RollCall
from omni.train.metrics import MetricsLog, Window, mean
from omni.train.optimizer import OptimizerConfig
from omni.train.page import Page
from omni.train.placement import local_rows, on_host, place, place_whole
from omni.train.program import Program
from omni.train.skipping import SkipConfig, SkippedSteps
from omni.train.stages import Leg, Stage, legs, programs
from omni.train.starting import start_from
from omni.train.step import TrainState
from omni.train.stopping import interruptible, stopped
from omni.train.task import Task
from omni_tokenizers.errors import UsageError

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
    keep_best: str | None = None
    """A metric, e.g. held_out/loss: the checkpoint in which it was lowest stays besides the newest."""
    start_from: str | None = None
    """Directory of another run or of a model, whose parameters take the place of fresh ones."""
    start_names: tuple[str, ...] | None = None
    """Which of them, by patterns such as `blocks.*`; None: all that have the same name and shape."""
    skip: SkipConfig = field(default_factory=SkipConfig)
    """Steps that change nothing, as their loss or gradient is no number, and how many are too many."""
    lost_after: int = 50
    """Seconds after which a process that hangs or is lost ends the others, which name it."""
    profile: str | None = None
    """First and last of the steps that are traced for xprof, e.g. 10:15."""
    wandb: str | None = None
    """Project of Weights & Biases that is told the metrics, too."""
    stages: tuple[Stage, ...] | None = None
    """Parts of the run with settings of their own, in order, as many steps together as the run; None: all alike."""
    recipe: bool = False
    """Takes mesh, recomputation and attention from the table of `omni.machines` for the devices that there are."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "checkpoint_every", "keep", "lost_after"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.profile is not None:
            profile_steps(self.profile)
        if self.start_names is not None and self.start_from is None:
            raise UsageError("start_names is set, but start_from names no run to take parameters from")
        if self.start_from is None and self.task.trained() != ("*",):
            raise UsageError("the task trains a few parameters of a net that stays; name it with start_from")
        adversary = self.task.adversary
        if adversary is not None and adversary.start >= self.steps:
            raise UsageError(
                f"the adversary's start is {adversary.start}, which a run of {self.steps} steps never reaches; "
                "set task.adversary.start below steps"
            )
        legs(self)
        if self.recipe and self.mesh != MeshConfig():
            raise UsageError("recipe is set and mesh, too, which it would choose; leave one of them out")

    def run(self) -> None:
        """Trains."""
        train(self)


def train(config: TrainConfig) -> TrainState | None:
    """Runs, or goes on with, a training run until its last step; returns the final state, None if it was done before.

    The same configuration gives the same bits, however often it was interrupted.

    Raises:
      OmniError: the output holds another run, too many steps were skipped, a checkpoint cannot be written.
      UsageError: mesh, batch size and microbatches do not fit, settings name what is not there.
      KeyboardInterrupt: after Ctrl-C, when the checkpoint is written; `omni.exits.Terminated` after SIGTERM.
    """
    with RollCall(config.lost_after) as roll_call:
        return run(config, roll_call)


def run(config: TrainConfig, roll_call: RollCall) -> TrainState | None:
    """As `train`."""
    output, first = epath.Path(config.output), jax.process_index() == 0
    flight = FlightRecorder()
    with flight.spending("start"):
        if is_finished(config, output):
            return None
        stages = programs(config)
        checkpoints = Checkpoints(output, config.keep, config.task.metadata(), config.keep_best)
        state, position = restore_or_start(config, stages, checkpoints)
        start = int(state.step)
        stage = RunningStage(stages, number_of(stages, start))
    if "iterator" in position:
        stage.data.set_state(position["iterator"])
    skipped = SkippedSteps(**position.get("skipped", {}))
    usual = () if config.skip.spike is None else (jnp.float32(position.get("usual_loss", np.nan)),)

    recent, window, since = [], Window(**position.get("window", {})), time.monotonic()
    compiling_until, saved = start + 2, False
    log = MetricsLog(output if first else None, start, config.wandb)
    progress, profile = make_progress(config, start), Profile(config.profile if first else None, output)
    with (
        activations_on(stage.program.mesh, stage.program.rules),
        checkpoints,
        log,
        progress,
        profile,
        interruptible() as received,
        roll_call.guarded(),  # innermost: to close the others is to wait for a process that may be lost
    ):
        for step in range(start + 1, config.steps + 1):
            if step > stage.leg.last:
                with flight.spending("start"):
                    stage.data.close()
                    before, stage = stage, RunningStage(stages, stage.number + 1)
                    state = stage.program.take_over(state, before.program)
                compiling_until, saved = step + 1, False
            with flight.spending("data"):
                batch = place(next(stage.data), stage.program.rows, stage.leg.config.batch_size)
            adversary = config.task.adversary
            adversarial = adversary is not None and step > adversary.start
            if adversarial and step == adversary.start + 1:
                compiling_until = step + 1
            signal = roll_call.before(step, received.number, compiling=step <= compiling_until)
            profile.before(step)
            compiling = flight.spending("start", counts=step in (start + 1, stage.leg.before + 1))
            with compiling, jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = stage.program.train_step(adversarial)(state, batch, *usual)
            usual = usual and (metrics["usual_loss"][0],)
            recent.append(metrics)
            if len(recent) > 2:
                jax.block_until_ready(recent[-3])  # the host stays at most two steps ahead
            profile.after(step, metrics)
            progress.update()

            due = step % config.log_every == 0 or step == stage.leg.last
            if jax.process_count() == 1:
                signal = received.number  # it may have come during the step
            save = step % config.checkpoint_every == 0 or step == stage.leg.last
            if not (save or due or signal is not None):
                continue
            window.add(skipped.sift(step, jax.device_get(recent)))
            window.steps, window.seconds = window.steps + len(recent), window.seconds + time.monotonic() - since
            recent = []
            values = window.mean()
            values |= {"skipped_steps": skipped.total, "steps_per_second": window.steps / window.seconds}
            values |= {} if config.stages is None else {"stage": stage.number + 1}
            save |= skipped.too_many(config.skip)
            logged = save or due  # and not because of a signal, so that the log is that of a run without one
            save |= signal is not None
            if save and stage.validation:
                with flight.spending("evaluation"):
                    values |= held_out(stage.program, state, stage.validation)
            if logged:
                log.write(step, values | flight.values() | stage.speed(values["steps_per_second"]))
                window = Window()
            progress.set_postfix(loss=f"{values.get('loss', np.nan):.4g}", refresh=False)
            since = time.monotonic()
            if not save:
                continue
            if not saved:  # what measures and shows is compiled, too
                compiling_until, saved = max(compiling_until, step + 1), True
            with flight.spending("checkpoint"):
                log.publish()
                position = {"iterator": stage.data.get_state(), "skipped": skipped.to_json()}
                position |= {"usual_loss": float(*usual)} if usual else {}
                position |= {"window": window.to_json()} if window.steps else {}
                checkpoints.save(state, position, values)
            if stage.gallery:
                with flight.spending("evaluation"):
                    stage.show(step, state)
            if signal is not None or skipped.too_many(config.skip):
                checkpoints.wait()
                raise stopped(signal, output, step) if signal else skipped.failure(output)
        checkpoints.wait()
    write_result(*stages[-1], state)
    return state


class RunningStage:
    """A stage while it runs: its program, data, and what measures and shows."""

    def __init__(self, stages: list[tuple[Leg, Program]], number: int):
        (self.leg, self.program), self.number = stages[number], number
        config, task = self.leg.config, self.leg.config.task
        before = [(leg.config.task, leg.config.batch_size * (leg.last - leg.before)) for leg, _ in stages[:number]]
        examples = task.next_dataset(config.seed, before) if before else task.dataset(config.seed)
        self.data = iter(batches(examples, config.batch_size, local_rows(self.program.rows, config.batch_size)))
        self.validation, self.gallery, self._work = task.validation(), task.gallery(), task.work()
        if self.gallery:
            self._page = Page(epath.Path(config.output), self.gallery, averaged=config.optimizer.ema_decay > 0)
            self._gallery_step = self.program.gallery_step(self.gallery)

    def speed(self, steps_per_second: float) -> dict[str, float]:
        """Metrics; see `omni.train.flight.speed`."""
        return speed(self._work, self.leg.config.batch_size, steps_per_second)

    def show(self, step: int, state: TrainState) -> None:
        """Adds what is made of the gallery to the run's page, in the first process."""
        made = np.asarray(self._gallery_step(state, place_whole(self.gallery.batch, self.program.rows)))
        if jax.process_index() == 0:
            self._page.add(step, made)


def number_of(stages: list[tuple[Leg, Program]], step: int) -> int:
    """Which stage takes this step, from 0; the first one is at its beginning at step 0."""
    return next(number for number, (leg, _) in enumerate(stages) if step <= leg.last)


def is_finished(config: TrainConfig, output: epath.Path) -> bool:
    """Claims the output for a run; whether it holds the finished run already.

    Raises:
      OmniError: it holds another run.
      UsageError: it holds a longer one.
    """
    run_directory.claim(output, run_directory.to_json(config), write=jax.process_index() == 0)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"claimed {output}")
    finished = run_directory.finished_steps(output)
    if finished > config.steps:
        raise UsageError(f"{output} was finished after {finished} steps; steps is {config.steps}")
    if finished == config.steps:
        logger.info("%s: finished before", output)
    return finished == config.steps


def restore_or_start(
    config: TrainConfig, stages: list[tuple[Leg, Program]], checkpoints: Checkpoints
) -> tuple[TrainState, dict[str, Any]]:
    """The state with which a run goes on, or a fresh one, and what was saved beside it (of a fresh one nothing)."""
    step = checkpoints.newest_whole()
    if step is None:
        state = stages[0][1].start()
        if config.start_from is not None:
            trained = stages[0][0].config.task.trained()
            state = start_from(state, config.start_from, config.start_names or ("*",), trained)
        return state, {}
    if step > config.steps:
        raise UsageError(f"{config.output} is at step {step} already; steps is {config.steps}")
    state, position = checkpoints.restore(stages[number_of(stages, step)][1].shapes, step)
    logger.info("%s: goes on from step %d", config.output, step)
    return state, position if "iterator" in position else {"iterator": position}  # as it was saved at first


def make_progress(config: TrainConfig, start: int) -> tqdm:
    """The progress bar of a run, in its first process, where the environment has no TQDM_DISABLE."""
    others = {} if jax.process_index() == 0 else {"disable": True}
    return tqdm(
        total=config.steps,
        initial=start,
        desc=epath.Path(config.output).name,
        unit="step",
        mininterval=0.2 if sys.stderr.isatty() else 10,
        **others,
    )


def held_out(program: Program, state: TrainState, batches: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """Metrics of held-out batches."""
    measured = [program.validation_step(state, place_whole(batch, program.rows)) for batch in batches]
    return {f"held_out/{name}": value for name, value in mean(jax.device_get(measured)).items()}


def write_result(leg: Leg, program: Program, state: TrainState) -> None:
    """Writes what the finished net is used from, and the mark that the run is finished."""
    config = leg.config
    output = epath.Path(config.output)
    params, rest = on_host((state.ema or state.params, state.rest))
    if jax.process_index() == 0:
        with run_directory.writing(output):
            config.task.save(nnx.merge(program.graphdef, params, rest), output)
        run_directory.write_json(output / run_directory.FINISHED, {"steps": config.steps})
