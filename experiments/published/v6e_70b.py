"""A published run, to check what `omni compile` predicts: Llama 2 70B on a v6e-256, 50 % MFU
(AI-Hypercomputer/maxtext, benchmarks/maxtext_trillium_model_configs.py).

omni compile experiments/published/v6e_70b.py --topology v6e:16x16
"""

from omni.model.config import TransformerConfig
from omni.sharding import MeshConfig
from omni.train.language import TransformerTask
from omni.train.loop import TrainConfig

model = TransformerConfig(
    vocabulary_size=32000,
    depth=80,
    dim=8192,
    heads=64,
    key_value_heads=8,
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
    "runs/v6e_70b",
    TransformerTask("random", model, row_length=4096),
    steps=30,
    batch_size=1024,
    mesh=MeshConfig(data=1, fsdp=-1),
)
