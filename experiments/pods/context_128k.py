r"""Chameleon's 7B shape with rows of 131,072 tokens, each split over 16 of the 64 chips of a v5p.

omni compile experiments/pods/context_128k.py --topology v5p:4x4x4
omni train experiments/pods/context_128k.py --task.data gs://BUCKET/tokens \
  --output gs://BUCKET/runs/context_128k --distributed
"""

import dataclasses

from omni.model.presets import PRESETS
from omni.sharding import MeshConfig
from omni.train.language import TransformerTask
from omni.train.loop import TrainConfig
from omni.train.optimizer import OptimizerConfig

model = dataclasses.replace(
    PRESETS["7b"],
    rope_theta=1_000_000.0,
    dropout=0.0,
    compute_dtype="bfloat16",
    attention="splash",
    remat="blocks",
    saved=("query", "key", "value", "attention", "attention_output", "gate", "up"),
)
config = TrainConfig(
    "runs/context_128k",
    TransformerTask("random", model, row_length=131_072, z_loss=1e-5),
    steps=100_000,
    batch_size=4,
    mesh=MeshConfig(data=1, fsdp=-1, context=16),
    optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=4000, weight_decay=0.1),
)
