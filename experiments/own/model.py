"""A model of one's own documents, from the shards that `experiments/own/tokens.py` writes (docs/own_data.md).

omni train experiments/own/model.py
"""

from omni.data.shards import read_grammar
from omni.model.config import TransformerConfig
from omni.train.language import TransformerTask
from omni.train.loop import TrainConfig
from omni.train.optimizer import OptimizerConfig

tokens = "runs/own/tokens"
config = TrainConfig(
    "runs/own/model",
    TransformerTask(
        tokens,
        TransformerConfig(
            vocabulary_size=read_grammar(tokens).vocabulary.size,
            depth=12,
            dim=512,
            heads=8,
            key_value_heads=8,
            head_dim=64,
            mlp_dim=1408,
        ),
        row_length=2048,
        context_weight=0.1,
        codebook_share=0.9,
        held_out="runs/own/held_out",
    ),
    steps=50_000,
    batch_size=16,
    checkpoint_every=1_000,
    optimizer=OptimizerConfig(name="muon", learning_rate=3e-3, weight_decay=0.1, ema_decay=0.999),
)
