"""What trains tokenizers of pictures, videos and sound, whichever net and quantiser they have, on any examples."""

from __future__ import annotations

import abc
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import grain
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from omni.data.examples import Examples
from omni.pages.spectrogram import mel_magnitudes, spectrogram
from omni.parts import Audio, Image, Part
from omni.train.run_directory import write_json
from omni.train.task import Adversary, Batch, Gallery, Loss, Task
from omni_tokenizers import weights
from omni_tokenizers.audio import AudioTokenizer, AudioTokenizerConfig
from omni_tokenizers.base import NetTokenizer
from omni_tokenizers.discriminators import PatchDiscriminatorConfig, STFTDiscriminatorConfig
from omni_tokenizers.encodec import EncodecConfig, EncodecTokenizer
from omni_tokenizers.errors import UsageError
from omni_tokenizers.image import ImageTokenizer, ImageTokenizerConfig, as_pixels, normalized
from omni_tokenizers.losses.adversarial import adaptive_weight, deception, feature_matching, hinge
from omni_tokenizers.losses.audio import AudioLosses
from omni_tokenizers.losses.image import ImageLosses
from omni_tokenizers.losses.perceptual import PREPROCESSING, PerceptualDistance
from omni_tokenizers.quantizers import Quantized
from omni_tokenizers.video import VideoTokenizer, VideoTokenizerConfig
from omni_tokenizers.vqgan import VQGANConfig, VQGANTokenizer
from omni_tokenizers.waveform import whole_frames

_say_once = functools.cache(logging.getLogger(__name__).info)
_SHOWN = 6  # examples on the run's page
_SHOWN_FRAMES = 4  # of a video there

ComputeType = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class TokenizerAdversary(Adversary):
    """A discriminator against a tokenizer."""

    weight: float = 1.0
    """Weight of the adversarial loss."""
    adaptive: bool = False
    """Whether that weight is multiplied by how much larger the gradient of the other losses is at the decoder's last
    layer (VQGAN); in a microbatch, this is the microbatch's own."""
    features: float = 0.0
    """Weight of the difference of the discriminator's features."""


@dataclass(frozen=True)
class ImageAdversary(TokenizerAdversary):
    """The defaults are VQGAN's: PatchGAN, adaptive weight times 0.8."""

    weight: float = 0.8
    adaptive: bool = True
    discriminator: PatchDiscriminatorConfig = field(default_factory=PatchDiscriminatorConfig)
    """The discriminator."""


@dataclass(frozen=True)
class AudioAdversary(TokenizerAdversary):
    """The defaults are EnCodec's discriminator and DAC's proportions: 1 and 2 to 45.6 of `AudioLosses`' mel term."""

    weight: float = 1 / 45.6
    features: float = 2 / 45.6
    discriminator: STFTDiscriminatorConfig = field(default_factory=STFTDiscriminatorConfig)
    """The discriminator."""


