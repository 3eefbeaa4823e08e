"""`omni inspect`: what a model is made of, whether a run's checkpoints are whole, where a document comes from."""

from __future__ import annotations

import itertools

import numpy as np
from etils import epath
from flax import nnx

import omni_tokenizers
from omni.bundle import Model, load
from omni.data.shards import TokenShards
from omni.processor import Processor
from omni.train.manifests import has_manifest, verify
from omni.train.run_directory import CHECKPOINTS
from omni_tokenizers import weights
from omni_tokenizers.errors import OmniError, UsageError


def describe(name: str) -> dict:
    """Parameters by module, vocabulary blocks, grammar, memory and a sample of the training data, as JSON."""
    model = load(epath.Path(name))  # a string may be the name of a repository, which nobody means here
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
    documents = TokenShards(shards)
    step = max(1, len(documents) // count)
    return [
        " | ".join(f"{'context' if part.context else 'target'} {part!r}" for part in model.decode(documents[i]["ids"]))
        for i in range(0, step * count, step)
    ]


def describe_document(name: str, number: int) -> dict:
    """Where a document of token shards comes from and what it holds, as JSON.

    Raises:
      OmniError: there are no token shards, or damaged ones.
      UsageError: they have no such document.
    """
    shards = TokenShards(name)
    if not 0 <= number < len(shards):
        raise UsageError(f"{name}: there is no document {number}; they are numbered from 0 to {len(shards) - 1}")
    document, origin, provenance = shards[number], shards.origin(number), shards.manifest["provenance"]
    text = shards.directory / "tokenizers" / "text"
    tokenizers = {"text": omni_tokenizers.load(text)} if text.exists() else {}
    processor = Processor(shards.vocabulary, shards.grammar, tokenizers)
    parts = []
    for span in shards.grammar.parse(document["ids"]):
        part = {"modality": span.modality, "context": span.context, "codes": list(span.codes.shape)}
        if span.modality in tokenizers:
            part["text"] = processor.parts([[span]])[0][0].text
        parts.append(part)
    return {
        "shards": str(name),
        "document": number,
        "origin": origin if origin is None else f"{provenance.get('folder', '.')}/{origin}",
        "source": provenance.get("source"),
        "tokens": len(document["ids"]),
        "target_tokens": int(document["target"].sum()),
        "parts": parts,
    }


def verify_run(name: str) -> dict[str, list[str] | None]:
    """What is wrong with each checkpoint of a run, and of the trainings in it, by path: a line for each file.

    A checkpoint without a manifest, as earlier versions wrote them, has None instead of lines.

    Raises:
      OmniError: there are no checkpoints.
    """
    run = epath.Path(name)
    roots = [root for pattern in ("", "*/", "*/*/") for root in sorted(run.glob(f"{pattern}{CHECKPOINTS}"))]
    steps = [path for root in roots for path in root.iterdir() if path.name.isdigit()]
    if not steps:
        raise OmniError(f"{name}: there are no checkpoints to verify; name the directory of a training run")
    steps.sort(key=lambda path: (path.parent, int(path.name)))
    return {str(path): verify(path) if has_manifest(path) else None for path in steps}


def print_verification(found: dict[str, list[str] | None]) -> None:
    """Prints what `verify_run` found, for people."""
    for path, wrong in found.items():
        if wrong is None:
            print(f"{path}: not verified (it has no manifest)")
        for line in wrong or ():
            print(f"{path}: {line}")
        if wrong == []:
            print(f"{path}: whole")


def print_document(found: dict) -> None:
    """Prints what `describe_document` found, for people."""
    print(f"{found['shards']}, document {found['document']}: from {found['origin'] or 'where is not recorded'}")
    print(f"  {found['tokens']} tokens, {found['target_tokens']} of them to be learned")
    for part in found["parts"]:
        codes = " x ".join(map(str, part["codes"]))
        content = repr(part["text"]) if "text" in part else f"of {codes} codes"
        print(f"  {'context' if part['context'] else 'target'} {part['modality']} {content}")


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
