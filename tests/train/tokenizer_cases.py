"""Tiny tokenizers and examples for the tests of their training."""

from dataclasses import dataclass

import grain
import numpy as np

from omni.data.examples import Examples
from omni.data.loader import stack
from omni.train.loop import TrainConfig
from omni.train.optimizer import OptimizerConfig
from omni.train.tokenizers import AudioTokenizerTask, ImageTokenizerTask, VideoTokenizerTask
from omni_tokenizers.audio import AudioTokenizerConfig
from omni_tokenizers.encodec import EncodecConfig
from omni_tokenizers.image import ImageTokenizerConfig
from omni_tokenizers.quantizers import LearnedQuantizerConfig, ResidualQuantizerConfig, VectorQuantizerConfig
from omni_tokenizers.video import VideoTokenizerConfig
from omni_tokenizers.vqgan import VQGANConfig

RATE = 8000


class Endless:
    """Examples by number."""

    def __init__(self, make, seed):
        self.make, self.seed = make, seed

    def __len__(self):
        return 1 << 62

    def __getitem__(self, index):
        return self.make(np.random.default_rng([self.seed, int(index)]))


@dataclass(frozen=True)
class Squares(Examples):
    """Pictures 16 x 16 of a square on a ground, in random colours."""

    def dataset(self, seed):
        return grain.MapDataset.source(Endless(square, seed))

    def held_out(self):
        return [stack([square(np.random.default_rng([99, index])) for index in range(6)])]


@dataclass(frozen=True)
class Moves(Examples):
    """Videos of five frames 16 x 16, of squares that move to the right."""

    def dataset(self, seed):
        return grain.MapDataset.source(Endless(move, seed))

    def held_out(self):
        return [stack([move(np.random.default_rng([99, index])) for index in range(6)])]


@dataclass(frozen=True)
class Tones(Examples):
    """Notes of an eighth of a second at 8 kHz, some of them shorter."""

    def dataset(self, seed):
        return grain.MapDataset.source(Endless(tone, seed))

    def held_out(self):
        return [stack([tone(np.random.default_rng([99, index])) for index in range(6)])]


def square(random):
    image = np.broadcast_to(random.integers(0, 256, 3), (16, 16, 3)).copy()
    row, column = random.integers(0, 8, 2)
    image[row : row + 8, column : column + 8] = random.integers(0, 256, 3)
    return {"image": image.astype(np.uint8)}


def move(random):
    ground = np.broadcast_to(random.integers(0, 256, 3), (5, 16, 16, 3)).copy()
    row, column, colour = *random.integers(0, 8, 2), random.integers(0, 256, 3)
    for frame in range(5):
        ground[frame, row : row + 8, column + frame : column + frame + 8] = colour
    return {"video": ground.astype(np.uint8)}


def tone(random):
    time = np.arange(RATE // 8) / RATE
    audio = sum(np.sin(2 * np.pi * random.uniform(100, 300) * harmonic * time) / harmonic for harmonic in (1, 2, 3))
    return {"audio": 0.3 * audio.astype(np.float32), "length": np.int32(random.integers(len(time) // 2, len(time) + 1))}


MOVING = VectorQuantizerConfig(codebook_size=16, dim=8, decay=0.9)
TASKS = {
    "image_vq": ImageTokenizerTask(
        Squares(), ImageTokenizerConfig(16, channels=16, multipliers=(1, 2), codebook_size=16, code_dim=8)
    ),
    "vqgan": ImageTokenizerTask(
        Squares(),
        VQGANConfig(
            *(32, (1, 1), 1, (), 32),
            image_size=16,
            quantizer=LearnedQuantizerConfig(codebook_size=16, dim=8, normalize="always"),
        ),
    ),
    "video": VideoTokenizerTask(Moves(), VideoTokenizerConfig(16, 4, 4, 16, (1,), 1, MOVING)),
    "audio_spectral": AudioTokenizerTask(
        Tones(),
        AudioTokenizerConfig(
            *(RATE, 80, 160, 20, 16),
            encoder_blocks=1,
            decoder_blocks=1,
            loss_windows=(128, 512),
            loss_mels=(10, 40),
            quantizer=ResidualQuantizerConfig(2, MOVING),
        ),
    ),
    "encodec": AudioTokenizerTask(
        Tones(),
        EncodecConfig(
            *(1, 4, 8, (4, 5, 8)),
            lstm_layers=1,
            sample_rate=RATE,
            quantizer=ResidualQuantizerConfig(2, MOVING, dropout=0.5),
        ),
    ),
}


def tokenizer_run(output, task, *, accumulation=1, ema_decay=0.9, **settings) -> TrainConfig:
    """A run of one of `TASKS` or of a variant of one."""
    settings = {"steps": 40, "batch_size": 8, "log_every": 10, "checkpoint_every": 20} | settings
    optimizer = OptimizerConfig(
        learning_rate=3e-3, warmup_steps=3, weight_decay=0.0, ema_decay=ema_decay, accumulation=accumulation
    )
    return TrainConfig(str(output), task, optimizer=optimizer, **settings)
