"""Whole sentences in espeak-ng's voices at 24 kHz, split by voice and by sentence, for codecs of sound.

    python -m omni.recipes.speech runs/speech/data

No voice, in whatever accent, and no sentence is in two splits. Beside manifest.json, which lists the clips, each split
is one array of int16 samples, clip after clip.
"""

from __future__ import annotations

import argparse
import importlib.metadata
from dataclasses import dataclass
from typing import Literal, get_args

import grain
import numpy as np
from etils import epath
from jaxtyping import Float, Int
from tqdm import tqdm

from omni.data.examples import Examples
from omni.exits import exits
from omni.recipes import espeak, sentences
from omni.recipes.making import make_once
from omni.train.run_directory import read_json
from omni_tokenizers.errors import OmniError, UsageError

FORMAT = 1
SAMPLE_RATE = 24000
Split = Literal["train", "validation", "held_out"]
HELD_OUT, VALIDATION = 0.2, 0.05  # shares of the voices
VALIDATION_SENTENCES = 12  # the last of those that are not held out
PER_VOICE = {"train": 8, "validation": 2, "held_out": 4}  # sentences that each voice says
ACCENTS = ("en-us", "en-gb-x-rp", "en-gb-scotland", "en-us-nyc", "en-029", "en-gb-x-gbclan", "en-gb-x-gbcwmd")
RATES, PITCHES = (130, 221), (20, 81)
GAIN = 12  # decibels by which a training excerpt is quieter at most


@dataclass(frozen=True)
class Clips:
    """The clips of one split."""

    samples: Int[np.ndarray, " samples"]
    """int16, mono, 24 kHz, clip after clip; mapped from the file."""
    starts: Int[np.ndarray, " clips"]
    """Where each clip begins."""
    lengths: Int[np.ndarray, " clips"]
    """Samples of each clip."""
    voices: tuple[str, ...]
    """accent+variant of each clip."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Float[np.ndarray, " samples"]:
        """A clip as float32 within [-1, 1]."""
        start = self.starts[index]
        return self.samples[start : start + self.lengths[index]].astype(np.float32) / 32768


@dataclass(frozen=True)
class SpeechExcerpts(Examples):
    """Excerpts of the training clips."""

    sample_rate = SAMPLE_RATE
    directory: str
    """Directory written by `prepare`."""
    samples: int = 24000
    """Length of an excerpt; clips that are shorter are padded with silence."""

    def dataset(self, seed: int) -> grain.MapDataset:
        """From a random place of a random clip, 0 to 12 dB quieter."""
        clips = load(self.directory, "train")

        def excerpt(clip: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
            start = int(rng.integers(0, max(0, clips.lengths[clip] - self.samples) + 1))
            gain = np.float32(10 ** (-rng.uniform(0, GAIN) / 20))
            return self._excerpt(gain * clips[clip][start : start + self.samples])

        return grain.MapDataset.range(len(clips)).seed(seed).shuffle().repeat().random_map(excerpt)

    def held_out(self) -> list[dict[str, np.ndarray]]:
        """The first excerpt of each clip of the validation voices."""
        clips = load(self.directory, "validation")
        excerpts = [self._excerpt(clips[index][: self.samples]) for index in range(len(clips))]
        return [{name: np.stack([excerpt[name] for excerpt in excerpts]) for name in excerpts[0]}]

    def _excerpt(self, samples: Float[np.ndarray, " present"]) -> dict[str, np.ndarray]:
        audio = np.pad(samples, (0, self.samples - len(samples)))
        return {"audio": audio, "length": np.int32(len(samples))}


def prepare(directory: epath.PathLike, seed: int = 0) -> epath.Path:
    """Has all sentences spoken; the directory, absent or empty before, is filled; one of this seed is left alone.

    Raises:
      OmniError: the directory holds something else, a package of the extra `quickstart` is missing, or espeak-ng fails.
    """

    def fill(partial: epath.Path) -> dict:
        utterances = plan(seed)
        spoken = espeak.speak(utterance for split in utterances.values() for utterance in split)
        said = iter(tqdm(spoken, "speaking", sum(map(len, utterances.values())), unit="sentence", mininterval=1))
        splits = {}
        for split, wanted in utterances.items():
            clips = [espeak.trimmed(next(said), utterance, SAMPLE_RATE) for utterance in wanted]
            with (partial / f"{split}.npy").open("wb") as file:
                np.save(file, np.concatenate(clips))
            splits[split] = [
                {"samples": len(clip), "voice": utterance.voice, "text": utterance.text}
                for clip, utterance in zip(clips, wanted, strict=True)
            ]
        packages = {name: importlib.metadata.version(name) for name in ("espeakng-loader", "soxr")}
        return {"packages": packages, "splits": splits}

    return make_once(directory, "speech", {"format": FORMAT, "seed": seed}, fill)


def plan(seed: int) -> dict[Split, list[espeak.Utterance]]:
    """Who says what: a pure function of the seed."""
    rng = np.random.default_rng(seed)
    variants = rng.permutation(espeak.variants())
    held_out, validation = (round(share * len(variants)) for share in (HELD_OUT, VALIDATION))
    voices = np.split(variants, [held_out, held_out + validation])
    texts = (sentences.HELD_OUT, sentences.TRAIN[-VALIDATION_SENTENCES:], sentences.TRAIN[:-VALIDATION_SENTENCES])

    def utterance(text: str, variant: str) -> espeak.Utterance:
        manner = int(rng.integers(*RATES)), int(rng.integers(*PITCHES))
        return espeak.Utterance(str(text), f"{rng.choice(ACCENTS)}+{variant}", *manner)

    return {
        split: [
            utterance(text, variant) for variant in of for text in rng.choice(said, PER_VOICE[split], replace=False)
        ]
        for split, of, said in zip(("held_out", "validation", "train"), voices, texts, strict=True)
    }


def load(directory: epath.PathLike, split: Split) -> Clips:
    """The clips of a split.

    Raises:
      UsageError: no such split.
      OmniError: not a directory that `prepare` finished.
    """
    directory = epath.Path(directory)
    if split not in get_args(Split):
        raise UsageError(f"unknown split {split!r}; choose one of {', '.join(get_args(Split))}")
    clips = _manifest(directory)["splits"][split]
    lengths = np.array([clip["samples"] for clip in clips])
    path = directory / f"{split}.npy"
    try:
        samples = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise OmniError(f"{path}: cannot be read ({error}); remove {directory} to make it anew") from None
    if samples.dtype != np.int16 or samples.shape != (lengths.sum(),):
        raise OmniError(f"{path}: {samples.dtype} {list(samples.shape)} where the manifest lists {lengths.sum()} int16")
    return Clips(samples, np.cumsum(lengths) - lengths, lengths, tuple(clip["voice"] for clip in clips))


def _manifest(directory: epath.Path) -> dict:
    path = directory / "manifest.json"
    if not path.exists():
        raise OmniError(f"{directory}: no speech there; python -m omni.recipes.speech {directory} makes it")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or "splits" not in manifest:
        raise OmniError(f"{path}: not speech of format {FORMAT}")
    return manifest


def main() -> None:
    """Makes the data."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with exits():
        prepare(options.directory, options.seed)


if __name__ == "__main__":
    main()
