"""Random weights for image tokenizers, pictures for them, and how far two answers are apart.

The other side computes in float64 from the same float32 weights, so that the tolerance measures our error alone.
"""

import numpy as np
import torch
from flax import nnx

from omni_tokenizers.checkpoints.interop import to_state

TOLERANCE = 1e-4
"""Latents and pictures may differ by this share of their level."""
TIE = 1e-5
"""Codes may differ where two distances do not, relatively."""


@nnx.jit
def latents(net, image):
    return net.latents(image)


@nnx.jit
def quantize(net, values):
    return net.quantize(values)


@nnx.jit
def reconstruct(net, codes):
    return net.reconstruct(codes)


@nnx.jit
def decoder_input(net, codes):
    return net.decoder_input(codes)


def randomised(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """A float32 tensor for each shape: norms about 1, biases about 0, matrices that keep the size of what they map.

    The first convolution makes values so small that the first norm's epsilon counts, as it does beside running
    variances of 0.01, after which scales of about 0.1 make values of about 1 again.
    """
    generator, tensors = np.random.default_rng(seed), {}
    for name, shape in shapes.items():
        noise = generator.standard_normal(shape, np.float32)
        if len(shape) > 1:
            tensors[name] = noise / np.float32(np.sqrt(np.prod(shape[1:])))
        elif name.endswith("running_var"):
            tensors[name] = np.float32(0.01) * np.square(1 + np.float32(0.3) * noise)
        else:
            tensors[name] = np.float32(0.3) * noise + np.float32("norm" in name and name.endswith("weight"))
        if name.startswith("encoder.conv_in."):
            tensors[name] *= np.float32(0.02)
        if name.endswith("weight") and name.replace("weight", "running_var") in shapes:
            tensors[name] *= np.float32(0.1)
    return tensors


def images(*shape: int) -> np.ndarray:
    """Noise within [-1, 1], [*shape, 3]."""
    return np.random.default_rng(1).uniform(-1, 1, (*shape, 3)).astype(np.float32)


def load(model, tensors: dict[str, np.ndarray]) -> None:
    """Fills a model of transformers, and lets it compute in float64; a count of batches stays as it is."""
    found = {name: torch.tensor(value) for name, value in tensors.items()}
    counts = {name: value for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")}
    model.float().load_state_dict(counts | found)
    model.requires_grad_(False).double()


def shapes_of(model) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of a model of transformers but counts of batches."""
    return {name: tuple(x.shape) for name, x in model.state_dict().items() if x.is_floating_point()}


def first(array) -> torch.Tensor:
    """Channels last to channels second, float64."""
    return torch.tensor(np.moveaxis(np.asarray(array, np.float64), -1, 1))


def last(tensor: torch.Tensor) -> np.ndarray:
    """Channels second to channels last."""
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


def error(ours, theirs: np.ndarray) -> float:
    """The largest difference over the root mean square."""
    assert ours.shape == theirs.shape and np.std(theirs) > 0
    return float(np.abs(np.asarray(ours, np.float64) - theirs).max() / np.sqrt(np.square(theirs).mean()))


def codebook_amid(values: np.ndarray, size: int, seed: int = 2, spread: float = 0.1) -> np.ndarray:
    """Codes near latents that occur, so that most of them are used; where these are few, several codes near each.

    `spread` is how far they are from these, as a share of the latents' own spread.
    """
    generator, flat = np.random.default_rng(seed), values.reshape(-1, values.shape[-1])
    chosen = flat[generator.permutation(max(len(flat), size))[:size] % len(flat)]
    return (chosen + spread * flat.std() * generator.standard_normal(chosen.shape)).astype(np.float32)


def check_codes(ours, theirs: np.ndarray, codebook: np.ndarray) -> int:
    """Each code is the nearest to their latents by float64 distances, or a tie within 1e-5; returns how many ties.

    Half of the codebook must be in use, or where latents are few, half as many codes as latents.
    """
    codebook = codebook.astype(np.float64)
    flat, ours = theirs.reshape(-1, theirs.shape[-1]), np.asarray(ours).ravel()
    nearest, ties = [], 0
    for latent, code in zip(flat, ours, strict=True):
        distances = np.square(latent - codebook).sum(-1)
        nearest.append(distances.argmin())
        assert distances[code] <= distances.min() * (1 + TIE)
        ties += int(code != nearest[-1])
    assert len(np.unique(nearest)) >= min(len(codebook), len(flat)) / 2
    return ties


def check_every_tensor(tokenizer, pairs, largest, tensors: dict[str, np.ndarray]) -> None:
    """The `largest` error of a net is small, and large with any one tensor moved but a bias of attention's keys."""
    net, generator = tokenizer.net, np.random.default_rng(3)
    assert largest(net) < TOLERANCE and sorted(tensors) == sorted(pair.theirs for pair in pairs)
    for name, value in tensors.items():
        noise = 0.3 * max(value.std(), 0.1 * np.abs(value).max()) * generator.standard_normal(value.shape)
        state = to_state(net, tensors | {name: value + noise.astype(np.float32)}, pairs, "a test")
        moved = largest(nnx.merge(nnx.graphdef(net), state))
        assert moved < TOLERANCE if name.endswith((".k.bias", ".k_proj.bias")) else moved > 10 * TOLERANCE, name


def report(capsys, name: str, ties: int, codes: int, *errors: float) -> None:
    """Prints what the table in docs/tokenizers.md says, and holds the errors to the tolerance."""
    with capsys.disabled():
        print(f"\n{name}: {ties} of {codes} codes differ, latents and pixels within {max(errors):.1e}")
    assert max(errors) < TOLERANCE
