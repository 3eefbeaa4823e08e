"""A published run, to check what `omni compile` predicts: 16B on a v5e-256, 61.1 % MFU
(AI-Hypercomputer/maxtext, MaxText/configs/v5e/16b.sh and README.md).

omni compile experiments/published/v5e_16b.py --topology v5e:16x16
"""

from omni.model.config import TransformerConfig
from omni.sharding import MeshConfig
from omni.train.language import TransformerTask
from omni.train.loop import TrainConfig

model = TransformerConfig(
    vocabulary_size=32000,
    depth=32,
    dim=4096,
    heads=64,
    key_value_heads=64,
    head_dim=128,
    mlp_dim=28672,
    qk_norm="none",
    tied_embeddings=False,
    compute_dtype="bfloat16",
    attention="splash",
    remat="blocks",
    saved=(),
)
config = TrainConfig(
    "runs/v5e_16b",
    TransformerTask("random", model, row_length=2048),
    steps=30,
    batch_size=1536,
    mesh=MeshConfig(data=1, fsdp=-1),
)
