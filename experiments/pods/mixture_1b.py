r"""The 1B shape with eight experts a block, two for each token, on 64 chips of a v5p.

omni compile experiments/pods/mixture_1b.py --topology v5p:4x4x4
omni train experiments/pods/mixture_1b.py --task.data gs://BUCKET/tokens \
  --output gs://BUCKET/runs/mixture_1b --distributed
"""

import dataclasses

from omni.model.presets import PRESETS
from omni.sharding import MeshConfig
from omni.train.language import TransformerTask
from omni.train.loop import TrainConfig
from omni.train.optimizer import OptimizerConfig

model = dataclasses.replace(
    PRESETS["1b"],
    experts=8,
    experts_per_token=2,
    dropout=0.0,
    compute_dtype="bfloat16",
    attention="splash",
    remat="blocks",
    saved=("query", "key", "value", "attention", "attention_output"),
)
config = TrainConfig(
    "runs/mixture_1b",
    TransformerTask("random", model, row_length=4096, z_loss=1e-5),
    steps=100_000,
    batch_size=256,
    mesh=MeshConfig(data=1, fsdp=-1, expert=8),
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=4000, weight_decay=0.1),
)
