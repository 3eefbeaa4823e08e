"""The small image tokenizer of the photos, with any quantiser of 512 codes, and all of these side by side."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from etils import epath

import omni_tokenizers
from omni.recipes import photos, photos_evaluation
from omni.train.loop import TrainConfig, train
from omni.train.metrics import training_seconds
from omni.train.optimizer import OptimizerConfig
from omni.train.run_directory import claim, read_json, to_json, write_json
from omni.train.tokenizers import ImageTokenizerTask
from omni_tokenizers.errors import UsageError
from omni_tokenizers.image import ImageTokenizerConfig
from omni_tokenizers.quantizers import (
    FSQConfig,
    IBQConfig,
    LearnedQuantizerConfig,
    LFQConfig,
    SimVQConfig,
    SingleQuantizerConfig,
    VectorQuantizerConfig,
)

logger = logging.getLogger(__name__)

CODES = 512
QUANTIZERS: dict[str, SingleQuantizerConfig] = {
    "ema": VectorQuantizerConfig(CODES, dim=16, decay=0.95),
    "ema, rotation": VectorQuantizerConfig(CODES, dim=16, decay=0.95, gradient="rotation"),
    "learned": LearnedQuantizerConfig(CODES, dim=16),
    "learned, normalised": LearnedQuantizerConfig(CODES, dim=16, code_dim=8, normalize="always"),
    "simvq": SimVQConfig(CODES, dim=16),
    "ibq": IBQConfig(CODES, dim=16),
    "fsq": FSQConfig((8, 8, 8)),
    "lfq": LFQConfig(bits=9),
}
"""Nine bits a code each; a residual or split quantiser has several codes a latent, which is another rate."""


def photos_training(
    output: str, quantizer: SingleQuantizerConfig = QUANTIZERS["ema"], steps: int = 3000
) -> TrainConfig:
    """64 x 64 pixels as 16 x 16 codes of 9 bits; the loss is the squared error alone, as PSNR is what is measured."""
    tokenizer = ImageTokenizerConfig(
        image_size=64,
        patch_size=4,
        channels=96,
        multipliers=(1,),
        residual_blocks=2,
        absolute_weight=0.0,
        quantizer=quantizer,
    )
    return TrainConfig(
        output,
        ImageTokenizerTask(photos.PhotoCrops(tokenizer.image_size), tokenizer),
        steps=steps,
        batch_size=8,
        optimizer=OptimizerConfig(
            name="muon", learning_rate=6e-3, final_learning_rate=0.02, weight_decay=0.0, ema_decay=0.99
        ),
    )


@dataclass(frozen=True)
class QuantizerComparison:
    """The recipe with each quantiser for as many steps; every training goes on where it was interrupted."""

    output: str = "runs/photos_quantizers"
    """Directory of all runs and of results.json."""
    steps: int = 1500
    """Steps of each training."""
    quantizers: tuple[str, ...] = tuple(QUANTIZERS)
    """Which of `QUANTIZERS`."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.quantizers) - set(QUANTIZERS)):
            raise UsageError(f"unknown quantizer {unknown[0]!r}; choose among {', '.join(QUANTIZERS)}")

    def run(self) -> None:
        """Trains and measures all; results.json has a line for each quantiser that is done, now or before."""
        output = epath.Path(self.output)
        claim(output, to_json(self), may_change=("quantizers",))
        before = read_json(output / "results.json") if (output / "results.json").exists() else {}
        results = before["quantizers"] if before.get("steps") == self.steps else {}
        for name in self.quantizers:
            logger.info("%s: %d steps", name, self.steps)
            directory = output / name.replace(", ", "_")
            train(photos_training(str(directory), QUANTIZERS[name], self.steps))
            results[name] = self._measured(directory)
            write_json(output / "results.json", {"steps": self.steps, "quantizers": results})

    def _measured(self, directory: epath.Path) -> dict:
        tokenizer = omni_tokenizers.load(directory)
        held_out = photos.fixed_crops("held_out", tokenizer.image_size)
        seconds = max(training_seconds(directory).values())
        return photos_evaluation.measure(tokenizer, held_out) | {"training_seconds": round(seconds, 1)}
