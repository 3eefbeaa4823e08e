"""Adapters (LoRA) of a model that `omni import` wrote, trained on the shards of experiments/imported/tokens.py
(docs/checkpoints.md).

omni train experiments/imported/adapters.py
omni train experiments/imported/adapters.py --task.lora.rank 16 --task.lora.matrices query value
omni train experiments/imported/adapters.py --task.lora.trained embedding
"""

from omni.model.files import read_config
from omni.model.lora import Lora
from omni.train.language import TransformerTask
from omni.train.loop import TrainConfig
from omni.train.optimizer import OptimizerConfig

MODEL = "models/imported"

config = TrainConfig(
    "runs/imported/adapters",
    TransformerTask(
        "runs/imported/tokens",
        read_config(MODEL),
        row_length=2048,
        held_out="runs/imported/held_out",
        lora=Lora(rank=8, alpha=16.0),
    ),
    steps=2_000,
    batch_size=16,
    checkpoint_every=200,
    optimizer=OptimizerConfig(learning_rate=2e-4, weight_decay=0.0),
    start_from=MODEL,
)
