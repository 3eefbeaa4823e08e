"""What trains tokenizers of pictures and of sound, whichever net and quantiser they have, on whichever examples."""

from __future__ import annotations

from dataclasses import dataclass

import grain
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from omni.data.examples import Examples
from omni.train.task import Batch, Sum, Task
from omni_tokenizers.audio import AudioTokenizer, AudioTokenizerConfig
from omni_tokenizers.base import NetTokenizer
from omni_tokenizers.image import ImageTokenizer, ImageTokenizerConfig, normalized
from omni_tokenizers.losses.audio import AudioLosses
from omni_tokenizers.losses.image import ImageLosses
from omni_tokenizers.waveform import whole_frames

IMAGE_TOKENIZERS: tuple[type[NetTokenizer], ...] = (ImageTokenizer,)
AUDIO_TOKENIZERS: tuple[type[NetTokenizer], ...] = (AudioTokenizer,)


class TokenizerTask(Task):
    """What the two tasks share: a net that its tokenizer's configuration describes, and its examples."""

    data: Examples
    tokenizer: object
    tokenizers: tuple[type[NetTokenizer], ...]
    """The classes that this task can train."""

    @property
    def tokenizer_class(self) -> type[NetTokenizer]:
        """The class whose configuration is given."""
        return next(each for each in self.tokenizers if each.config_class is type(self.tokenizer))

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        return self.tokenizer_class.net_class(self.tokenizer, rngs=rngs)

    def dataset(self, seed: int) -> grain.MapDataset:
        return self.data.dataset(seed)

    def validation(self) -> list[dict[str, np.ndarray]] | None:
        return self.data.held_out()

    def save(self, model: nnx.Module, directory: epath.Path) -> None:
        """Writes what `omni_tokenizers.load` reads."""
        self.tokenizer_class(self.tokenizer, model).save(directory)


@dataclass(frozen=True)
class ImageTokenizerTask(TokenizerTask):
    """A tokenizer of pictures."""

    data: Examples
    """Pictures."""
    tokenizer: ImageTokenizerConfig
    """The net and its quantiser."""
    losses: ImageLosses | None = None
    """What a reconstruction is judged by; None: as the tokenizer's configuration has it."""

    tokenizers = IMAGE_TOKENIZERS

    def loss(
        self, model: nnx.Module, batch: Batch, key: PRNGKeyArray, *, training: bool
    ) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, Sum]]:
        image = normalized(batch["image"])
        estimate, quantized = model.autoencode(image, key, training=training)
        return (self.losses or self.tokenizer.losses)(estimate, image, quantized)


@dataclass(frozen=True)
class AudioTokenizerTask(TokenizerTask):
    """A tokenizer of mono sound."""

    data: Examples
    """Sounds, at the tokenizer's sample rate."""
    tokenizer: AudioTokenizerConfig
    """The net and its quantiser."""
    losses: AudioLosses | None = None
    """What a reconstruction is judged by; None: as the tokenizer's configuration has it."""

    tokenizers = AUDIO_TOKENIZERS

    def loss(
        self, model: nnx.Module, batch: Batch, key: PRNGKeyArray, *, training: bool
    ) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, Sum]]:
        audio, mask = whole_frames(batch["audio"], batch["length"], self.tokenizer.samples_per_frame)
        estimate, quantized = model.autoencode(audio, batch["length"], key, training=training)
        losses = self.losses or self.tokenizer.losses
        return losses(estimate, audio, mask, quantized, self.tokenizer.sample_rate)
