"""Spoken handwritten digits: scikit-learn's 1,797 scans and ten words in espeak-ng's voices, as two tfds datasets.

`prepare` writes them, split by scan and by voice; `load` reads them; `augment_images`, `scan_dataset` and
`speech_dataset` vary the training split for the tokenizers.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import grain
import numpy as np
import PIL.Image
import scipy.ndimage
import soxr
from etils import epath
from jaxtyping import Float, Int, UInt8
from tqdm import tqdm

from omni.recipes import espeak
from omni.recipes.digits_documents import WORDS
from omni.recipes.making import make_once
from omni_tokenizers.errors import OmniError

FORMAT = 1
VERSION = "1.0.0"
HELD_OUT = 0.2
SPLITS = ("train", "test")

IMAGE_SIZE = 32
SCAN_SIZE = 26  # pixels that the 8 pixels of a scan become
PLAIN, INVERTED = 0.6, 0.15  # shares of training pictures white on black, black on white; the rest is coloured
BLACK, WHITE = np.zeros(3, np.float32), np.ones(3, np.float32)
CONTRAST = 0.4  # least difference in brightness between stroke and background

SAMPLE_RATE = 16000
LONGEST = 15360  # samples: 0.96 s
EXCERPT = 7680  # samples that the codec is trained on at once: half of the words are no longer than 0.37 s
UTTERANCES = 4  # of each word by each voice
FEWEST_VOICES = 3  # of which one is held out
RATES = (130, 221)
PITCHES = (20, 81)
SPEED = 0.08  # logarithm of the most by which an utterance is played faster or slower
ACCENTS = ("en-gb-x-rp", "en-gb-scotland", "en-us-nyc", "en-029", "en-gb-x-gbclan", "en-gb-x-gbcwmd")
TOO_SLOW = {"AnxiousAndy", "Marco"}  # variants whose words do not fit into LONGEST


@dataclass(frozen=True)
class Scans:
    """Handwritten digits."""

    images: UInt8[np.ndarray, "n 32 32 3"]
    """The plain scans, enlarged: white on black."""
    raw: UInt8[np.ndarray, "n 8 8"]
    """As scanned: 0 to 16."""
    labels: Int[np.ndarray, " n"]
    scans: Int[np.ndarray, " n"]
    """Which of scikit-learn's scans each is."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Speech:
    """Spoken digits."""

    audio: list[Float[np.ndarray, " samples"]]
    """float32, mono, 16 kHz, at most 15,360 samples."""
    labels: Int[np.ndarray, " n"]
    voices: np.ndarray
    """accent+variant; no variant is in both splits."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class DigitsSplit:
    """Scans and speech of one split."""

    scans: Scans
    speech: Speech


@dataclass(frozen=True)
class DigitsData:
    """All of the digits, in memory."""

    train: DigitsSplit
    test: DigitsSplit


def prepare(directory: epath.PathLike, seed: int = 0, voices: int | None = None) -> epath.Path:
    """Writes the datasets `digit_scans` and `digit_speech` (splits train and test); the directory appears when whole.

    The content is a pure function of the arguments and the packages' versions; a directory that is there already with
    these is left alone. Takes about 20 seconds.

    Args:
      voices: how many variants of espeak-ng's voices speak, at least `FEWEST_VOICES`; None for all.

    Raises:
      OmniError: the directory holds something else, a package of the extra `quickstart` is missing, or espeak-ng fails.
    """

    def fill(partial: epath.Path) -> dict:
        scans, speech = list(_scan_records(seed)), list(_speech_records(seed, voices))
        counts = {
            "digit_scans": _write(partial, "digit_scans", scans),
            "digit_speech": _write(partial, "digit_speech", speech),
        }
        packages = ("espeakng-loader", "scikit-learn", "scipy", "soxr")
        return {"counts": counts, "packages": {name: importlib.metadata.version(name) for name in packages}}

    return make_once(directory, "digits data", {"format": FORMAT, "seed": seed, "voices": voices}, fill)


def load(directory: epath.PathLike) -> DigitsData:
    """Reads both datasets into memory (about 300 MB).

    Raises:
      OmniError: not a directory that `prepare` finished.
    """
    return DigitsData(*(DigitsSplit(load_scans(directory, split), load_speech(directory, split)) for split in SPLITS))


def load_scans(directory: epath.PathLike, split: str) -> Scans:
    """Reads the scans of a split ("train" or "test"); raises as `load` does."""
    columns = _read(directory, "digit_scans", split)
    return Scans(
        images=np.stack(columns["image"]),
        raw=np.stack(columns["raw"]),
        labels=np.array(columns["label"], np.int32),
        scans=np.array(columns["scan"], np.int32),
    )


def load_speech(directory: epath.PathLike, split: str) -> Speech:
    """Reads the speech of a split ("train" or "test"); raises as `load` does."""
    columns = _read(directory, "digit_speech", split)
    return Speech(
        audio=[samples.astype(np.float32) / 32768 for samples in columns["audio"]],
        labels=np.array(columns["label"], np.int32),
        voices=np.array([voice.decode() for voice in columns["voice"]]),
    )


def split_scans(seed: int = 0) -> dict[str, Scans]:
    """The scans of each split, which `prepare` writes with this seed; made in memory, without any speech.

    Raises:
      OmniError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise OmniError("the scans need scikit-learn: pip install 'omni-any-to-any[quickstart]'") from error
    digits = load_digits()
    rng = np.random.default_rng([seed, 0])
    splits: dict[int, str] = {}
    for digit in range(10):
        splits |= _split(list(map(int, np.flatnonzero(digits.target == digit))), rng)
    raw, labels = digits.images.astype(np.uint8), digits.target.astype(np.int32)
    images = plain_images(raw)
    places = {
        split: np.array([scan for scan in range(len(raw)) if splits[scan] == split], np.int32) for split in SPLITS
    }
    return {split: Scans(images[own], raw[own], labels[own], own) for split, own in places.items()}


