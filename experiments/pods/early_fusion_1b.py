r"""The 1B shape on two slices of 16 chips of a v6e: parameters lie whole in each slice, gradients meet between them.

omni compile experiments/pods/early_fusion_1b.py --topology v6e:4x4 --slices 2
omni train experiments/pods/early_fusion_1b.py --task.data gs://BUCKET/tokens \
  --output gs://BUCKET/runs/early_fusion_1b --distributed
"""

import dataclasses

from omni.model.presets import PRESETS
from omni.sharding import MeshConfig
from omni.train.language import TransformerTask
from omni.train.loop import TrainConfig
from omni.train.optimizer import OptimizerConfig

model = dataclasses.replace(
    PRESETS["1b"],
    dropout=0.0,
    compute_dtype="bfloat16",
    attention="splash",
    remat="blocks",
    saved=("query", "key", "value", "attention", "attention_output", "gate", "up"),
)
config = TrainConfig(
    "runs/early_fusion_1b",
    TransformerTask("random", model, row_length=4096, z_loss=1e-5),
    steps=100_000,
    batch_size=128,
    mesh=MeshConfig(slice=2, data=1, fsdp=-1),
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=4000, weight_decay=0.1),
)
