"""The image tokenizer of a model of one's own documents: 64 x 64 pixels as 8 x 8 codes (docs/own_data.md).

omni tokenizer train experiments/own/image.py --task.data.files.directory my/train
"""

from omni.data.files import Files, PictureFiles
from omni.train.loop import TrainConfig
from omni.train.optimizer import OptimizerConfig
from omni.train.tokenizers import ImageTokenizerTask
from omni_tokenizers.image import ImageTokenizerConfig

config = TrainConfig(
    "runs/own/image",
    ImageTokenizerTask(
        PictureFiles(Files("my/train"), size=64),
        ImageTokenizerConfig(image_size=64, channels=128, residual_blocks=2, codebook_size=1024),
    ),
    steps=20_000,
    batch_size=64,
    checkpoint_every=1_000,
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=500, ema_decay=0.999),
)
