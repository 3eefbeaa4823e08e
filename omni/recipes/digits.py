"""The digits recipe: from nothing to a measured any-to-any model of spoken handwritten digits, in stages.

Each stage is done once: it leaves a mark in `stages/`, and a stage that was interrupted goes on from its last
checkpoint. `omni quickstart` runs it as it stands here; `experiments/digits.py` gives it more steps.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
from etils import epath

import omni_tokenizers
from omni import doctor
from omni.bundle import Model, load
from omni.data.layouts import code_vectors, make_grammar
from omni.evaluate import EvaluationSettings, evaluate, read_samples, write_report
from omni.model import TransformerConfig
from omni.recipes import digits_data
from omni.recipes.digits_documents import training_text
from omni.recipes.digits_evaluation import evaluation_data
from omni.recipes.digits_examples import DigitScans, SpokenDigits
from omni.recipes.digits_tokens import make_pools, write_documents
from omni.train.language import TransformerTask
from omni.train.loop import TrainConfig, train
from omni.train.optimizer import OptimizerConfig, OptimizerName
from omni.train.run_directory import CONFIG, claim, read_json, to_json, write_json
from omni.train.task import Task
from omni.train.tokenizers import AudioTokenizerTask, ImageTokenizerTask
from omni_tokenizers import TextTokenizer
from omni_tokenizers.audio import AudioTokenizerConfig
from omni_tokenizers.base import config_from_dict
from omni_tokenizers.errors import OmniError, UsageError
from omni_tokenizers.image import ImageTokenizerConfig

logger = logging.getLogger(__name__)

STAGES = (
    "data",
    "text_tokenizer",
    "image_tokenizer",
    "audio_tokenizer",
    "tokens",
    "transformer",
    "evaluation",
)
MODALITIES = ("text", "image", "audio")
QUICK = "quick"  # directory of a limited evaluation in the run's, where it overwrites nothing of the whole one


@dataclass(frozen=True)
class TrainingLength:
    """How long something is trained, and how fast it learns."""

    steps: int
    """Training steps."""
    batch_size: int
    """Examples in a step."""
    learning_rate: float
    """Highest learning rate."""
    warmup_steps: int = 100
    """Steps until the highest learning rate."""
    weight_decay: float = 0.0
    """Decay of matrices."""
    optimizer: OptimizerName = "adamw"
    """Which optimizer."""
    ema_decay: float = 0.99
    """Decay of the parameters' running mean, which is what is used in the end."""

    def config(self, output: epath.Path, task: Task, seed: int, checkpoint_every: int) -> TrainConfig:
        """The training run in full."""
        optimizer = OptimizerConfig(
            name=self.optimizer,
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            ema_decay=self.ema_decay,
        )
        return TrainConfig(
            str(output),
            task,
            self.steps,
            self.batch_size,
            seed,
            checkpoint_every=checkpoint_every,
            optimizer=optimizer,
        )


