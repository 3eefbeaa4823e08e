"""What trains the two tokenizers of the digits recipe: their nets on augmented training scans and clips."""

from __future__ import annotations

from dataclasses import dataclass, field

import grain
from etils import epath
from flax import nnx

from omni.recipes import digits_data
from omni.train.task import Task
from omni_tokenizers.audio import AudioTokenizer, AudioTokenizerConfig, SpectralCodec
from omni_tokenizers.image import ImageTokenizer, ImageTokenizerConfig, ImageVQ


@dataclass(frozen=True)
class DigitScansTask(Task):
    """An image tokenizer on augmented handwritten digits."""

    data: str
    """Directory written by `digits_data.prepare`."""
    tokenizer: ImageTokenizerConfig = field(default_factory=ImageTokenizerConfig)
    """The net."""

    def build(self, rngs: nnx.Rngs) -> ImageVQ:
        return ImageVQ(self.tokenizer, rngs=rngs)

    def loss(self, model, batch, key, *, training):
        return model.loss(batch, key, training=training)

    def dataset(self, seed: int) -> grain.MapDataset:
        return digits_data.scan_dataset(self.data, seed)

    def save(self, model: nnx.Module, directory: epath.Path) -> None:
        ImageTokenizer(self.tokenizer, model).save(directory)


@dataclass(frozen=True)
class SpokenDigitsTask(Task):
    """An audio codec on augmented spoken digits."""

    data: str
    """Directory written by `digits_data.prepare`."""
    tokenizer: AudioTokenizerConfig = field(default_factory=AudioTokenizerConfig)
    """The net."""

    def build(self, rngs: nnx.Rngs) -> SpectralCodec:
        return SpectralCodec(self.tokenizer, rngs=rngs)

    def loss(self, model, batch, key, *, training):
        return model.loss(batch, key, training=training)

    def dataset(self, seed: int) -> grain.MapDataset:
        return digits_data.speech_dataset(self.data, seed)

    def save(self, model: nnx.Module, directory: epath.Path) -> None:
        AudioTokenizer(self.tokenizer, model).save(directory)
