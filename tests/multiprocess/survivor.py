"""One process of a run that is disturbed: survivor.py OUTPUT [key=value ...] [-- COORDINATOR PROCESSES PROCESS].

`hang=PROCESS:STEP` lets one process wait for ever for the batch of a step.
"""

import ast
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

import grain
import jax
import jax.numpy as jnp
from training_cases import language

from omni.exits import exits
from omni.train.distributed import initialize
from omni.train.language import TransformerTask
from omni.train.loop import train


class Slow:
    """Rows that take their time, from one of them on all of it."""

    def __init__(self, rows, ends: int | None):
        self.rows, self.ends = rows, ends

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index: int):
        time.sleep(1e6 if self.ends is not None and index >= self.ends else 0.01)
        return self.rows[index]


@dataclass(frozen=True)
class Watched(TransformerTask):
    """Logs what stands in which row of a batch."""

    def loss(self, model, batch, key, *, training):
        total, weight, metrics = super().loss(model, batch, key, training=training)
        places = jnp.arange(batch["ids"].size).reshape(batch["ids"].shape) % 101
        return total, weight, metrics | {"order": (jnp.sum(places * batch["ids"]), jnp.ones(()))}

    def dataset(self, seed):
        process, _, step = HANG.partition(":")
        ends = config.batch_size * (int(step) - 1) if process == str(jax.process_index()) else None
        return grain.MapDataset.source(Slow(super().dataset(seed), ends))


own, _, others = " ".join(sys.argv[1:]).partition(" -- ")
output, *settings = own.split()
settings = dict(setting.split("=", 1) for setting in settings)
HANG = settings.pop("hang", "")
if others:
    coordinator, processes, process = others.split()
    initialize(coordinator, int(processes), int(process))
config = language(output, **{key: ast.literal_eval(value) for key, value in settings.items()})
task = Watched(**{name: getattr(config.task, name) for name in config.task.__dataclass_fields__})
with exits():
    train(replace(config, task=task))
