"""Twenty steps of an imported model on eight devices of this process: going_on_worker.py DIRECTORY."""

import sys

from omni.model.files import read_config
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


if __name__ == "__main__":
    train(config_of(sys.argv[1], MeshConfig(fsdp=4, tensor=2)))
