"""How fast packed rows come from token shards on one core, and how near `omni tokenize` comes to its tokenizer."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import PIL.Image
from flax import nnx

from omni.bench.report import processor
from omni.bench.sides import cores
from omni.data.json_lines import JsonLines
from omni.data.loader import PackedRows, batches
from omni.data.shards import TokenShards, write_shards
from omni.grammar import Grammar, Span, Tokens
from omni.tokenize import TokenizeConfig, Work
from omni.vocabulary import Vocabulary
from omni_tokenizers import TextTokenizer
from omni_tokenizers.errors import OmniError, UsageError
from omni_tokenizers.quantizers import LearnedQuantizerConfig
from omni_tokenizers.vqgan import VQGANConfig, VQGANTokenizer

MEAN_LENGTH = 1024
_TEXT, _PICTURES, _SIDE, _FRAMES, _BOOKS = (20, 381), (1, 3), 16, (25, 126), 4
_CODES = 1024
_BATCH = 4


@dataclass(frozen=True)
class ReaderOptions:
    """What is read."""

    tokens: int = 8_000_000
    """Tokens of the shards."""
    row_length: int = 8192
    """Tokens of a row."""
    rounds: int = 5
    """How often all of them are read."""

    def __post_init__(self) -> None:
        if self.tokens < 100 * MEAN_LENGTH or self.row_length < 2 * MEAN_LENGTH or self.rounds < 1:
            raise UsageError(
                f"tokens is at least {100 * MEAN_LENGTH}, row_length {2 * MEAN_LENGTH}, rounds 1; "
                f"they are {self.tokens}, {self.row_length} and {self.rounds}"
            )


@dataclass(frozen=True)
class TokenizeOptions:
    """What is tokenized."""

    tokenizer: str | None = None
    """Directory of a tokenizer of pictures; None is a VQGAN of 256 x 256 pixels with random weights."""
    pictures: int = 128
    """Pictures of each round."""
    batch_size: int = 8
    """Pictures that go through the tokenizer together."""
    rounds: int = 3
    """How often each side has its turn."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.rounds < 1 or self.pictures < 2 * self.batch_size:
            raise UsageError(
                "batch_size and rounds are at least 1, and pictures two batches; "
                f"they are {self.batch_size}, {self.rounds} and {self.pictures}"
            )


def measure(options: dict[str, ReaderOptions | TokenizeOptions], only: str | None = None) -> dict[str, Any]:
    """What `measure_reader` ("reader") and `measure_tokenize` ("tokenize") find, or one of them; where it was found.

    Everything is written to a directory that is removed again.
    """
    results: dict[str, Any] = {"machine": {"processor": processor(), "cores": cores(), "jax": jax.__version__}}
    for name, run in (("reader", measure_reader), ("tokenize", measure_tokenize)):
        if only in (None, name):
            with tempfile.TemporaryDirectory() as directory:
                results[name] = run(Path(directory), options[name])
    return results


def measure_reader(directory: Path, options: ReaderOptions) -> dict[str, Any]:
    """Writes shards of random documents of 1,024 tokens in the mean and reads them packed, on one core.

    All threads of this process are kept to one core meanwhile. Returns {"tokens_per_second": the median, "rounds":
    tokens a second of each, by the clock ("waited") and by the processor ("work", where others use that core too),
    "documents", "mean_length", "filled", "packing_seconds": from opened shards to the first row, "options"}.
    """
    grammar = _grammar()
    documents = _documents(grammar, options.tokens // MEAN_LENGTH)
    written = write_shards(directory / "shards", documents, grammar.vocabulary, grammar, {"made by": "bench"})
    if not hasattr(os, "sched_setaffinity"):
        raise OmniError("the reader is measured on one core, to which this system cannot keep a process; Linux can")
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})  # of this thread and of those that it starts, so shards are opened after it
    try:
        shards = TokenShards(written)
        start = time.perf_counter()
        rows = PackedRows(shards, options.row_length, seed=0)
        _ = rows[0]
        packing = time.perf_counter() - start
        rates = [_rates(rows, epoch) for epoch in range(options.rounds)]
    finally:
        os.sched_setaffinity(0, allowed)
    rounds = {name: [round(rate[name]) for rate in rates] for name in rates[0]}
    return {
        "tokens_per_second": {name: round(statistics.median(found)) for name, found in rounds.items()},
        "rounds": rounds,
        "documents": len(shards),
        "mean_length": round(float(shards.lengths.mean()), 1),
        "filled": round(rows.packing.efficiency, 4),
        "packing_seconds": round(packing, 3),
        "options": vars(options),
    }


def measure_tokenize(directory: Path, options: TokenizeOptions) -> dict[str, Any]:
    """Tokenizes pictures from JPEG files, and the same ones from arrays in memory, in turn, with one tokenizer.

    What is done once is in neither: the tokenizer is loaded, compiled, and copied beside the finished shards.

    Returns {"pictures_per_second": {"memory", "files"}, "share": files beside memory, by the clock ("waited") and by
    the processors ("work", of use where others keep them busy, and the tokenizer runs on them), both medians of the
    rounds; "rounds": all of them, "size", "options"}.
    """
    work = _prepared_work(directory, options)
    tokenizer = work.processor.tokenizers["image"]
    pixels = np.stack([work.processor.prepared(work.samples[i][1]).pixels for i in range(options.pictures)])
    batches = [pixels[i : i + options.batch_size] for i in range(0, len(pixels), options.batch_size)]
    _ = tokenizer.encode(batches[0]), tokenizer.encode(batches[-1])  # compiles
    rounds = {side: {"waited": [], "work": []} for side in ("memory", "files")}
    for _ in range(options.rounds):
        work.partial.mkdir()
        for side in rounds:
            start, start_of_work = time.perf_counter(), time.process_time()
            if side == "files":
                work.write(range(work.count))
            else:
                for batch in batches:
                    tokenizer.encode(batch)
            rounds[side]["work"].append(options.pictures / (time.process_time() - start_of_work))
            rounds[side]["waited"].append(options.pictures / (time.perf_counter() - start))
        work.partial.rmtree()
    pairs = {name: zip(rounds["files"][name], rounds["memory"][name], strict=True) for name in ("waited", "work")}
    return {
        "pictures_per_second": {side: round(statistics.median(rates["waited"]), 3) for side, rates in rounds.items()},
        "share": {name: round(statistics.median(f / m for f, m in each), 4) for name, each in pairs.items()},
        "rounds": rounds,
        "size": tokenizer.image_size,
        "options": vars(options),
    }