def scan_dataset(directory: epath.PathLike, seed: int) -> grain.MapDataset:
    """Endless augmented training scans: {"image": uint8 [32, 32, 3]}, a pure function of (seed, index)."""
    raw = load_scans(directory, "train").raw
    return _endless(raw, seed).random_map(lambda scan, rng: {"image": augment_images(scan[None], rng)[0]})


def speech_dataset(directory: epath.PathLike, seed: int) -> grain.MapDataset:
    """Endless excerpts of training utterances: {"audio": float32 [7680], "length": int32, in samples}.

    Words that are longer than an excerpt are cut to one at random, so that little of a batch is padding.
    """
    return _endless(load_speech(directory, "train").audio, seed).random_map(_excerpt)


def augment_images(
    raw: UInt8[np.ndarray, "n 8 8"], rng: np.random.Generator, plain: float = PLAIN
) -> UInt8[np.ndarray, "n 32 32 3"]:
    """Training pictures of scans: turned by up to 10 degrees, scaled by up to 10 %, moved by up to 1.5 pixels, bolder.

    Held-out scans are shown as they are, white on black, and what the model draws is judged beside such pictures, so
    most training pictures (`plain`: a share) keep these colours and differ in shape alone. The others, for scans on
    paper and for any pen, are black on white or of two random colours of different brightness.
    """
    return np.stack([_augment(scan, rng, plain) for scan in raw])