@dataclass(frozen=True)
class DigitsRecipe:
    """Spoken handwritten digits, any to any."""

    output: str = "runs/quickstart"
    """Directory of the run."""
    seed: int = 0
    """Seed of everything: splits, parameters, orders, replies."""
    voices: int | None = None
    """Voices that speak, a fifth of them held out; None for all that espeak-ng has."""
    text_vocabulary: int = 320
    """Most pieces of the text tokenizer, 256 bytes among them."""
    image: ImageTokenizerConfig = field(default_factory=ImageTokenizerConfig)
    """The image tokenizer."""
    image_training: TrainingLength = TrainingLength(steps=400, batch_size=64, learning_rate=2e-3)
    """Its training."""
    audio: AudioTokenizerConfig = field(default_factory=AudioTokenizerConfig)
    """The audio codec."""
    audio_training: TrainingLength = TrainingLength(steps=500, batch_size=32, learning_rate=2e-3)
    """Its training."""
    image_variants: int = 24
    """Augmentations of each training scan among the documents."""
    audio_variants: int = 3
    """Augmentations of each training utterance among the documents, beside the utterance as it is."""
    documents: int = 50_000
    """Documents to draw; training goes through them more than once if it is long."""
    transformer: TransformerConfig = field(
        default_factory=lambda: TransformerConfig(
            depth=8, dim=128, heads=2, key_value_heads=2, head_dim=32, mlp_dim=208, remat="blocks", saved=("attention",)
        )
    )
    """The transformer; its vocabulary size is set by the tokenizers. Deep for its width: a picture or sound is read by
    the lower layers, and only those above them can draw from what was read."""
    row_length: int = 192
    """Tokens of a packed row, and of the model's context."""
    transformer_training: TrainingLength = TrainingLength(
        steps=2200, batch_size=8, learning_rate=6e-3, weight_decay=0.1, ema_decay=0.99, optimizer="muon"
    )
    """Its training."""
    loss_weights: dict[str, float] = field(default_factory=lambda: {"text": 3.0})
    """What a token of each modality weighs."""
    codebook_share: float = 0.9
    """Part of the embedding rows' variance that begins as the tokenizers' own code vectors."""
    context_weight: float = 0.1
    """What a token of a context part weighs beside one of a target part."""
    guidance: dict[str, float] = field(default_factory=lambda: {"image": 3.0, "audio": 2.0})
    """Guidance of each modality unless a request says otherwise; text has none."""
    temperature: dict[str, float] = field(default_factory=lambda: {"image": 0.3, "audio": 0.6})
    """Temperature of each modality unless a request says otherwise; text is the likeliest."""
    checkpoint_every: int = 100
    """Steps between checkpoints of every training."""
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    """What is measured."""

    def __post_init__(self) -> None:
        if self.voices is not None and self.voices < digits_data.FEWEST_VOICES:
            raise UsageError(f"voices is {self.voices}; it must be at least {digits_data.FEWEST_VOICES}")
        own = {name: getattr(self, name) for name in ("temperature", "guidance", "loss_weights")}
        for name, setting in (*own.items(), *self.evaluation.sampling.items()):
            if unknown := sorted(set(setting) - set(MODALITIES)):
                near = difflib.get_close_matches(unknown[0], MODALITIES, 1, cutoff=0)[0]
                raise UsageError(f"{name}: unknown modality {unknown[0]!r}; did you mean {near!r}?")

    def run(self) -> None:
        """Runs every stage that is not done yet."""
        if lacking := doctor.missing("quickstart"):  # said now, not when the evaluation needs them
            raise OmniError(f"missing: {', '.join(lacking)}; install them: pip install 'omni-any-to-any[quickstart]'")
        output = epath.Path(self.output)
        claim(output, to_json(self), may_change=("guidance", "temperature", "evaluation"))
        write_json(output / "generation.json", self.generation())
        stages = Stages(output)
        for place, (name, step) in enumerate(self._stages(output).items(), start=1):
            measured = self.measured() if name == "evaluation" else None
            stages.run(name, step, f"stage {place} of {len(STAGES)}", settings=measured)
        print_next_steps(output)

    def _stages(self, output: epath.Path) -> dict[str, Callable[[], None]]:
        data, training = str(output / "data"), output / "training"

        def tokenizer(modality: str):
            return omni_tokenizers.load(output / "tokenizers" / modality)

        def make_data() -> None:
            digits_data.prepare(data, self.seed, self.voices)

        def train_text() -> None:
            TextTokenizer.train(training_text(), self.text_vocabulary).save(output / "tokenizers" / "text")

        def train_image() -> None:
            task = ImageTokenizerTask(DigitScans(data), self.image)
            train(self.image_training.config(training / "image", task, self.seed, self.checkpoint_every))
            omni_tokenizers.load(training / "image").save(output / "tokenizers" / "image")

        def train_audio() -> None:
            task = AudioTokenizerTask(SpokenDigits(data), self.audio)
            train(self.audio_training.config(training / "audio", task, self.seed, self.checkpoint_every))
            omni_tokenizers.load(training / "audio").save(output / "tokenizers" / "audio")

        def write_tokens() -> None:
            text, image, audio = (tokenizer(modality) for modality in ("text", "image", "audio"))
            if (output / "tokens").exists():
                (output / "tokens").rmtree()
            pools = make_pools(data, text, image, audio, self.image_variants, self.audio_variants, self.seed)
            tokenizers = {each.modality: each for each in (text, image, audio)}
            grammar = make_grammar(tokenizers, digits_data.LONGEST)
            provenance = {"tokenizers": {name: each.hash for name, each in tokenizers.items()}}
            vectors = code_vectors(grammar, tokenizers)
            write_documents(output / "tokens", self.documents, self.seed, pools, grammar, provenance, vectors)

        def train_transformer() -> None:
            vocabulary = read_json(output / "tokens" / "vocabulary.json")
            task = TransformerTask(
                data=str(output / "tokens"),
                model=dataclasses.replace(self.transformer, vocabulary_size=vocabulary["size"]),
                row_length=self.row_length,
                loss_weights=self.loss_weights,
                context_weight=self.context_weight,
                codebook_share=self.codebook_share,
            )
            train(self.transformer_training.config(training / "transformer", task, self.seed, self.checkpoint_every))
            for name in ("model.json", "weights.safetensors", "vocabulary.json", "grammar.json"):
                (training / "transformer" / name).copy(output / name, overwrite=True)

        def measure() -> None:
            evaluate_run(output)

        steps = (make_data, train_text, train_image, train_audio, write_tokens, train_transformer, measure)
        return dict(zip(STAGES, steps, strict=True))

    def generation(self) -> dict[str, dict[str, float]]:
        """Default sampling settings of the model."""
        return {
            "temperature": {"text": 0.0, **self.temperature},
            "guidance": {"text": 1.0, **self.guidance},
        }

    def measured(self) -> dict:
        """The settings that change what the evaluation finds, but nothing that was trained."""
        return {"generation": self.generation(), "evaluation": to_json(self.evaluation)}


