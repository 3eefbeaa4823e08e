"""The spectral codec beside EnCodec's SEANet: equal bits, losses, data and training time, measured as both train."""

from __future__ import annotations

import dataclasses
import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Float

from omni.data.loader import batches
from omni.recipes import opus, speech
from omni.train.checkpoints import Checkpoints
from omni.train.loop import TrainConfig, train
from omni.train.metrics import training_seconds
from omni.train.optimizer import OptimizerConfig
from omni.train.run_directory import claim, read_json, to_json, write_json
from omni.train.step import TrainState, make_state, make_train_step
from omni.train.tokenizers import AudioTokenizerTask
from omni_tokenizers import audio_metrics
from omni_tokenizers.audio import AudioTokenizerConfig
from omni_tokenizers.encodec import EncodecConfig
from omni_tokenizers.errors import UsageError
from omni_tokenizers.losses.audio import AudioLosses
from omni_tokenizers.quantizers import ResidualQuantizerConfig, VectorQuantizerConfig

logger = logging.getLogger(__name__)

_TIMED = 7  # steps of each net, taken in turn, of which the median counts
_ROWS = 4  # held-out clips that go through a net together
QUANTIZER = ResidualQuantizerConfig(4, VectorQuantizerConfig(1024, dim=32, decay=0.95))
LOSSES = AudioLosses(waveform=0.1)


def speech_tokenizer(**changes) -> AudioTokenizerConfig:
    """24 kHz at 75 frames of 4 x 10 bits a second, EnCodec's 3 kbit/s."""
    shape = AudioTokenizerConfig(
        sample_rate=speech.SAMPLE_RATE,
        hop=320,
        window=1280,
        mels=100,
        dim=256,
        encoder_blocks=3,
        decoder_blocks=5,
        downsample=1,
        quantizer=QUANTIZER,
    )
    return dataclasses.replace(shape, **changes)


def seanet(filters: int, spectral: AudioTokenizerConfig) -> EncodecConfig:
    """EnCodec's net, of some number of filters (the public one has 32), with the quantiser of a spectral codec.

    It sees what comes before and after, as that codec does.
    """
    quantizer = spectral.chosen_quantizer
    net = EncodecConfig(
        filters=filters, dim=quantizer.dim, causal=False, sample_rate=spectral.sample_rate, quantizer=quantizer
    )
    if net.hop != spectral.samples_per_frame:
        raise UsageError(f"SEANet has frames of {net.hop} samples, the spectral codec of {spectral.samples_per_frame}")
    return net


