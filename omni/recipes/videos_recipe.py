"""The small video tokenizer of camera moves over the photos."""

from __future__ import annotations

from omni.recipes.videos import CameraMoves
from omni.train.loop import TrainConfig
from omni.train.optimizer import OptimizerConfig
from omni.train.tokenizers import VideoTokenizerTask
from omni_tokenizers.losses.image import ImageLosses
from omni_tokenizers.quantizers import VectorQuantizerConfig
from omni_tokenizers.video import VideoTokenizerConfig

FRAMES = 9  # of a training video: three frames of codes


def videos_training(output: str, steps: int = 3000) -> TrainConfig:
    """128 x 128 pixels as 16 x 16 codes of 10 bits, for the first frame and then for every four; the loss is the
    squared error alone, as PSNR is what is measured."""
    tokenizer = VideoTokenizerConfig(quantizer=VectorQuantizerConfig(codebook_size=1024, dim=16, decay=0.95))
    losses = ImageLosses(absolute=0.0)
    return TrainConfig(
        output,
        VideoTokenizerTask(CameraMoves(tokenizer.image_size, FRAMES), tokenizer, losses),
        steps=steps,
        batch_size=8,
        optimizer=OptimizerConfig(
            name="muon", learning_rate=6e-3, final_learning_rate=0.02, weight_decay=0.0, ema_decay=0.99
        ),
    )
