"""Codes at the released sizes, with at least half of each codebook in use.

    python tests/parity/half_of_each_codebook.py docs/results/tokenizers/half_of_each_codebook.json

It takes too long for every run of the tests, whose own clips and pictures at these sizes are short and small. It goes
on where it was stopped. Weights are random, and codebooks lie amid the latents, as there.

Of clips and pictures, latents and codes are compared. So that few of them use half of each codebook, both sides
quantise these latents again, each time with their channels scaled otherwise. Codes must be equal but for near-ties, as
`near_ties` has them.
"""

import argparse
import copy
import itertools
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "fixtures"))

import jax.numpy as jnp
import near_ties
import random_codecs
import test_audio_codecs as audio
import test_emu3 as emu3
import test_image_tokenizers as image
import torch
import vqgan_reference as reference
from flax import nnx
from random_codecs import RELEASED, random_codec, sound
from random_vqgans import TOLERANCE, codebook_amid, error, first, last, latents, load, quantize, randomised, shapes_of
from their_codecs import pieces, their_codes

import omni_tokenizers
from omni_tokenizers.checkpoints import vqgan as vqgan_checkpoints
from omni_tokenizers.mimi import MimiNet

SECONDS, MOST_CLIPS, MOST_PICTURES = 4, 50, 8
SCALINGS = 12
"""How often latents are quantised, each time with other scales of their channels; the first time with none."""


def scalings(channels: int) -> Iterator[np.ndarray]:
    """A float32 [channels] each time. Powers of two leave every latent's rounding as it is."""
    generator = np.random.default_rng(0)
    yield np.ones(channels, np.float32)
    for _ in range(SCALINGS - 1):
        yield np.exp2(generator.integers(-2, 2, channels)).astype(np.float32)


def measure_codec(name: str) -> dict:
    """Clips of a few seconds, and their latents scaled, until half of each codebook is in use."""
    model = random_codec(RELEASED[name](), SECONDS)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        tokenizer = omni_tokenizers.load(directory)
    exact = copy.deepcopy(model).double()
    used, differing, total = [set() for _ in range(tokenizer.codebooks)], np.zeros(2, int), np.zeros(2, int)
    for seed in range(1, MOST_CLIPS + 1):
        x = sound(model.config, 1, SECONDS * model.config.sampling_rate, seed)
        ours, theirs = tokenizer.encode(x).ids, their_codes(model, x).ids
        audio.assert_same_codes(model, tokenizer, x, ours, theirs)
        for number, (one, other) in enumerate([(ours[0], theirs[0]), *requantised(model, exact, tokenizer, x)]):
            differing[min(number, 1)] += (one != other).sum()
            total[min(number, 1)] += one.size
            for level, codes in zip(used, other, strict=True):
                level.update(codes.tolist())
        if min(map(len, used)) >= tokenizer.codebook_sizes[0] / 2:
            break
    return {
        "seconds": seed * SECONDS,
        "codes": int(total[0]),
        "differ": int(differing[0]),
        "scaled_codes": int(total[1]),
        "scaled_differ": int(differing[1]),
        "least_used": min(map(len, used)) / tokenizer.codebook_sizes[0],
    }