class TokenizerTask(Task):
    """What all these tasks share: a net that its tokenizer's configuration describes, its examples, its critic."""

    tokenizers: ClassVar[tuple[type[NetTokenizer], ...]]
    """The classes that can be trained."""
    data: Examples
    tokenizer: Any
    losses: Any
    adversary: TokenizerAdversary | None
    compute_dtype: ComputeType

    def __post_init__(self) -> None:
        names = [each.config_class.__name__ for each in self.tokenizers]
        if type(self.tokenizer).__name__ not in names:
            raise UsageError(f"{type(self).__name__} trains {' and '.join(names)}, not {type(self.tokenizer).__name__}")
        if self.compute_dtype not in get_args(ComputeType):
            raise UsageError(f"compute_dtype is {self.compute_dtype!r}; choose {' or '.join(get_args(ComputeType))}")
        if self.losses is not None and self.tokenizer.losses != type(self.losses)():
            raise UsageError("the tokenizer's own loss settings would do nothing beside losses; leave them as they are")

    @abc.abstractmethod
    def prepared(self, batch: Batch) -> dict[str, Array]:
        """A batch as the net takes it: "original", what is to be reconstructed, "counts", 1 for each example that is
        not empty, and what else `reconstruct` and `compare` need."""

    @abc.abstractmethod
    def reconstruct(
        self, model: nnx.Module, given: dict[str, Array], key: PRNGKeyArray, *, training: bool
    ) -> tuple[Array, Quantized]:
        """Reconstructions of what was prepared, and what the quantiser says."""

    @abc.abstractmethod
    def compare(self, model: nnx.Module, estimate: Array, given: dict[str, Array], quantized: Quantized) -> Loss:
        """All losses but the critic's."""

    @abc.abstractmethod
    def exhibits(self, values: np.ndarray, batch: dict[str, np.ndarray]) -> list[list[Part]]:
        """Originals or reconstructions of a held-out batch as they are shown."""

    @property
    def chosen_losses(self) -> Any:
        """The task's losses, or the tokenizer's."""
        return self.losses or self.tokenizer.losses

    @property
    def tokenizer_class(self) -> type[NetTokenizer]:
        """The class whose configuration is given."""
        return next(each for each in self.tokenizers if each.config_class is type(self.tokenizer))

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        return self.tokenizer_class.net_class(self.tokenizer, rngs=rngs)

    def build_critic(self, rngs: nnx.Rngs) -> nnx.Module:
        return self.adversary.discriminator.make(rngs=rngs)

    def loss(self, model: nnx.Module, batch: Batch, key: PRNGKeyArray, *, training: bool) -> Loss:
        given = self.prepared(batch)
        estimate, quantized = self._autoencode(model, given, key, training=training)
        return self.compare(model, estimate, given, quantized)

    def adversarial_loss(
        self, model: nnx.Module, critic: nnx.Module, batch: Batch, key: PRNGKeyArray
    ) -> tuple[Loss, dict[str, Array]]:
        """The tokenizer's losses, and that of being told from originals, with the features' difference."""
        given, settings = self.prepared(batch), self.adversary
        if settings.adaptive:
            estimate, quantized, to_last_kernel = self._autoencode_and_pull(model, given, key)
        else:
            estimate, quantized = self._autoencode(model, given, key, training=True)
        total, weight, metrics = self.compare(model, estimate, given, quantized)

        def judged(estimate: Array) -> tuple[Float[Array, ""], list[Array]]:
            logits, features = critic(estimate)
            return deception(logits) @ given["counts"], features

        deceiving, features = judged(estimate)
        factor = jnp.float32(settings.weight)
        if settings.adaptive:
            scale = 1 / jnp.maximum(weight, 1)  # of sums to means
            others = jax.grad(lambda x: self.compare(model, x, given, quantized)[0] * scale)(estimate)
            own = jax.grad(lambda x: judged(x)[0] * scale)(estimate)
            factor = factor * adaptive_weight(to_last_kernel(others), to_last_kernel(own))
        total += factor * deceiving
        more = {"adversarial": deceiving, "adversarial_weight": factor * weight}
        if settings.features:
            more["features"] = feature_matching(critic(given["original"])[1], features) @ given["counts"]
            total += settings.features * more["features"]
        metrics |= {name: (value, weight) for name, value in more.items()}
        shown = {"original": given["original"], "estimate": estimate, "counts": given["counts"]}
        return (total, weight, metrics), shown

    def critic_loss(self, critic: nnx.Module, shown: dict[str, Array]) -> Loss:
        """The hinge loss of telling reconstructions from originals."""
        real, fake = critic(shown["original"])[0], critic(shown["estimate"])[0]
        weight, counts = shown["counts"].sum(), shown["counts"]
        metrics = {"critic/original": -deception(real) @ counts, "critic/reconstruction": -deception(fake) @ counts}
        return hinge(real, fake) @ counts, weight, {name: (value, weight) for name, value in metrics.items()}

    def dataset(self, seed: int) -> grain.MapDataset:
        return self.data.dataset(seed)

    def validation(self) -> list[dict[str, np.ndarray]] | None:
        return self.data.held_out()

    def gallery(self) -> Gallery | None:
        batches = self.data.held_out()
        if not batches:
            return None
        batch = {name: values[:_SHOWN] for name, values in batches[0].items()}

        def make(model: nnx.Module, batch: Batch) -> Array:
            return self._autoencode(model, self.prepared(batch), jax.random.key(0), training=False)[0]

        originals = np.asarray(self.prepared(batch)["original"])
        exhibits = functools.partial(self.exhibits, batch=batch)
        return Gallery(batch, exhibits(originals), make, exhibits)

    def save(self, model: nnx.Module, directory: epath.Path) -> None:
        """Writes what `omni_tokenizers.load` reads."""
        self.tokenizer_class(self.tokenizer, model).save(directory)

    def _autoencode(
        self, model: nnx.Module, given: dict[str, Array], key: PRNGKeyArray, *, training: bool
    ) -> tuple[Array, Quantized]:
        """As `reconstruct`, in the compute type; parameters and the whole quantiser stay float32."""
        if self.compute_dtype == "float32":
            return self.reconstruct(model, given, key, training=training)
        graphdef, quantizer, params, rest = nnx.split(model, _within("quantizer"), nnx.Param, ...)
        params = jax.tree.map(lambda x: x.astype(self.compute_dtype), params)
        net = nnx.merge(graphdef, quantizer, params, rest, copy=True)
        estimate, quantized = self.reconstruct(net, given, key, training=training)
        nnx.update(model, nnx.state(net, nnx.Not(nnx.Param)))
        return estimate.astype(jnp.float32), quantized

    def _autoencode_and_pull(
        self, model: nnx.Module, given: dict[str, Array], key: PRNGKeyArray
    ) -> tuple[Array, Quantized, Callable[[Array], nnx.State]]:
        """As `_autoencode` in training, and what turns a reconstruction's gradient into that of the last kernel."""
        last_kernel = _within(*model.last_layer, "kernel")
        graphdef, last, others = nnx.split(model, last_kernel, ...)

        def forward(last: nnx.State):
            net = nnx.merge(graphdef, last, others, copy=True)
            estimate, quantized = self._autoencode(net, given, key, training=True)
            return estimate, (quantized, nnx.state(net, nnx.Not(nnx.Param)))

        estimate, pull, (quantized, rest) = jax.vjp(forward, last, has_aux=True)
        nnx.update(model, rest)
        return estimate, quantized, lambda gradient: pull(gradient)[0]