@dataclass(frozen=True)
class SpeechComparison:
    """Trains and measures all codecs; every training goes on where it was interrupted."""

    output: str = "runs/speech"
    """Directory of the data, of all runs and of results.json."""
    steps: int = 2400
    """Steps of the spectral codec; the others take as many as fit into the same time."""
    batch_size: int = 16
    """Excerpts of a second in a step."""
    points: int = 8
    """Checkpoints at which held-out speech is measured."""
    clips: int = 84
    """Held-out clips that are measured, from the first on."""
    spectral: AudioTokenizerConfig = field(default_factory=speech_tokenizer)
    """The recipe's codec."""
    filters: tuple[int, ...] = (32, 8)
    """SEANets, by their filters: EnCodec's own size, and a small one that takes more steps in the same time."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            name="muon", learning_rate=3e-3, final_learning_rate=0.02, weight_decay=0.0, ema_decay=0.99
        )
    )
    """Of all codecs."""

    def run(self) -> None:
        """Leaves results.json: a curve for each codec, with Opus at its nearest rate."""
        output = epath.Path(self.output)
        claim(output, to_json(self))
        speech.prepare(output / "data")
        tasks = self.tasks(output)
        seconds = calibrated(output / "seconds_per_step.json", tasks, self.batch_size, self.optimizer)
        held_out = speech.load(output / "data", "held_out")
        clips = [held_out[index] for index in range(min(self.clips, len(held_out)))]
        curves = {}
        for name, task in tasks.items():
            steps = round(self.steps * seconds["spectral"] / seconds[name])
            config = self.training(output / name, task, steps)
            logger.info("%s: %d steps", name, steps)
            train(config)
            curves[name] = curve(config, clips)
            write_json(output / "results.json", self.results(clips, curves, seconds))

    def tasks(self, output: epath.Path) -> dict[str, AudioTokenizerTask]:
        """The codecs by name."""
        data = speech.SpeechExcerpts(str(output / "data"))
        nets = {f"seanet_{filters}": seanet(filters, self.spectral) for filters in self.filters}
        nets = {"spectral": self.spectral, **nets}
        return {name: AudioTokenizerTask(data, net, LOSSES) for name, net in nets.items()}

    def training(self, output: epath.Path, task: AudioTokenizerTask, steps: int) -> TrainConfig:
        """A run that keeps the checkpoints to be measured."""
        every = max(1, steps // self.points)
        return TrainConfig(
            str(output),
            task,
            steps,
            self.batch_size,
            checkpoint_every=every,
            keep=self.points + 1,
            optimizer=self.optimizer,
        )

    def results(self, clips: Sequence[np.ndarray], curves: dict, seconds: dict[str, float]) -> dict:
        """What is known so far, as JSON."""
        quantizer = self.spectral.chosen_quantizer
        bits = sum(np.log2(quantizer.codebook_sizes)) * self.spectral.sample_rate / self.spectral.samples_per_frame
        decoded, rate = opus.nearest(clips, speech.SAMPLE_RATE, bits)
        return {
            "clips": len(clips),
            "bits_per_second": float(bits),
            "seconds_per_step": seconds,
            "codecs": curves,
            "opus": rate | measured(clips, decoded),
        }


def calibrated(
    path: epath.Path, tasks: dict[str, AudioTokenizerTask], batch_size: int, optimizer: OptimizerConfig
) -> dict[str, float]:
    """Seconds that a step of each takes: medians of steps taken in turn. Measured once; the file keeps them.

    They choose how many steps each codec takes; what training took in the end is measured as it runs.
    """
    if path.exists():
        return read_json(path)
    stepping = {name: _steps(task, batch_size, optimizer) for name, task in tasks.items()}
    for steps in stepping.values():
        next(steps)  # compiles
    taken = [{name: next(steps) for name, steps in stepping.items()} for _ in range(_TIMED)]
    seconds = {name: statistics.median(each[name] for each in taken) for name in tasks}
    write_json(path, seconds)
    return seconds


def _steps(task: AudioTokenizerTask, batch_size: int, optimizer: OptimizerConfig):
    """Trains for ever, yielding the seconds of each step."""
    graphdef, state = make_state(task, optimizer, 1000, 0)
    step = jax.jit(make_train_step(graphdef, task, optimizer, 1000, 0))
    for batch in batches(task.dataset(0), batch_size):
        start = time.monotonic()
        state, _ = jax.block_until_ready(step(state, batch))
        yield time.monotonic() - start


def curve(config: TrainConfig, clips: Sequence[np.ndarray]) -> list[dict[str, float]]:
    """Held-out quality at each checkpoint of a finished run, against the measured seconds of training.

    The file keeps each point: a run that went on has only its new checkpoints measured, and those that are gone stay.
    """
    path = epath.Path(config.output) / "curve.json"
    known = {point["step"]: point for point in read_json(path)} if path.exists() else {}
    graphdef, abstract = jax.eval_shape(lambda: make_state(config.task, config.optimizer, config.steps, config.seed))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract)
    autoencode = jax.jit(
        lambda state, audio, lengths: nnx.merge(graphdef, state.ema or state.params, state.rest, copy=True).autoencode(
            audio, lengths, None, training=False
        )
    )
    seconds = training_seconds(config.output)
    with Checkpoints(config.output, config.keep, config.task.metadata()) as checkpoints:
        for step in checkpoints.steps():
            if step not in known:
                state, _ = checkpoints.restore(abstract, step)
                known[step] = {"step": step, "training_seconds": round(seconds[step], 1)}
                known[step] |= through(autoencode, state, clips)
    points = [known[step] for step in sorted(known)]
    write_json(path, points)
    return points


def through(autoencode, state: TrainState, clips: Sequence[Float[np.ndarray, " samples"]]) -> dict[str, float]:
    """Measures a net on clips, a few at a time, all padded to the longest."""
    longest, decoded = max(map(len, clips)), []
    for first in range(0, len(clips), _ROWS):
        rows = list(clips[first : first + _ROWS])
        rows += [np.zeros(1, np.float32)] * (_ROWS - len(rows))
        audio = np.stack([np.pad(row, (0, longest - len(row))) for row in rows])
        lengths = np.array([len(row) for row in rows], np.int32)
        estimate, _ = autoencode(state, audio, lengths)
        decoded += [np.asarray(sound)[:length] for sound, length in zip(estimate, lengths, strict=True)]
    return measured(clips, decoded[: len(clips)])


def measured(
    clips: Sequence[Float[np.ndarray, " samples"]], decoded: Sequence[Float[np.ndarray, " samples"]]
) -> dict[str, float]:
    """Mel distance and STOI."""
    lengths = np.array([len(clip) for clip in clips])
    reference, estimate = (
        np.stack([np.pad(sound, (0, lengths.max() - len(sound))) for sound in sounds]) for sounds in (clips, decoded)
    )
    pair = (reference, np.clip(estimate, -1, 1), speech.SAMPLE_RATE, lengths)
    return {"mel_distance": audio_metrics.mel_distance(*pair), "stoi": audio_metrics.stoi(*pair)}
