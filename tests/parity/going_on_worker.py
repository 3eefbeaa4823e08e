"""Steps of an imported model on eight devices of this process: going_on_worker.py DIRECTORY [adapters]."""

import dataclasses
import sys

from omni.model.files import read_config
from omni.model.lora import Lora
from omni.sharding import MeshConfig
from omni.train.language import TransformerTask
from omni.train.loop import TrainConfig, train
from omni.train.optimizer import OptimizerConfig

STEPS, ROWS, LENGTH, RATE = 20, 8, 64, 1e-3


def config_of(directory: str, mesh: MeshConfig) -> TrainConfig:
    """The run in a directory that holds a model and its tokens."""
    model = f"{directory}/model"
    return TrainConfig(
        f"{directory}/run",
        TransformerTask(f"{directory}/tokens", read_config(model), row_length=LENGTH, z_loss=0.0),
        steps=STEPS,
        batch_size=ROWS,
        log_every=1,
        checkpoint_every=STEPS,
        mesh=mesh,
        optimizer=OptimizerConfig(
            learning_rate=RATE, warmup_steps=0, schedule="constant", weight_decay=0.0, clip_norm=0.0
        ),
        start_from=model,
    )


def on_adapters(config: TrainConfig) -> TrainConfig:
    """The run with adapters of all matrices, which are trained with the embedding alone, ten steps of ten times the
    rate, in two microbatches."""
    task = dataclasses.replace(config.task, lora=Lora(rank=3, alpha=6.0, trained=("embedding",)))
    optimizer = dataclasses.replace(config.optimizer, learning_rate=10 * RATE, accumulation=2)
    return dataclasses.replace(config, task=task, optimizer=optimizer, steps=10)


if __name__ == "__main__":
    directory, *adapters = sys.argv[1:]
    config = config_of(directory, MeshConfig(fsdp=4, tensor=2))
    train(on_adapters(config) if adapters else config)
