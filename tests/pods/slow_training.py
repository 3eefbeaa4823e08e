"""A small transformer on data that takes its time, so that there is a middle of a run to be preempted in."""

import dataclasses
import time

from training_cases import language

from omni.train.language import TransformerTask
from omni.train.loop import TrainConfig


class SlowTransformer(TransformerTask):
    """Waits for every row."""

    def dataset(self, seed: int):
        return super().dataset(seed).map(_slowly)


def _slowly(row):
    time.sleep(0.02)
    return row


def slow(output) -> TrainConfig:
    """A run; its shards are written beside the output, on first use."""
    config = language(output, steps=100, checkpoint_every=5, log_every=1)
    task = SlowTransformer(**{each.name: getattr(config.task, each.name) for each in dataclasses.fields(config.task)})
    return dataclasses.replace(config, task=task)