@torch.no_grad()
def requantised(model, exact, tokenizer, x: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Our and their codes [codebooks, frames] of their latents of a clip, in each scaling but the first."""
    rows = torch.cat([random_codecs.latents(model, torch.tensor(piece)) for _, _, piece in pieces(tokenizer, x)])
    for scales in list(scalings(rows.shape[1]))[1:]:
        values = rows * torch.tensor(scales)
        ours, theirs = np.asarray(quantise_sound(tokenizer.net, values.numpy())), random_codecs.quantised(model, values)
        assert random_codecs.are_near_ties(model, exact, values, values.double(), theirs, ours)
        yield ours, theirs


@nnx.jit
def quantise_sound(net, values):
    """Our codes [codebooks, frames] of latents [frames, dim]."""
    parts = (net.semantic, net.acoustic) if isinstance(net, MimiNet) else (net.quantizer,)
    return jnp.concatenate([part.encode(values[None], len(part.levels))[0] for part in parts])


class Family(NamedTuple):
    """An image tokenizer: transformers' or the reference's latents of pixels in some precision, and ours with a
    codebook."""

    codes: int
    their_latents: Callable[[np.ndarray, torch.dtype], np.ndarray]
    ours: Callable[[np.ndarray], omni_tokenizers.Tokenizer]
    shape: tuple[int, ...] = (1, 256, 256)


def encoded(model, x: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """What a VQGAN of transformers compares with its codebook, channels second."""
    return model.quant_conv(model.encoder(first(x).to(dtype)))


def chameleon() -> Family:
    model = image.modeling_chameleon.ChameleonVQVAE(image.transformers.models.chameleon.ChameleonVQVAEConfig()).eval()
    tensors = randomised(shapes_of(model))
    load(model, tensors)
    return Family(
        model.config.num_embeddings,
        lambda x, dtype: last(encoded(model.to(dtype), x, dtype)),
        lambda book: vqgan_checkpoints.from_chameleon({}, tensors | {"quantize.embedding.weight": book}, "random"),
    )


def janus() -> Family:
    model = image.modeling_janus.JanusVQVAE(image.transformers.models.janus.JanusVQVAEConfig()).eval()
    tensors = randomised(shapes_of(model))
    load(model, tensors)
    return Family(
        model.config.num_embeddings,
        lambda x, dtype: last(reference.unit(encoded(model.to(dtype), x, dtype), 1)),
        lambda book: vqgan_checkpoints.from_janus({}, tensors | {"quantize.embedding.weight": 3 * book}, "random"),
    )


def llamagen() -> Family:
    names, settings = reference.LLAMAGEN, image.LLAMAGEN_RELEASED
    tensors = randomised(reference.shapes(names, **settings))

    def their_latents(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
        weights = {name: torch.tensor(value).to(dtype) for name, value in tensors.items()}
        return last(reference.unit(reference.encoded(weights, names, first(x).to(dtype)), 1))

    return Family(
        settings["codes"],
        their_latents,
        lambda book: vqgan_checkpoints.from_original(tensors | {"quantize.embedding.weight": 3 * book}, 256, "random"),
    )


def emu3_video() -> Family:
    model = emu3.transformers.Emu3VQVAE(emu3.transformers.Emu3VQVAEConfig()).eval()
    load(model, randomised(shapes_of(model)))

    def ours(book: np.ndarray) -> omni_tokenizers.Tokenizer:
        model.quantize.embedding.weight.copy_(torch.tensor(book))
        with tempfile.TemporaryDirectory() as directory:
            return emu3.saved(model, Path(directory))

    return Family(
        model.config.codebook_size,
        lambda x, dtype: emu3.their_latents(model.to(dtype), x),
        ours,
        (1, 4, 256, 256),
    )


PICTURES = {"chameleon": chameleon, "janus": janus, "llamagen": llamagen, "emu3": emu3_video}


def pictures(shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Different noise within [-1, 1], for ever."""
    generator = np.random.default_rng(1)
    while True:
        yield generator.uniform(-1, 1, (*shape, 3)).astype(np.float32)


@torch.no_grad()
def measure_pictures(name: str) -> dict:
    """As many pictures as use half of the codes; first as many as have latents for 9/16 of them, in all scalings."""
    family, shown, exact, rounded = PICTURES[name](), [], [], []
    for x in itertools.islice(pictures(family.shape), MOST_PICTURES):
        shown.append(x)
        exact.append(family.their_latents(x, torch.float64))
        rounded.append(family.their_latents(x, torch.float32))
        if SCALINGS * sum(values[..., 0].size for values in exact) < 9 / 16 * family.codes:
            continue
        found = measure_latents(family, shown, exact, rounded)
        if found["least_used"] >= 0.5:
            break
    return found


def measure_latents(
    family: Family, shown: list[np.ndarray], exact: list[np.ndarray], rounded: list[np.ndarray]
) -> dict:
    """Our latents beside theirs, and our codes beside those of theirs, with a codebook amid them."""
    scales = list(scalings(exact[0].shape[-1]))
    book = codebook_amid(np.concatenate([flat(exact) * each for each in scales]), family.codes, spread=0.01)
    tokenizer = family.ours(book)
    ours = [np.asarray(latents(tokenizer.net, x)) for x in shown]
    largest = max(error(*each) for each in zip(ours, exact, strict=True))
    assert largest < TOLERANCE, largest
    used, differing = set(), []
    for each in scales:
        codes = np.concatenate([np.ravel(quantize(tokenizer.net, values * each)) for values in ours])
        nearest = their_nearest(flat(exact) * each, flat(rounded) * each, tokenizer.code_vectors[0], codes)
        differing.append(int((codes != nearest).sum()))
        used.update(nearest.tolist())
    return {
        "pictures": len(shown),
        "codes": len(codes),
        "differ": differing[0],
        "scaled_codes": len(codes) * (SCALINGS - 1),
        "scaled_differ": sum(differing[1:]),
        "least_used": len(used) / family.codes,
        "latents_within": largest,
    }


def flat(values: list[np.ndarray]) -> np.ndarray:
    """All latents, [n, dim]."""
    return np.concatenate([each.reshape(-1, each.shape[-1]) for each in values])


def their_nearest(exact: np.ndarray, rounded: np.ndarray, book: np.ndarray, ours: np.ndarray) -> np.ndarray:
    """The code of each latent [n, dim] in float64; fails where ours [n] is no near-tie of it."""
    exact, rounded, vectors = torch.tensor(exact), torch.tensor(rounded), torch.tensor(book)
    bound = near_ties.rounding(exact, vectors.double(), rounded, vectors)
    nearest = []
    for part in near_ties.parts(len(exact), len(book)):
        distances = near_ties.squared_distances(exact[part], vectors.double())
        least, codes = distances.min(1)
        excess = distances.gather(1, torch.tensor(ours[part], dtype=torch.long)[:, None])[:, 0] - least
        assert excess.max() <= bound, (excess.max(), bound)
        nearest.append(codes.numpy())
    return np.concatenate(nearest)


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