@dataclass(frozen=True)
class ImageTokenizerTask(TokenizerTask):
    """A tokenizer of pictures."""

    tokenizers = (ImageTokenizer, VQGANTokenizer)
    data: Examples
    """Pictures."""
    tokenizer: ImageTokenizerConfig | VQGANConfig
    """The net and its quantiser."""
    losses: ImageLosses | None = None
    """What a reconstruction is judged by; None: as the tokenizer's configuration has it."""
    adversary: ImageAdversary | None = None
    """A discriminator that judges it besides."""
    compute_dtype: ComputeType = "float32"
    """Type of the net's matrix products; parameters, quantiser, losses and discriminator are float32."""

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        net = super().build(rngs)
        if path := self.chosen_losses.perceptual_weights:
            net.perceptual = PerceptualDistance.read(path)  # in the state, so that no program holds it as constants
        else:
            _say_once("perceptual loss: off (no weights given)")
        return net

    def metadata(self) -> dict[str, dict[str, Any]]:
        """What signs a result that a perceptual loss had a part in: whose weights, and how pictures went in."""
        path = self.chosen_losses.perceptual_weights
        return {"perceptual": _perceptual(weights.sha256(path))} if path else {}

    def save(self, model: nnx.Module, directory: epath.Path) -> None:
        """As for every tokenizer; with a perceptual loss, perceptual.json beside it says of which weights."""
        if self.chosen_losses.perceptual_weights:
            write_json(directory / "perceptual.json", _perceptual(model.perceptual.sha256))  # of what was trained with
            del model.perceptual
        super().save(model, directory)

    def prepared(self, batch: Batch) -> dict[str, Array]:
        self._check_size(*batch["image"].shape[1:3])
        return {"original": normalized(batch["image"]), "counts": jnp.ones(len(batch["image"]))}

    def reconstruct(
        self, model: nnx.Module, given: dict[str, Array], key: PRNGKeyArray, *, training: bool
    ) -> tuple[Float[Array, "batch height width 3"], Quantized]:
        return model.autoencode(given["original"], key, training=training)

    def compare(self, model: nnx.Module, estimate: Array, given: dict[str, Array], quantized: Quantized) -> Loss:
        return self.chosen_losses(estimate, given["original"], quantized, getattr(model, "perceptual", None))

    def exhibits(self, values: np.ndarray, batch: dict[str, np.ndarray]) -> list[list[Part]]:
        return [[Image(pixels)] for pixels in np.asarray(as_pixels(values))]

    def _check_size(self, height: int, width: int) -> None:
        net = self.tokenizer
        if self.tokenizer_class.takes_any_size:
            fits = height % net.downsampling == width % net.downsampling == 0
            wanted = f"multiples of {net.downsampling}"
        else:
            fits = height == width == net.image_size
            wanted = f"{net.image_size} x {net.image_size}"
        if not fits:
            raise UsageError(
                f"task.data has pictures of {height} x {width}, but task.tokenizer, with image_size {net.image_size}, "
                f"takes {wanted} pixels; change one of them"
            )


