"""`omni bench streams`: how long a step of a stream takes beside the sound or the video that it stands for."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from omni.bench.report import processor
from omni.bench.sides import cores
from omni_tokenizers.audio import AudioTokenizer, AudioTokenizerConfig
from omni_tokenizers.encodec import EncodecConfig, EncodecTokenizer
from omni_tokenizers.errors import UsageError
from omni_tokenizers.mimi import MimiConfig, MimiTokenizer
from omni_tokenizers.streaming import StreamingTokenizer
from omni_tokenizers.video import VideoTokenizer, VideoTokenizerConfig

_UNTIMED = 4
"""Pieces before the clock starts: a row's first step may wait for several, and two shapes are compiled."""


@dataclasses.dataclass(frozen=True)
class Streamed:
    """A tokenizer that streams, and its step."""

    title: str
    """What it is called in the table."""
    kind: type[StreamingTokenizer]
    """Its class."""
    config: Any
    """Its configuration."""
    frames: int
    """Frames of codes that a step takes."""
    rate: float
    """Samples or pictures a second."""


STREAMS = {
    "encodec": Streamed("EnCodec 24 kHz", EncodecTokenizer, EncodecConfig(), 6, 24000),
    "mimi": Streamed("Mimi 24 kHz", MimiTokenizer, MimiConfig(), 1, 24000),
    "spectral": Streamed(
        "spectral codec 24 kHz",
        AudioTokenizer,
        AudioTokenizerConfig(
            *(24000, 320, 1280, 100, 256, 3, 5, 1), codebooks=4, codebook_size=1024, code_dim=32, causal=True
        ),
        6,
        24000,
    ),
    "video": Streamed("video, 128 x 128 pixels at 24 a second", VideoTokenizer, VideoTokenizerConfig(), 1, 24),
}
"""Steps of sound are 80 ms, which Mimi's frames are."""


@dataclasses.dataclass(frozen=True)
class StreamOptions:
    """What is streamed."""

    families: tuple[str, ...] = tuple(STREAMS)
    """Keys of `STREAMS`."""
    rows: int = 1
    """Sounds or videos at a time."""
    seconds: float = 10.0
    """How much of each, in its own time."""

    def __post_init__(self) -> None:
        if unknown := set(self.families) - set(STREAMS):
            raise UsageError(f"unknown stream {min(unknown)!r}; known are {', '.join(STREAMS)}")
        if self.rows < 1 or not 1 <= self.seconds <= 3600:
            raise UsageError(f"rows is at least 1 and seconds 1 to 3600, got {self.rows} and {self.seconds:g}")


def measure(options: StreamOptions) -> dict[str, Any]:
    """Streams noise through random weights: `{"machine", "options", "cells"}`, times in seconds.

    A cell has the `seconds` of sound or video that a step stands for, the `median` that a step took, the time within
    which 99 of 100 were done (`slow`), and `share`, the median over the seconds: below 1 it keeps up.
    """
    cells = []
    for name in tqdm(options.families, unit="stream", disable=None):
        cells += _measured(STREAMS[name], options)
    device = jax.devices()[0]
    machine = {"processor": processor(), "cores": cores(), "jax": jax.__version__, "device": device.device_kind}
    return {"machine": machine, "options": dataclasses.asdict(options), "cells": cells}


def _measured(streamed: Streamed, options: StreamOptions) -> list[dict[str, Any]]:
    """The cells of both ways; each piece fills a step, and its codes are decoded before the next one comes."""
    config = streamed.config
    tokenizer = streamed.kind(config, streamed.kind.net_class(config, rngs=nnx.Rngs(0)))
    encoder, decoder = tokenizer.stream(options.rows, frames=streamed.frames)
    length = streamed.frames * tokenizer.frame_length
    seconds, times = length / streamed.rate, {"encode": [], "decode": []}
    random = np.random.default_rng(0)
    for _ in range(_UNTIMED + math.ceil(options.seconds / seconds)):
        noise = random.integers(0, 256, (options.rows, *encoder.shape_in(length)))
        pieces = list((noise / 256 - 0.5).astype(np.float32) if encoder.dtype == np.float32 else noise.astype(np.uint8))
        start = time.perf_counter()
        codes = encoder.push(pieces)
        between = time.perf_counter()
        decoder.push(codes)
        times["encode"].append(between - start)
        times["decode"].append(time.perf_counter() - between)
    return [_cell(streamed, verb, seconds, found[_UNTIMED:]) for verb, found in times.items()]


def _cell(streamed: Streamed, verb: str, seconds: float, times: list[float]) -> dict[str, Any]:
    median = statistics.median(times)
    return {
        "tokenizer": streamed.title,
        "verb": verb,
        "steps": len(times),
        "seconds": seconds,
        "median": median,
        "slow": float(np.quantile(times, 0.99)),
        "share": median / seconds,
    }


def as_markdown(results: dict[str, Any]) -> str:
    """The machine in a line, and the cells as a table."""
    machine, rows = results["machine"], results["options"]["rows"]
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['device']}, jax {machine['jax']}; rows: {rows}",
        "",
        "| tokenizer | | a step of, ms | takes, ms | 99 of 100 within, ms | share of real time |",
        "|---|---|---|---|---|---|",
    ]
    for cell in results["cells"]:
        step, median, slow = (f"{1000 * cell[name]:.1f}" for name in ("seconds", "median", "slow"))
        lines.append(f"| {cell['tokenizer']} | {cell['verb']} | {step} | {median} | {slow} | {cell['share']:.2f} |")
    return "\n".join(lines)
