"""What a codec of speech has to beat: EnCodec's SEANet trained like it, and Opus."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import soundfile
from etils import epath
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from omni.train.tokenizers import AudioTokenizerTask
from omni_tokenizers.errors import OmniError
from omni_tokenizers.losses.audio import AudioLosses
from omni_tokenizers.quantizers import LevelledQuantizerConfig, Quantized, ResidualQuantizerConfig, make_quantizer
from omni_tokenizers.seanet import SEANetConfig, SEANetDecoder, SEANetEncoder
from omni_tokenizers.waveform import whole_frames

_OGG_HEADER, _OPUS_HEADERS = 27, 2  # bytes of a page's header before its table; packets that hold no sound


@dataclass(frozen=True)
class SEANetCodecConfig:
    """EnCodec's net (Défossez et al. 2022) around a quantiser that learns."""

    net: SEANetConfig = field(default_factory=SEANetConfig)
    """Encoder and decoder; its latents are as wide as the quantiser's."""
    quantizer: LevelledQuantizerConfig = field(default_factory=ResidualQuantizerConfig)
    """The quantiser."""
    sample_rate: int = 24000
    """Samples per second."""
    losses: AudioLosses = field(default_factory=AudioLosses)
    """What a training has where it names no others."""

    @property
    def samples_per_frame(self) -> int:
        """Samples that one frame of codes stands for."""
        return self.net.hop


class SEANetCodec(nnx.Module):
    """SEANet's encoder, a quantiser, SEANet's decoder."""

    def __init__(self, config: SEANetCodecConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = SEANetEncoder(config.net, rngs=rngs)
        self.quantizer = make_quantizer(config.quantizer, rngs=rngs)
        self.decoder = SEANetDecoder(config.net, rngs=rngs)

    def autoencode(
        self,
        audio: Float[Array, "batch samples"],
        length: Int[Array, " batch"],
        key: PRNGKeyArray | None,
        *,
        training: bool,
    ) -> tuple[Float[Array, "batch padded"], Quantized]:
        """As `SpectralCodec.autoencode`."""
        audio, mask = whole_frames(audio, length, self.config.samples_per_frame)
        latents = self.encoder(audio[..., None], length)
        quantized = self.quantizer(latents, key, training=training, weights=mask)
        frames = mask.sum(1).astype(length.dtype)
        return self.decoder(quantized.quantized, frames)[..., 0], quantized


@dataclass(frozen=True)
class SEANetTask(AudioTokenizerTask):
    """Trains the baseline by the losses and on the data of the codec that it is compared with."""

    tokenizer: SEANetCodecConfig
    """The net."""

    def build(self, rngs: nnx.Rngs) -> SEANetCodec:
        return SEANetCodec(self.tokenizer, rngs=rngs)

    def save(self, model: nnx.Module, directory: epath.Path) -> None:
        """Nothing: it is measured from its checkpoints, and is no tokenizer to be used."""


def opus_nearest(
    clips: Sequence[Float[np.ndarray, " samples"]], sample_rate: int, bits_per_second: float
) -> tuple[list[Float[np.ndarray, " samples"]], dict[str, float]]:
    """Clips as Opus gives them back at the setting of libsndfile whose rate is nearest to one, and the rate itself.

    The rate counts the packets of sound; `bits_per_second_of_files` counts the Ogg container too, which weighs much in
    clips of seconds. Opus goes down to about 6 kbit/s.

    Raises:
      OmniError: the installed libsndfile does not write Opus.
    """
    if "OPUS" not in soundfile.available_subtypes("OGG"):
        raise OmniError(f"libsndfile {soundfile.__libsndfile_version__} does not write Opus; 1.0.29 and newer do")
    seconds = sum(map(len, clips)) / sample_rate
    found = []
    for level in np.linspace(1, 0.9, 21):  # from 6 kbit/s up
        files = [_opus(clip, sample_rate, level) for clip in clips]
        rate = 8 * sum(map(_opus_bytes, files)) / seconds
        found.append((abs(rate - bits_per_second), level, rate, files))
        if rate > bits_per_second:
            break
    _, level, rate, files = min(found, key=lambda each: each[0])
    decoded = [soundfile.read(io.BytesIO(file), dtype="float32")[0] for file in files]
    return decoded, {
        "compression_level": float(level),
        "bits_per_second": rate,
        "bits_per_second_of_files": 8 * sum(map(len, files)) / seconds,
    }


def _opus(clip: Float[np.ndarray, " samples"], sample_rate: int, level: float) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, clip, sample_rate, format="OGG", subtype="OPUS", compression_level=level)
    return file.getvalue()


def _opus_bytes(file: bytes) -> int:
    """Bytes of the packets that hold sound (RFC 3533: a page's table lists segments; one below 255 ends a packet)."""
    sizes, place = [0], 0
    while place < len(file):
        table = file[place + _OGG_HEADER : place + _OGG_HEADER + file[place + _OGG_HEADER - 1]]
        for segment in table:
            sizes[-1] += segment
            if segment < 255:
                sizes.append(0)
        place += _OGG_HEADER + len(table) + sum(table)
    return sum(sizes[_OPUS_HEADERS:])
