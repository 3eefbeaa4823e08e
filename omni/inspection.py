"""`omni inspect`: what a model is made of."""

from __future__ import annotations

import itertools

import numpy as np
from etils import epath
from flax import nnx

from omni.bundle import Model, load
from omni_tokenizers import weights


def describe(name: str) -> dict:
    """Parameters by module, vocabulary blocks, grammar, memory and a sample of the training data, as JSON."""
    model = load(name)
    tensors = weights.flatten(nnx.state(model.transformer, nnx.Param))
    return {
        "model": str(name),
        "parameters": _parameters(model, tensors),
        "vocabulary": {
            "size": model.vocabulary.size,
            "hash": model.vocabulary.hash,
            "blocks": {
                block: {"codes": len(table), "first": int(table.min()), "last": int(table.max())}
                for block, table in model.vocabulary.blocks.items()
            },
            "special": dict(model.vocabulary.special),
        },
        "grammar": {
            "hash": model.grammar.hash,
            "states": len(model.grammar.tables.cost),
            "modalities": {
                modality: {"sizes": layout.sizes(), "tokens": [min(layout.by_length), max(layout.by_length)]}
                for modality, layout in model.grammar.layouts.items()
            },
        },
        "context_length": model.context_length,
        "memory": _memory(model, tensors),
        "sample": _sample(model, epath.Path(name)),
    }


def _parameters(model: Model, tensors: dict[str, np.ndarray]) -> dict[str, int]:
    counts = {f"transformer.{tensor}": value.size for tensor, value in tensors.items()}
    for modality, tokenizer in model.tokenizers.items():
        if hasattr(tokenizer, "net"):
            flat = weights.flatten(nnx.state(tokenizer.net))
            for module, group in itertools.groupby(flat.items(), key=lambda item: item[0].split(".")[0]):
                counts[f"{modality} tokenizer.{module}"] = sum(value.size for _, value in group)
    return {module: int(count) for module, count in counts.items()}


def _memory(model: Model, tensors: dict[str, np.ndarray]) -> dict[str, int]:
    """Bytes: weights in float32, training state (with gradients and Adam's moments), a row's full cache."""
    size = sum(value.nbytes for value in tensors.values())
    config = model.config
    width = 2 if config.compute_dtype == "bfloat16" else 4
    cache = 2 * config.depth * model.context_length * config.key_value_heads * config.head_dim * width
    return {"weights": size, "training": 4 * size, "cache_per_row": cache}


def _sample(model: Model, run: epath.Path, count: int = 3) -> list[str]:
    """A few training documents, decoded, where the run's token shards are still there."""
    shards = run / "tokens"
    if not (shards / "manifest.json").exists():
        return []
    from omni.data.shards import TokenShards

    documents = TokenShards(shards)
    step = max(1, len(documents) // count)
    return [
        " | ".join(f"{'context' if part.context else 'target'} {part!r}" for part in model.decode(documents[i]["ids"]))
        for i in range(0, step * count, step)
    ]


def print_description(description: dict) -> None:
    """Prints what `describe` found, for people."""
    counts = description["parameters"]
    print(f"{description['model']}: {sum(counts.values()) / 1e6:.2f} million parameters")
    for module, count in counts.items():
        print(f"  {module:<40} {count:>12,}")
    vocabulary = description["vocabulary"]
    print(f"vocabulary {vocabulary['hash']}: {vocabulary['size']} ids")
    for block, entry in vocabulary["blocks"].items():
        print(f"  {block:<40} {entry['codes']:>6} codes at {entry['first']}..{entry['last']}")
    print(f"  special: {' '.join(f'{name}={token}' for name, token in vocabulary['special'].items())}")
    print(f"grammar {description['grammar']['hash']}: {description['grammar']['states']} states")
    for modality, entry in description["grammar"]["modalities"].items():
        low, high = entry["tokens"]
        print(
            f"  {modality:<10} sizes {entry['sizes']}: {low}..{high} tokens"
            if low < high
            else f"  {modality:<10} sizes {entry['sizes']}: {low} tokens"
        )
    print(f"context: {description['context_length']} tokens")
    print(
        "memory: " + ", ".join(f"{k.replace('_', ' ')} {v / 2**20:.1f} MiB" for k, v in description["memory"].items())
    )
    for line in description["sample"]:
        print(f"training sample: {line}")
