"""Stages: parts of one run, each with settings of its own, such as another mixture, longer rows, frozen parameters."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

from omni.train.program import Program
from omni.train.run_directory import differences, to_json
from omni_tokenizers.errors import UsageError

if TYPE_CHECKING:
    from omni.train.loop import TrainConfig

CHANGEABLE = ("task", "batch_size", "optimizer")
_SCHEDULE = {"learning_rate", "final_learning_rate", "warmup_steps", "schedule", "decay_share"}
_FIXED = ("name", "ema_decay")


@dataclass(frozen=True)
class Stage:
    """A part of a run; the next stage goes on with its parameters, moments and step numbers.

    A stage that changes nothing of the schedule goes on in the run's, which spans all stages. One that changes any of
    the optimizer's `learning_rate`, `final_learning_rate`, `warmup_steps`, `schedule` and `decay_share` has a schedule
    of its own, from its first step to its last.
    """

    steps: int
    """Its length."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Settings that differ from the run's, by their names on the command line: `batch_size`, and those that begin with
    `task.` or `optimizer.`, such as `task.data`, `task.row_length`, `optimizer.frozen`."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"a stage has {self.steps} steps; it must have at least 1")
        for name in self.changes:
            if name.partition(".")[0] not in CHANGEABLE:
                raise UsageError(
                    f"a stage changes {name!r}; what can change are batch_size and settings that begin with task. or "
                    "optimizer."
                )


@dataclass(frozen=True)
class Leg:
    """A stage as it is run; of a run without stages, all of it."""

    config: TrainConfig
    """The run's, with the stage's changes."""
    before: int
    """Steps of the stages before."""
    last: int
    """Number of its last step."""
    schedule: range
    """Steps over which the schedule of the learning rate runs."""


def legs(config: TrainConfig) -> list[Leg]:
    """The stages of a run in order.

    Raises:
      UsageError: the stages have not as many steps as the run, change what does not exist, or what cannot change.
    """
    if config.stages is None:
        return [Leg(config, 0, config.steps, range(config.steps))]
    lengths = [stage.steps for stage in config.stages]
    if sum(lengths) != config.steps:
        raise UsageError(
            f"steps is {config.steps}, but the stages have {' + '.join(map(str, lengths)) or 0} = {sum(lengths)}; "
            "set steps to that"
        )
    if config.task.adversary is not None:
        raise UsageError("a run with an adversary has no stages; train one run after another with start_from")
    ends, found = [0, *itertools.accumulate(lengths)], []
    for number, (stage, (before, last)) in enumerate(zip(config.stages, itertools.pairwise(ends), strict=True), 1):
        own = dataclasses.replace(config, stages=None)
        for name, value in stage.changes.items():
            own = _changed(own, name.split("."), value, f"stage {number} changes {name!r}")
        for name in _FIXED:
            if getattr(own.optimizer, name) != getattr(config.optimizer, name):
                raise UsageError(f"stage {number} changes optimizer.{name}, which is one for all stages")
        of_its_own = any(name.rpartition(".")[2] in _SCHEDULE or name == "optimizer" for name in stage.changes)
        found.append(Leg(own, before, last, range(before, last) if of_its_own else range(config.steps)))
    return found


def of_stage(config: TrainConfig, number: int) -> TrainConfig:
    """The run as one of its stages has it, counted from 1; `UsageError` if there is none of that number."""
    stages = legs(config)
    if not 1 <= number <= len(stages):
        raise UsageError(f"there is no stage {number}; the run has {len(stages)}")
    return stages[number - 1].config


def programs(config: TrainConfig, devices: Sequence[jax.Device] | None = None) -> list[tuple[Leg, Program]]:
    """The stages of a run, each with what it compiles.

    Raises:
      UsageError: as `legs` and `Program`, by the number of the stage; stages have different nets or vocabularies.
    """
    found = []
    for number, leg in enumerate(legs(config), 1):
        try:
            found.append((leg, Program(leg.config, devices, leg.schedule)))
            _check_same(found[0], found[-1])
        except UsageError as error:
            raise error if config.stages is None else UsageError(f"stage {number}: {error}") from None
    return found


def _check_same(one: tuple[Leg, Program], other: tuple[Leg, Program]) -> None:
    shapes = ({name: variable.get_value().shape for name, variable in _variables(each)} for _, each in (one, other))
    if next(shapes) != next(shapes):
        raise UsageError("its net has other parameters than that of the first stage; all stages train one net")
    adapters = (to_json(getattr(leg.config.task, "lora", None)) for leg, _ in (other, one))
    if lines := differences(*adapters, "task.lora"):
        raise UsageError(f"it changes the adapters ({'; '.join(lines)}); all stages train those of the first")
    if one is not other and (lines := differences(other[0].config.task.metadata(), one[0].config.task.metadata())):
        raise UsageError(f"its data has another vocabulary or grammar than the first stage's ({'; '.join(lines)})")


def _variables(program: Program) -> list[tuple[tuple, nnx.Variable]]:
    return nnx.to_flat_state(program.shapes.params)


def _changed(config: Any, path: list[str], value: Any, what: str) -> Any:
    """The configuration with one setting, named by its path, that has another value."""
    name, *rest = path
    names = [each.name for each in dataclasses.fields(config)] if dataclasses.is_dataclass(config) else []
    if name not in names:
        nearest = difflib.get_close_matches(name, names, 1, 0)
        hint = f"; the nearest there is {nearest[0]!r}" if nearest else ""
        raise UsageError(f"{what}: there is no setting {name!r}{hint}")
    return dataclasses.replace(config, **{name: _changed(getattr(config, name), rest, value, what) if rest else value})