def augment_audio(samples: Float[np.ndarray, " samples"], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One training utterance as of another voice: {"audio": float32 [15360], "length": int32}.

    Up to 8 % faster and higher or slower and deeper, as a tape would be, 0 to 9 dB quieter, up to 20 ms later.
    """
    rate = SAMPLE_RATE * np.exp(rng.uniform(-SPEED, SPEED))
    samples = soxr.resample(samples, rate, SAMPLE_RATE)[:LONGEST]
    shift = int(rng.integers(0, min(320, LONGEST - len(samples)) + 1))
    audio = np.zeros(LONGEST, np.float32)
    audio[shift : shift + len(samples)] = samples * np.float32(10 ** rng.uniform(-9 / 20, 0))
    return {"audio": audio, "length": np.int32(shift + len(samples))}


def _excerpt(samples: Float[np.ndarray, " samples"], rng: np.random.Generator) -> dict[str, np.ndarray]:
    whole = augment_audio(samples, rng)
    start = int(rng.integers(0, max(0, whole["length"] - EXCERPT) + 1))
    length = min(EXCERPT, int(whole["length"]) - start)
    return {"audio": whole["audio"][start : start + EXCERPT], "length": np.int32(length)}


def plain_images(raw: UInt8[np.ndarray, "n 8 8"]) -> UInt8[np.ndarray, "n 32 32 3"]:
    """The scans enlarged to 26 pixels by cubic splines in the middle of 32, white on black."""
    return np.stack([_paint(_enlarge(scan), WHITE, BLACK) for scan in raw])


def _augment(scan: np.ndarray, rng: np.random.Generator, plain: float) -> np.ndarray:
    ink = _enlarge(
        scan, angle=np.radians(rng.uniform(-10, 10)), scale=rng.uniform(0.9, 1.1), shift=rng.uniform(-1.5, 1.5, 2)
    )
    ink **= np.exp(rng.uniform(-0.4, 0.4))
    share = rng.random()
    if share < plain:
        return _paint(ink, WHITE, BLACK)
    if share < plain + (1 - plain) * INVERTED / (1 - PLAIN):
        return _paint(ink, BLACK, WHITE)
    colours = rng.random((2, 3), np.float32)
    while abs(np.diff(colours @ [0.299, 0.587, 0.114])[0]) < CONTRAST:
        colours = rng.random((2, 3), np.float32)
    return _paint(ink, *colours)


def _enlarge(scan: np.ndarray, angle: float = 0.0, scale: float = 1.0, shift: np.ndarray | float = 0.0) -> np.ndarray:
    """The ink of a scan on 32 x 32 pixels, 0 to 1: rotated by radians, scaled, shifted by pixels (rows, columns)."""
    ink = np.zeros((16, 16), np.float32)
    ink[4:12, 4:12] = scan / 16
    cosine, sine = np.cos(angle), np.sin(angle)
    matrix = np.array([[cosine, -sine], [sine, cosine]]) * 8 / (SCAN_SIZE * scale)
    offset = 7.5 - matrix @ ((IMAGE_SIZE - 1) / 2 + np.zeros(2) + shift)
    # With its margin of zeros the scan needs no padding inside scipy, which would cost more than the transform itself.
    coefficients = scipy.ndimage.spline_filter(ink, output=np.float32)
    shape = (IMAGE_SIZE, IMAGE_SIZE)
    return scipy.ndimage.affine_transform(coefficients, matrix, offset, shape, np.float32, prefilter=False).clip(0, 1)


def _paint(ink: np.ndarray, colour: np.ndarray, background: np.ndarray) -> np.ndarray:
    levels = zip(np.float32(255) * colour, np.float32(255) * background, strict=True)
    return np.rint(np.stack([low + ink * (high - low) for high, low in levels], -1)).astype(np.uint8)


def _endless(examples: Iterable, seed: int) -> grain.MapDataset:
    return grain.MapDataset.source(examples).seed(seed).shuffle().repeat()


def _split(items: list, rng: np.random.Generator) -> dict:
    """Each item's split; one in five is held out."""
    held_out = {items[i] for i in rng.permutation(len(items))[: round(HELD_OUT * len(items))]}
    return {item: "test" if item in held_out else "train" for item in items}


def _scan_records(seed: int) -> Iterator[tuple[str, dict]]:
    splits = split_scans(seed)
    places = [(int(scan), split, i) for split, scans in splits.items() for i, scan in enumerate(scans.scans)]
    for scan, split, i in sorted(places):
        png, scans = io.BytesIO(), splits[split]
        PIL.Image.fromarray(scans.images[i]).save(png, "PNG")
        png.seek(0)
        yield split, {"image": png, "raw": scans.raw[i], "label": int(scans.labels[i]), "scan": scan}


def _speech_records(seed: int, voices: int | None = None) -> Iterator[tuple[str, dict]]:
    variants = [variant for variant in espeak.variants() if variant not in TOO_SLOW][:voices]
    rng = np.random.default_rng([seed, 1])
    splits = _split(variants, rng)
    plan = [
        (splits[variant], digit, espeak.Utterance(word, f"{accent}+{variant}", *_manner(rng)))
        for place, variant in enumerate(variants)
        for accent in ("en-us", ACCENTS[place % len(ACCENTS)])
        for digit, word in enumerate(WORDS)
        for _ in range(UTTERANCES)
    ]
    spoken = espeak.speak(utterance for _, _, utterance in plan)
    for (split, digit, utterance), samples in zip(
        plan, tqdm(spoken, "speaking", len(plan), unit="word", mininterval=1), strict=True
    ):
        audio = _clip(samples, utterance)
        about = {"label": digit, "voice": utterance.voice, "rate": utterance.rate, "pitch": utterance.pitch}
        yield split, {"audio": audio, **about}


def _manner(rng: np.random.Generator) -> tuple[int, int]:
    return int(rng.integers(*RATES)), int(rng.integers(*PITCHES))


def _clip(samples: np.ndarray, utterance: espeak.Utterance) -> np.ndarray:
    """int16 at 16 kHz, without the silence at both ends, at one peak."""
    clip = espeak.trimmed(samples, utterance, SAMPLE_RATE)
    if len(clip) > LONGEST:
        raise OmniError(f"{utterance} takes {len(clip) / SAMPLE_RATE:.2f} s, more than {LONGEST / SAMPLE_RATE} s")
    return clip


def _features(name: str):
    from tensorflow_datasets import features

    label = features.ClassLabel(names=WORDS)
    if name == "digit_scans":
        image = features.Image(shape=(IMAGE_SIZE, IMAGE_SIZE, 3), encoding_format="png")
        raw = features.Tensor(shape=(8, 8), dtype=np.uint8)
        return features.FeaturesDict({"image": image, "raw": raw, "label": label, "scan": np.int32})
    audio = features.Tensor(shape=(None,), dtype=np.int16)
    return features.FeaturesDict(
        {"audio": audio, "label": label, "voice": features.Text(), "rate": np.int32, "pitch": np.int32}
    )


def _write(directory: epath.Path, name: str, records: list[tuple[str, dict]]) -> dict[str, int]:
    """Writes one dataset; returns the number of examples of each split."""
    import tensorflow_datasets as tfds

    splits = {split: [(i, record) for i, (of, record) in enumerate(records) if of == split] for split in SPLITS}

    # tfds' ready-made `store_as_tfds_dataset` asks for TensorFlow; a builder of one's own does not.
    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(VERSION)

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=_features(name), description="Spoken handwritten digits."
            )

        def _split_generators(self, _):
            return {split: iter(records) for split, records in splits.items()}

        def _generate_examples(self):
            raise NotImplementedError("the splits bring their examples")

    Builder.name = name
    with _quiet():
        Builder(data_dir=directory, file_format="array_record").download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    return {split: len(records) for split, records in splits.items()}


def _read(directory: epath.PathLike, name: str, split: str) -> dict[str, list]:
    """A split's examples, a list for each feature."""
    import tensorflow_datasets as tfds

    directory = epath.Path(directory)
    count = _read_manifest(directory)["counts"][name][split]
    try:
        with _quiet():
            source = tfds.builder_from_directory(directory / name / VERSION).as_data_source(split=split)
            examples = source.__getitems__(range(len(source)))
    except (OSError, ValueError, RuntimeError) as error:
        raise OmniError(f"{directory}: {name} is damaged ({error}); remove the directory to make it anew") from None
    if len(examples) != count:
        raise OmniError(f"{directory}: {name} has {len(examples)} examples of {split}, the manifest says {count}")
    return {feature: [example[feature] for example in examples] for feature in examples[0]}


def _read_manifest(directory: epath.Path) -> dict:
    path = directory / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError):
        raise OmniError(f"{directory}: no digits data there (no readable {path.name})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or "counts" not in manifest:
        raise OmniError(f"{path}: not digits data of format {FORMAT}")
    return manifest


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """tfds without its progress bars and messages."""
    import tensorflow_datasets as tfds
    from absl import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
