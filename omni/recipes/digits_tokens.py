"""From scans, clips and phrases to token shards: pools of codes for each digit, and documents drawn from them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Int
from tqdm import tqdm

from omni.data.shards import write_shards
from omni.grammar import Grammar, Span, Tokens
from omni.recipes import digits_data
from omni.recipes.digits_documents import Pools, assemble, draw
from omni_tokenizers import AudioTokenizer, ImageTokenizer, TextTokenizer

_CLIPS = 64  # clips tokenized together


def make_pools(
    data: epath.PathLike,
    text: TextTokenizer,
    image: ImageTokenizer,
    audio: AudioTokenizer,
    image_variants: int,
    audio_variants: int,
    seed: int,
) -> Pools:
    """Codes of every training scan in so many augmentations, and of every training clip as it is and in so many."""
    scans, speech = digits_data.load_scans(data, "train"), digits_data.load_speech(data, "train")
    rng = np.random.default_rng((seed, 0))
    images: list[list] = [[] for _ in range(10)]
    for _ in tqdm(range(image_variants), desc="tokenize pictures", unit="pass"):
        codes = np.asarray(image.encode(digits_data.augment_images(scans.raw, rng)))
        for label, item in zip(scans.labels, codes, strict=True):
            images[label].append(item[None])
    sounds: list[list] = [[] for _ in range(10)]
    for start in tqdm(range(0, len(speech), _CLIPS), desc="tokenize sounds", unit="batch"):
        clips = speech.audio[start : start + _CLIPS]
        versions = [digits_data.augment_audio(clip, rng) for _ in range(audio_variants) for clip in clips]
        labels = [*speech.labels[start : start + _CLIPS]] * (1 + audio_variants)
        for label, item in zip(labels, _encode_clips(audio, clips, versions), strict=True):
            sounds[label].append(item)
    return Pools(functools.cache(lambda string: np.asarray(text.encode(string), np.int32)), images, sounds)


def _encode_clips(audio: AudioTokenizer, clips, versions) -> Iterator[Int[np.ndarray, "codebooks 1 frames"]]:
    lengths = np.array([len(clip) for clip in clips] + [version["length"] for version in versions])
    batch = np.zeros((len(lengths), 1, digits_data.LONGEST), np.float32)
    for row, clip in zip(batch, clips, strict=False):
        row[0, : len(clip)] = clip
    for row, version in zip(batch[len(clips) :], versions, strict=True):
        row[0, : version["length"]] = version["audio"][: version["length"]]
    codes = np.asarray(audio.encode(batch, lengths=lengths))
    for item, length in zip(codes, lengths, strict=True):
        yield item[:, None, : -(-length // audio.samples_per_frame)]


def write_documents(
    directory: epath.Path,
    count: int,
    seed: int,
    pools: Pools,
    grammar: Grammar,
    provenance: dict[str, Any],
    codebooks: dict[str, Float[np.ndarray, "codes code_dim"]],
) -> None:
    """Draws `count` documents and writes them as token shards, with the vectors of the codes beside them."""

    def documents() -> Iterator[Tokens]:
        for index in tqdm(range(count), desc="write documents", unit="document"):
            yield grammar.pack([Span(*part) for part in assemble(draw(index, seed), pools)])

    provenance = {"recipe": "digits", "seed": seed, **provenance}
    write_shards(directory, documents(), grammar.vocabulary, grammar, provenance, codebooks)