@dataclass(frozen=True)
class VideoTokenizerTask(ImageTokenizerTask):
    """A tokenizer of videos. Losses and a discriminator see their frames as pictures."""

    tokenizers = (VideoTokenizer,)
    data: Examples
    """Videos."""
    tokenizer: VideoTokenizerConfig
    """The net and its quantiser."""

    def prepared(self, batch: Batch) -> dict[str, Array]:
        video, stride = batch["video"], self.tokenizer.temporal_downsampling
        time, height, width = video.shape[1:4]
        self._check_size(height, width)
        if time % stride != 1 % stride:
            raise UsageError(
                f"task.data has videos of {time} frames, but task.tokenizer, with temporal_downsampling {stride}, "
                f"is trained on one more than a multiple of {stride}; change one of them"
            )
        frames = normalized(video.reshape(-1, height, width, 3))
        return {"original": frames, "counts": jnp.ones(len(frames)), "video": video}

    def reconstruct(
        self, model: nnx.Module, given: dict[str, Array], key: PRNGKeyArray, *, training: bool
    ) -> tuple[Float[Array, "frames height width 3"], Quantized]:
        estimate, quantized = model.autoencode(normalized(given["video"]), key, training=training)
        return estimate.reshape(given["original"].shape), quantized

    def exhibits(self, values: np.ndarray, batch: dict[str, np.ndarray]) -> list[list[Part]]:
        """A few frames of each video, from the first to the last, side by side."""
        videos = np.asarray(as_pixels(values)).reshape(batch["video"].shape)
        shown = np.linspace(0, videos.shape[1] - 1, min(_SHOWN_FRAMES, videos.shape[1])).round().astype(int)
        return [[Image(np.concatenate(list(video[shown]), 1))] for video in videos]


@dataclass(frozen=True)
class AudioTokenizerTask(TokenizerTask):
    """A tokenizer of mono sound."""

    tokenizers = (AudioTokenizer, EncodecTokenizer)
    data: Examples
    """Sounds, at the tokenizer's sample rate."""
    tokenizer: AudioTokenizerConfig | EncodecConfig
    """The net and its quantiser."""
    losses: AudioLosses | None = None
    """What a reconstruction is judged by; None: as the tokenizer's configuration has it."""
    adversary: AudioAdversary | None = None
    """A discriminator that judges it besides; it hears clips with the silence after their ends."""
    compute_dtype: ComputeType = "float32"
    """Type of the net's matrix products; parameters, quantiser, losses and discriminator are float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rate = getattr(self.data, "sample_rate", None)
        if rate not in (None, self.tokenizer.sample_rate):
            raise UsageError(
                f"task.data has sounds at {rate} Hz, but task.tokenizer.sample_rate is {self.tokenizer.sample_rate}; "
                "change one of them"
            )

    def prepared(self, batch: Batch) -> dict[str, Array]:
        audio, mask = whole_frames(batch["audio"], batch["length"], self.tokenizer.samples_per_frame)
        counts = (mask[:, 0] > 0).astype(jnp.float32)
        return {"original": audio, "length": batch["length"], "mask": mask, "counts": counts}

    def reconstruct(
        self, model: nnx.Module, given: dict[str, Array], key: PRNGKeyArray, *, training: bool
    ) -> tuple[Float[Array, "batch samples"], Quantized]:
        return model.autoencode(given["original"], given["length"], key, training=training)

    def compare(self, model: nnx.Module, estimate: Array, given: dict[str, Array], quantized: Quantized) -> Loss:
        original, mask = given["original"], given["mask"]
        return self.chosen_losses(estimate, original, mask, quantized, self.tokenizer.sample_rate)

    def exhibits(self, values: np.ndarray, batch: dict[str, np.ndarray]) -> list[list[Part]]:
        shown = []
        for samples, original, length in zip(values, batch["audio"], batch["length"], strict=True):
            clip, reference = (
                Audio(np.clip(each[None, :length], -1, 1), self.tokenizer.sample_rate) for each in (samples, original)
            )
            # Colours are the original's, so that what comes out too quiet is darker.
            shown.append([spectrogram(clip, mel_magnitudes(reference).max()), clip])
        return shown


def _perceptual(sha256: str) -> dict[str, str]:
    return {"sha256": sha256, "preprocessing": PREPROCESSING}


def _within(*names: str) -> Callable[[tuple, Any], bool]:
    """A filter of variables by the beginning of their path."""
    return lambda path, _: path[: len(names)] == names
