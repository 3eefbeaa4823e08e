"""The audio codec of a model of one's own documents: 16 kHz, 25 frames of 4 codes a second (docs/own_data.md).

omni tokenizer train experiments/own/audio.py --task.data.files.directory my/train
"""

from omni.data.files import Files, SoundFiles
from omni.train.loop import TrainConfig
from omni.train.optimizer import OptimizerConfig
from omni.train.tokenizers import AudioTokenizerTask
from omni_tokenizers.audio import AudioTokenizerConfig

config = TrainConfig(
    "runs/own/audio",
    AudioTokenizerTask(
        SoundFiles(Files("my/train"), sample_rate=16000, samples=16000),
        AudioTokenizerConfig(dim=256, codebooks=4, codebook_size=512),
    ),
    steps=20_000,
    batch_size=32,
    checkpoint_every=1_000,
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=500, ema_decay=0.999),
)
