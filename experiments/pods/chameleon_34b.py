r"""Chameleon's 34B shape on 256 chips of a v5p, on random documents: put your shards in `task.data`.

omni compile experiments/pods/chameleon_34b.py --topology v5p:4x8x8
omni train experiments/pods/chameleon_34b.py --task.data gs://BUCKET/tokens \
  --output gs://BUCKET/runs/chameleon_34b --distributed
"""

import dataclasses

from omni.model.presets import PRESETS
from omni.sharding import MeshConfig
from omni.train.language import TransformerTask
from omni.train.loop import TrainConfig
from omni.train.optimizer import OptimizerConfig

model = dataclasses.replace(
    PRESETS["34b"],
    dropout=0.0,
    compute_dtype="bfloat16",
    attention="splash",
    remat="blocks",
    saved=("query", "key", "value", "attention", "attention_output", "gate", "up"),
)
config = TrainConfig(
    "runs/chameleon_34b",
    TransformerTask("random", model, row_length=4096, z_loss=1e-5),
    steps=100_000,
    batch_size=512,
    mesh=MeshConfig(data=1, fsdp=-1),
    optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=4000, weight_decay=0.1),
)