def _prepared_work(directory: Path, options: TokenizeOptions) -> Work:
    """Documents of a word and a JPEG file larger than the tokenizer takes, and what tokenizes them."""
    tokenizers = {"text": str(directory / "text"), "image": options.tokenizer or str(directory / "image")}
    TextTokenizer.train(["a picture"]).save(tokenizers["text"])
    if options.tokenizer is None:
        config = VQGANConfig(
            image_size=256, quantizer=LearnedQuantizerConfig(codebook_size=16384, dim=8, normalize="always")
        )
        VQGANTokenizer(config, VQGANTokenizer.net_class(config, rngs=nnx.Rngs(0))).save(tokenizers["image"])
    random, lines = np.random.default_rng(0), []
    for number in range(options.pictures):
        coarse = PIL.Image.fromarray(random.integers(0, 256, (12, 16, 3), np.uint8))
        coarse.resize((512, 384), PIL.Image.Resampling.BICUBIC).save(directory / f"{number}.jpg", quality=90)
        parts = [{"text": "a picture", "context": True}, {"image": f"{number}.jpg"}]
        lines.append(json.dumps({"parts": parts}) + "\n")
    (directory / "pictures.jsonl").write_text("".join(lines))
    source = JsonLines(str(directory / "pictures.jsonl"))
    return Work(TokenizeConfig(str(directory / "tokens"), source, tokenizers, batch_size=options.batch_size))


def as_text(results: dict[str, Any]) -> str:
    """What was measured, in a line or two."""
    machine = results["machine"]
    lines = [f"{machine['processor']}, {machine['cores']} cores, jax {machine['jax']}"]
    if reader := results.get("reader"):
        rates = reader["tokens_per_second"]
        lines.append(
            f"packed reader: {rates['waited'] / 1e6:.2f} million tokens/s on one core, "
            f"{rates['work'] / 1e6:.2f} a second of its work (documents of {reader['mean_length']:.0f} tokens, "
            f"rows of {reader['options']['row_length']}, {100 * reader['filled']:.1f} % filled)"
        )
    if side := results.get("tokenize"):
        rates = side["pictures_per_second"]
        lines.append(
            f"omni tokenize: {rates['files']:.1f} pictures/s from files of {rates['memory']:.1f} from memory "
            f"({100 * side['share']['waited']:.1f} %, by processor time {100 * side['share']['work']:.1f} %; "
            f"{side['size']} x {side['size']} pixels)"
        )
    return "\n".join(lines)


def _rates(rows: PackedRows, epoch: int) -> dict[str, float]:
    """Tokens a second, without padding, of the whole batches of an epoch, as training reads them."""
    count = rows.packing.rows // _BATCH
    iterator = iter(batches(grain.MapDataset.source(rows), _BATCH))
    iterator.set_state({"next_index": epoch * count})
    start, start_of_work = time.perf_counter(), time.process_time()
    tokens = sum(int((next(iterator)["segments"] > 0).sum()) for _ in range(count))
    work, waited = time.process_time() - start_of_work, time.perf_counter() - start
    return {"waited": tokens / waited, "work": tokens / work}


def _grammar() -> Grammar:
    books = [f"audio{level}" for level in range(_BOOKS)]
    blocks = {"text": 8192, "image": _CODES} | dict.fromkeys(books, _CODES)
    control = ("<bos>", "<turn>", "<eos>", "<pad>")
    special = (*control, "<image>", "</image>", "<audio>", "</audio>")
    image = {"codebooks": ["image"], "shapes": [{"rows": _SIDE, "columns": _SIDE}]}
    audio = {"codebooks": books, "shapes": [{"columns": {"min": 1, "max": _FRAMES[1]}}]}
    layouts = {
        name: each | {"open": [f"<{name}>"], "close": [f"</{name}>"]}
        for name, each in [("image", image), ("audio", audio)]
    }
    declaration = {
        "format": 1,
        "control": dict(zip(("bos", "turn", "eos", "pad"), control, strict=True)),
        "modalities": {"text": {"block": "text"}, **layouts},
    }
    return Grammar(declaration, Vocabulary.build(blocks, special))


def _documents(grammar: Grammar, count: int) -> Iterator[Tokens]:
    """A text, one to three pictures and a sound each, of random codes."""
    random = np.random.default_rng(0)
    for _ in range(count):
        text = Span("text", random.integers(0, 8192, random.integers(*_TEXT)), context=True)
        pictures = [
            Span("image", random.integers(0, _CODES, (1, _SIDE, _SIDE)))
            for _ in range(random.integers(_PICTURES[0], _PICTURES[1] + 1))
        ]
        sound = Span("audio", random.integers(0, _CODES, (_BOOKS, 1, random.integers(*_FRAMES))))
        yield grammar.pack([text, *pictures, sound])
