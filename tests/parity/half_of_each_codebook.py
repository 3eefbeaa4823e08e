"""Codes at the released sizes, from so much sound and so many pictures that at least half of each codebook is in use.

    python tests/parity/half_of_each_codebook.py docs/results/tokenizers/half_of_each_codebook.json

It takes too long for every run of the tests, whose own clips and pictures at these sizes are short and small. It goes
on where it was stopped. Weights are random, and codebooks lie amid the latents, as there, and the
comparisons are theirs.
"""

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "fixtures"))

import test_audio_codecs as audio
import test_emu3 as emu3
import test_image_tokenizers as image
import torch
import vqgan_reference as reference
from random_codecs import RELEASED, random_codec, sound
from random_vqgans import (
    TOLERANCE,
    check_codes,
    codebook_amid,
    error,
    first,
    last,
    latents,
    load,
    quantize,
    randomised,
    shapes_of,
)
from their_codecs import their_codes

import omni_tokenizers
from omni_tokenizers.checkpoints import vqgan as vqgan_checkpoints

SECONDS, MOST_CLIPS = 10, 80


def measure_codec(name: str) -> dict:
    """Clips of ten seconds until half of each codebook is in use."""
    model = random_codec(RELEASED[name](), SECONDS)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        tokenizer = omni_tokenizers.load(directory)
    used, differing, total = [set() for _ in range(tokenizer.codebooks)], 0, 0
    for seed in range(1, MOST_CLIPS):
        x = sound(model.config, 1, SECONDS * model.config.sampling_rate, seed)
        ours, theirs = tokenizer.encode(x).ids, their_codes(model, x).ids
        audio.assert_same_codes(model, tokenizer, x, ours, theirs)
        differing, total = differing + int((ours != theirs).sum()), total + ours.size
        for level, codes in zip(used, theirs[0], strict=True):
            level.update(codes.tolist())
        if min(map(len, used)) >= tokenizer.codebook_sizes[0] / 2:
            break
    share = min(map(len, used)) / tokenizer.codebook_sizes[0]
    return {"seconds": seed * SECONDS, "codes": total, "differ": differing, "least_used": share}


class Family(NamedTuple):
    """An image tokenizer: transformers' or the reference's latents of pixels, and ours with a codebook."""

    codes: int
    their_latents: Callable[[np.ndarray], np.ndarray]
    ours: Callable[[np.ndarray], omni_tokenizers.Tokenizer]
    shape: tuple[int, ...] = (1, 256, 256)


def chameleon() -> Family:
    model = image.modeling_chameleon.ChameleonVQVAE(image.transformers.models.chameleon.ChameleonVQVAEConfig()).eval()
    tensors = randomised(shapes_of(model))
    load(model, tensors)
    return Family(
        model.config.num_embeddings,
        lambda x: last(model.quant_conv(model.encoder(first(x)))),
        lambda book: vqgan_checkpoints.from_chameleon({}, tensors | {"quantize.embedding.weight": book}, "random"),
    )


def janus() -> Family:
    model = image.modeling_janus.JanusVQVAE(image.transformers.models.janus.JanusVQVAEConfig()).eval()
    tensors = randomised(shapes_of(model))
    load(model, tensors)
    return Family(
        model.config.num_embeddings,
        lambda x: last(reference.unit(model.quant_conv(model.encoder(first(x))), 1)),
        lambda book: vqgan_checkpoints.from_janus({}, tensors | {"quantize.embedding.weight": 3 * book}, "random"),
    )


def llamagen() -> Family:
    names, settings = reference.LLAMAGEN, image.LLAMAGEN_RELEASED
    tensors = randomised(reference.shapes(names, **settings))
    double = {name: torch.tensor(value).double() for name, value in tensors.items()}
    return Family(
        settings["codes"],
        lambda x: last(reference.unit(reference.encoded(double, names, first(x)), 1)),
        lambda book: vqgan_checkpoints.from_original(tensors | {"quantize.embedding.weight": 3 * book}, 256, "random"),
    )


def emu3_video() -> Family:
    model = emu3.transformers.Emu3VQVAE(emu3.transformers.Emu3VQVAEConfig()).eval()
    load(model, randomised(shapes_of(model)))

    def ours(book: np.ndarray) -> omni_tokenizers.Tokenizer:
        model.quantize.embedding.weight.copy_(torch.tensor(book))
        with tempfile.TemporaryDirectory() as directory:
            return emu3.saved(model, Path(directory))

    return Family(model.config.codebook_size, lambda x: emu3.their_latents(model, x), ours, (1, 4, 256, 256))


PICTURES = {"chameleon": chameleon, "janus": janus, "llamagen": llamagen, "emu3": emu3_video}


def pictures(shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Different noise within [-1, 1], for ever."""
    generator = np.random.default_rng(1)
    while True:
        yield generator.uniform(-1, 1, (*shape, 3)).astype(np.float32)


def measure_pictures(name: str) -> dict:
    """As many pictures as have latents for 9/16 of the codes."""
    family, theirs = PICTURES[name](), []
    with torch.no_grad():
        for x in pictures(family.shape):
            theirs.append(family.their_latents(x))
            if sum(values[..., 0].size for values in theirs) >= 9 / 16 * family.codes:
                break
        tokenizer = family.ours(codebook_amid(np.concatenate(theirs), family.codes, spread=0.01))
    largest, codes = 0.0, []
    for x, values in zip(pictures(family.shape), theirs, strict=False):
        ours = latents(tokenizer.net, x)
        largest = max(largest, error(ours, values))
        codes.append(np.asarray(quantize(tokenizer.net, ours)))
    assert largest < TOLERANCE, largest
    codes = np.concatenate(codes)
    ties = check_codes(codes, np.concatenate(theirs), tokenizer.code_vectors[0])
    return {
        "pictures": len(theirs),
        "codes": codes.size,
        "differ": ties,
        "least_used": len(np.unique(codes)) / family.codes,
        "latents_within": largest,
    }


def main() -> None:
    """Measures what the file does not hold yet, and fails if less than half of a codebook was in use."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="JSON file, to which each family is added")
    output = parser.parse_args().output
    content = json.loads(output.read_text()) if output.exists() else {"families": {}}
    content["command"] = shlex.join(["python", "tests/parity/half_of_each_codebook.py", str(output)])
    for name in (*RELEASED, *PICTURES):
        if name not in content["families"]:
            content["families"][name] = measure_pictures(name) if name in PICTURES else measure_codec(name)
            print(name, content["families"][name], flush=True)
            output.write_text(json.dumps(content, indent=1) + "\n")
    unused = [name for name, found in content["families"].items() if found["least_used"] < 0.5]
    if unused:
        sys.exit(f"less than half of a codebook was in use: {', '.join(unused)}")


if __name__ == "__main__":
    main()