class Stages:
    """Marks of finished stages in a run's directory, with the attempts and the seconds that each took."""

    def __init__(self, output: epath.Path):
        self.directory = output / "stages"
        self.directory.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, step: Callable[[], None], title: str, settings: dict | None = None) -> None:
        """Runs a stage unless it was finished with the same settings, where it has any that may change."""
        if self.done(name):
            if read_json(self._mark(name)).get("settings") == settings:
                logger.info("%s, %s: done before", title, name)
                return
            self._mark(name).unlink()
            self._begun_path(name).unlink(missing_ok=True)
        logger.info("%s, %s", title, name)
        with self._timed(name) as timing:
            step()
        write_json(self._mark(name), timing if settings is None else timing | {"settings": settings})

    @contextmanager
    def _timed(self, name: str) -> Iterator[dict]:
        """Adds an attempt and its seconds to those before. The time of one that was killed (`kill -9`) is lost."""
        start, timing = time.monotonic(), self._begun(name)
        before = timing["seconds"]
        timing["attempts"] += 1
        write_json(self._begun_path(name), timing)
        try:
            yield timing
        finally:
            timing["seconds"] = round(before + time.monotonic() - start, 1)
            with suppress(OmniError):  # on a full disk, say: what stopped the stage is the error to show
                write_json(self._begun_path(name), timing)

    def _begun(self, name: str) -> dict:
        """Attempts and seconds so far. Runs of old wrote a bare number, and one that was killed may have broken it."""
        path = self._begun_path(name)
        if not path.exists():
            return {"attempts": 0, "seconds": 0.0}
        try:
            found = read_json(path)
            return {"attempts": int(found["attempts"]), "seconds": float(found["seconds"])}
        except (OmniError, KeyError, TypeError, ValueError):
            return {"attempts": 1, "seconds": 0.0}

    def seconds(self) -> dict[str, float]:
        """Seconds of the finished stages."""
        return {name: read_json(self._mark(name))["seconds"] for name in STAGES if self.done(name)}

    def attempts(self) -> dict[str, int]:
        """How often each stage was begun, of those that were begun more than once."""
        counts = {name: self._begun(name)["attempts"] for name in STAGES}
        return {name: count for name, count in counts.items() if count > 1}

    def done(self, name: str) -> bool:
        """Whether a stage is finished."""
        return self._mark(name).exists()

    def _mark(self, name: str) -> epath.Path:
        return self.directory / f"{name}.json"

    def _begun_path(self, name: str) -> epath.Path:
        return self.directory / f"{name}.begun"


