"""A published run, to check what `omni compile` predicts: 32B on a v5p-128, 71.5 % MFU
(AI-Hypercomputer/maxtext, MaxText/configs/v5p/32b.sh and README.md). Its remat_policy "minimal" keeps every product;
here keys are computed anew, without which 0.2 of 95.7 GiB are missing.

omni compile experiments/published/v5p_32b.py --topology v5p:4x4x4
"""

from omni.model.config import TransformerConfig
from omni.sharding import MeshConfig
from omni.train.language import TransformerTask
from omni.train.loop import TrainConfig

model = TransformerConfig(
    vocabulary_size=32000,
    depth=32,
    dim=8192,
    heads=64,
    key_value_heads=64,
    head_dim=128,
    mlp_dim=28672,
    qk_norm="none",
    tied_embeddings=False,
    compute_dtype="bfloat16",
    attention="splash",
    remat="blocks",
    saved=("query", "value", "attention_output", "gate", "up", "mlp_output"),
)
config = TrainConfig(
    "runs/v5p_32b",
    TransformerTask("random", model, row_length=2048),
    steps=30,
    batch_size=448,
    mesh=MeshConfig(data=1, fsdp=-1, tensor=4),
)
