"""A 7B model that learns with rows of 4,096 tokens and, in its last tenth, with rows of 32,768, on random documents.

omni compile experiments/pods/length_extension.py --topology v5p:4x4x4 --stage 2
omni train experiments/pods/length_extension.py --task.data gs://BUCKET/tokens --output gs://BUCKET/long --distributed
"""

import dataclasses

from omni.model.presets import PRESETS
from omni.train.language import TransformerTask
from omni.train.loop import TrainConfig
from omni.train.optimizer import OptimizerConfig
from omni.train.stages import Stage

model = dataclasses.replace(PRESETS["7b"], dropout=0.0, compute_dtype="bfloat16", rope_theta=500_000.0)
longer = {"task.row_length": 32_768, "batch_size": 64, "optimizer.learning_rate": 2e-5, "optimizer.warmup_steps": 200}
config = TrainConfig(
    "runs/length_extension",
    TransformerTask("random", model, row_length=4096, z_loss=1e-5),
    steps=100_000,
    batch_size=512,
    optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=4000, weight_decay=0.1),
    stages=(Stage(90_000), Stage(10_000, longer)),
    recipe=True,
)
