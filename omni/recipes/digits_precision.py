"""What the model in the box loses where weights and cache are held in fewer bits.

    python -m omni.recipes.digits_precision runs/digits_data docs/results/precision.json

The first argument is a directory for the digits' data, which is made where it is missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import omni
from omni.exits import exits
from omni.generate.prompt import shared
from omni.grammar import Tokens
from omni.model import Decoder, apply_decoder, init_cache
from omni.parts import Audio, Image, Text
from omni.recipes import digits_data
from omni.recipes.digits_documents import draw
from omni.recipes.digits_evaluation import evaluation_data

WAYS = {
    "float32": (None, None),
    "bfloat16": ("bfloat16", "bfloat16"),
    "int8 weights": ("int8", None),
    "int8 cache": (None, "int8"),
    "int8 both": ("int8", "int8"),
}
"""Types of weights and cache; None is the compute type, float32, in which all of them compute."""
SEED = 1_000_003  # no training draws documents with it
ROWS = 16  # documents that are read together


def measure(directory: Path, documents: int, replies: int) -> dict[str, Any]:
    """Each way of `WAYS`: `loss` in nats a token of held-out documents, each read into the cache at once; `likeliest`,
    the share of their tokens at which the likeliest next id is float32's; `same_replies` and `same_tokens`, the shares
    of greedy replies that are float32's, and of tokens before a reply's first difference; `weights`, bytes of the
    decoder's arrays, and `cache`, those of one token."""
    digits_data.prepare(directory)
    data, found, first = evaluation_data(directory), {}, None
    requests = [omni.Request([each.text], list(each.order), temperature=0) for each in data.requests[:replies]]
    for name, (weights, cache) in tqdm(WAYS.items(), unit="way", disable=None):
        model = omni.load("digits", weights_dtype=weights, cache_dtype=cache)
        decoder, held_out = model.engine.decoder, held_out_documents(model, data, documents)
        losses, likeliest = read(decoder, model, held_out)
        ids = [reply.ids for reply in model.generate_batch(requests)]
        first = first or (likeliest, ids)
        alike = [shared(own, others) for own, others in zip(ids, first[1], strict=True)]
        found[name] = {
            "loss": float(np.mean(losses)),
            "likeliest": float(np.mean(likeliest == first[0])),
            "same_replies": float(np.mean([np.array_equal(*pair) for pair in zip(ids, first[1], strict=True)])),
            "same_tokens": sum(alike) / sum(map(len, first[1])),
            "weights": held_bytes(decoder),
            "cache": sum(leaf.nbytes for leaf in jax.tree.leaves(init_cache(model.config, 1, 1, cache))),
        }
    counts = {
        "documents": documents,
        "tokens": len(losses),
        "replies": len(requests),
        "reply_tokens": sum(map(len, first[1])),
    }
    return {"model": "digits", "jax": jax.__version__, "device": jax.devices()[0].device_kind, **counts, "ways": found}


def held_bytes(decoder: Decoder) -> int:
    """Bytes of its arrays; a tied head that is the embedding counts once."""
    return sum({id(leaf): leaf.nbytes for leaf in jax.tree.leaves(decoder)}.values())


def held_out_documents(model: omni.Model, data: Any, count: int) -> list[Tokens]:
    """Documents as training draws them, of scans and voices that it never saw."""

    def part(modality: str, value: str | int, digit: int, context: bool) -> Text | Image | Audio:
        if modality == "text":
            return Text(value, context=context)
        examples = data.test[modality]
        own = np.flatnonzero(examples.labels == digit)
        example = examples.parts[own[value % len(own)]]
        if modality == "image":
            return Image(example.pixels, context=context)
        return Audio(example.samples, example.sample_rate, context=context)

    plans = [draw(index, SEED) for index in range(count)]
    documents = [
        [
            part(*element, plan.digit, context)
            for context in (True, False)
            for element in (plan.target, plan.context)[context]
        ]
        for plan in plans
    ]
    return [model.grammar.pack(spans) for spans in model.processor.spans(documents)]


def read(decoder: Decoder, model: omni.Model, documents: Sequence[Tokens]) -> tuple[np.ndarray, np.ndarray]:
    """What each token of all documents costs after those before it, and the likeliest id in its place."""
    longest = max(len(document.ids) for document in documents)
    step, losses, likeliest = jax.jit(apply_decoder), [], []
    for start in range(0, len(documents), ROWS):
        batch = documents[start : start + ROWS]
        ids = np.full((ROWS, longest), model.grammar.control["pad"], np.int32)
        positions = np.zeros((ROWS, longest, 3), np.int32)
        for row, document in enumerate(batch):
            index = np.arange(len(document.ids))
            ids[row, index], positions[row, index] = document.ids, model.grammar.positions(document.states, index)
        cache = init_cache(model.config, ROWS, longest, model.cache_dtype)
        logits, _ = step(decoder, ids, positions, np.zeros(ROWS, np.int32), cache)
        nats = -np.asarray(jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=-1))[..., 0]
        best = np.asarray(jnp.argmax(logits[:, :-1], axis=-1))
        for row, document in enumerate(batch):
            losses.append(nats[row, : len(document.ids) - 1])
            likeliest.append(best[row, : len(document.ids) - 1])
    return np.concatenate(losses), np.concatenate(likeliest)


def main() -> None:
    """Measures, writes the JSON and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the directory of the digits' data, made where it is missing")
    parser.add_argument("results", type=Path, help="the JSON file to write")
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--replies", type=int, default=300)
    options = parser.parse_args()
    with exits():
        counts = f"--documents {options.documents} --replies {options.replies}"
        command = f"python -m omni.recipes.digits_precision {options.data} {options.results} {counts}"
        results = {"command": command} | measure(options.data, options.documents, options.replies)
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
