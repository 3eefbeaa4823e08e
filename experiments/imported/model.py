"""A model that `omni import` wrote, trained further on the shards of experiments/imported/tokens.py
(docs/checkpoints.md).

omni train experiments/imported/model.py
omni train experiments/imported/model.py --optimizer.frozen embedding "blocks.*norm*"
"""

from omni.model.files import read_config
from omni.train.language import TransformerTask
from omni.train.loop import TrainConfig
from omni.train.optimizer import OptimizerConfig

MODEL = "models/imported"

config = TrainConfig(
    "runs/imported/model",
    TransformerTask("runs/imported/tokens", read_config(MODEL), row_length=2048, held_out="runs/imported/held_out"),
    steps=2_000,
    batch_size=16,
    checkpoint_every=200,
    optimizer=OptimizerConfig(learning_rate=1e-5, weight_decay=0.0),
    start_from=MODEL,
)