def evaluate_run(
    run: epath.PathLike,
    output: epath.PathLike | None = None,
    *,
    model: epath.PathLike | None = None,
    limit: int | None = None,
) -> dict:
    """Measures a run of this recipe on its held-out data; writes evaluation/results.json and report.html.

    Args:
      output: where to write instead of the run's directory, or instead of quick/ in it where there is a limit.
      model: what to measure instead of the run's own model; it must not have seen this run's held-out data, and its
        results need an `output` of their own.
      limit: targets per direction, for a quick look.

    Raises:
      UsageError: for another model without an `output` of its own, which would overwrite the run's results.
      OmniError: if the directory is no finished run of this recipe.
    """
    run = epath.Path(run)
    if model and (not output or epath.Path(output).resolve() == run.resolve()):
        raise UsageError(f"another model's results would overwrite those of {run}; name their directory with --output")
    if not (run / "stages" / "transformer.json").exists():
        raise OmniError(
            f"{run}: no run of the digits recipe whose transformer is trained; omni quickstart makes one, and --data "
            "measures any model on your own documents"
        )
    settings = config_from_dict(EvaluationSettings, read_json(run / CONFIG)["evaluation"], str(run / CONFIG))
    output = epath.Path(output) if output else (run if limit is None else run / QUICK)
    stages, start = Stages(run), time.monotonic()
    data, loaded = evaluation_data(run / "data", run / "tokens"), load(model or run)
    data = dataclasses.replace(data, pool=_of_the_same_codes(data.pool, run, loaded))
    seconds, attempts, curves = {}, {}, {}
    if not model:  # how the run was trained is nothing that belongs to another model
        seconds, attempts = stages.seconds(), stages.attempts()
        curves = {name.title(): run / "training" / name / "metrics.jsonl" for name in ("transformer", "image", "audio")}
    if stages.done("evaluation"):  # another evaluation than this one
        attempts.pop("evaluation", None)
    seconds["evaluation"] = time.monotonic() - start
    results = evaluate(loaded, data, output, settings, limit=limit, seconds=seconds, attempts=attempts)
    command = f"omni eval {run}" + (f" --model {model} --output {output}" if model else "")
    command += f" --limit {limit}" if limit else ""
    title = "Spoken handwritten digits"
    logger.info("wrote %s", write_report(results, read_samples(output), curves, output, title=title, command=command))
    return results


def _of_the_same_codes(pool: dict[str, list], run: epath.Path, model: Model) -> dict[str, list]:
    """The run's training codes of the modalities whose codes mean the same to a model: its codebooks are the run's."""

    def same(modality: str) -> bool:
        own = omni_tokenizers.load(run / "tokenizers" / modality).code_vectors
        others = model.tokenizers[modality].code_vectors
        return len(own) == len(others) and all(map(np.array_equal, own, others))

    return {modality: codes for modality, codes in pool.items() if same(modality)}


def print_next_steps(run: epath.Path) -> None:
    """The matrix, and what to try next; every command printed here works."""
    results = read_json(run / "evaluation" / "results.json")
    print_matrix(results)
    print(f"report: {run / 'report.html'}")
    print("try next:")
    print(f'  omni generate {run} "seven" --want image,audio --out out/')
    print(f'  omni generate {run} "say seven, then draw it" --out out/')
    print(f"  omni generate {run} out/1.png --want text,audio --out out/")
    print(f"  omni inspect {run}")


def print_matrix(results: dict) -> None:
    """The modality matrix as a table of percentages, with the judge's ceiling."""
    matrix = results["matrix"]
    print(f"{'from / to':<10}" + "".join(f"{target:>24}" for target in matrix))
    for source, row in matrix.items():
        cells = (f"{100 * cell['accuracy']:5.1f} % (ceiling {100 * cell['ceiling']:.1f})" for cell in row.values())
        print(f"{source:<10}" + "".join(f"{cell:>24}" for cell in cells))
