"""Image tokenizers against transformers and a slow reference, with every parameter, buffer and codebook random.

The other side computes in float64 from the same float32 weights, so that the tolerance measures our error alone.
"""

import numpy as np
import pytest
from flax import nnx

import omni_tokenizers
from omni_tokenizers import vqgan_checkpoints

torch = pytest.importorskip("torch", reason="needs torch: pip install 'omni-any-to-any[parity]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'omni-any-to-any[parity]'")

from transformers.models.chameleon import modeling_chameleon  # noqa: E402

pytestmark = pytest.mark.parity

TOLERANCE = 1e-4
TIE = 1e-5
# At least two channels in every group of a norm: alone, a channel's bias would vanish in it.
CHAMELEON = {
    "base_channels": 32,
    "channel_multiplier": [2, 4],
    "num_res_blocks": 1,
    "latent_channels": 6,
    "embed_dim": 4,
    "num_embeddings": 32,
    "resolution": 32,
}
CASES = {
    "chameleon": (CHAMELEON, (3, 24, 40)),
    "chameleon, odd": (CHAMELEON, (1, 37, 51)),
    "chameleon, attention in a stage": (CHAMELEON | {"attn_resolutions": [16], "num_res_blocks": 2}, (1, 20, 12)),
    "chameleon, three stages": (CHAMELEON | {"channel_multiplier": [2, 2, 4], "attn_resolutions": [8]}, (3, 20, 28)),
}


@nnx.jit
def latents(net, image):
    return net.latents(image)


@nnx.jit
def quantize(net, values):
    return net.quantize(values)


@nnx.jit
def decoder_input(net, codes):
    return net.decoder_input(codes)


def randomised(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """A float32 tensor for each shape: norms about 1, biases about 0, matrices that keep the size of what they map."""
    generator, tensors = np.random.default_rng(seed), {}
    for name, shape in shapes.items():
        noise = generator.standard_normal(shape).astype(np.float32)
        if len(shape) > 1:
            tensors[name] = noise / np.float32(np.sqrt(np.prod(shape[1:])))
        else:
            tensors[name] = np.float32(0.3) * noise + np.float32("norm" in name and name.endswith("weight"))
    return tensors


def images(batch: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, (batch, height, width, 3)).astype(np.float32)


def first(array) -> torch.Tensor:
    """Channels last to channels second, float64."""
    return torch.tensor(np.moveaxis(np.asarray(array, np.float64), -1, 1))


def last(tensor: torch.Tensor) -> np.ndarray:
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


def error(ours, theirs) -> float:
    """Largest difference relative to the largest value."""
    assert ours.shape == theirs.shape and np.std(theirs) > 0
    return float(np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max())


def codebook_amid(values: np.ndarray, size: int, seed: int = 2) -> np.ndarray:
    """Codes near latents that occur, so that most of them are used."""
    generator, flat = np.random.default_rng(seed), values.reshape(-1, values.shape[-1])
    chosen = flat[generator.permutation(len(flat))[:size]]
    assert len(chosen) == size
    return (chosen + 0.1 * flat.std() * generator.standard_normal(chosen.shape)).astype(np.float32)


def check_codes(ours, theirs: np.ndarray, codebook: np.ndarray) -> int:
    """Each code is the nearest to their latents by float64 distances, or a tie within 1e-5; returns how many ties."""
    distances = np.square(theirs[..., None, :] - codebook.astype(np.float64)).sum(-1)
    ours, nearest = np.asarray(ours), distances.argmin(-1)
    chosen = np.take_along_axis(distances, ours[..., None], -1)[..., 0]
    assert (chosen <= distances.min(-1) * (1 + TIE)).all()
    assert len(np.unique(nearest)) >= len(codebook) / 2
    return int((ours != nearest).sum())


def chameleon(settings: dict, shape: tuple[int, int, int]):
    """transformers' encoder, random, with its codebook amid the latents of `images(*shape)`, and these latents."""
    model = modeling_chameleon.ChameleonVQVAE(transformers.models.chameleon.ChameleonVQVAEConfig(**settings)).eval()
    tensors = randomised({name: tuple(value.shape) for name, value in model.state_dict().items()})
    load(model, tensors)
    values = last(model.quant_conv(model.encoder(first(images(*shape)))))
    tensors["quantize.embedding.weight"] = codebook_amid(values, settings["num_embeddings"])
    load(model, tensors)
    return model, tensors, values


def load(model, tensors) -> None:
    model.float().load_state_dict({name: torch.tensor(value) for name, value in tensors.items()})
    model.requires_grad_(False).double()


@pytest.mark.parametrize("name", CASES)
def test_chameleon_encodes_as_transformers_does(name, tmp_path):
    """A directory that transformers saved: same latents, same codes but for ties, same input to a decoder."""
    settings, shape = CASES[name]
    model, _, values = chameleon(settings, shape)
    model.float().save_pretrained(tmp_path)
    model.double()
    tokenizer = omni_tokenizers.load(tmp_path)
    ours = latents(tokenizer.net, images(*shape))
    assert error(ours, values) < TOLERANCE
    codes = quantize(tokenizer.net, ours)
    check_codes(codes, values, tokenizer.code_vectors[0])
    theirs = model.post_quant_conv(first(tokenizer.code_vectors[0][np.asarray(codes)]))
    assert error(decoder_input(tokenizer.net, codes), last(theirs)) < TOLERANCE
    their_codes = model.encode(first(images(*shape))).image_tokens.numpy()
    check_codes(their_codes.reshape(codes.shape), values, tokenizer.code_vectors[0])


def test_every_tensor_of_chameleon_matters():
    """With any one tensor changed the comparison fails; a key's bias alone is nothing to a softmax."""
    settings, shape = CASES["chameleon, attention in a stage"]
    model, tensors, values = chameleon(settings, shape)
    codes = np.arange(32).reshape(1, 4, 8)
    theirs = last(model.post_quant_conv(first(tensors["quantize.embedding.weight"][codes])))

    def largest(tensors):
        net = vqgan_checkpoints.from_chameleon(settings, tensors, "a test").net
        return max(error(latents(net, images(*shape)), values), error(decoder_input(net, codes), theirs))

    check_every_tensor(largest, tensors, (".k.bias",))


def check_every_tensor(largest, tensors: dict[str, np.ndarray], idle: tuple[str, ...]) -> None:
    """The `largest` error is small, and large with any one tensor moved, if its name does not end in one of `idle`."""
    assert largest(tensors) < TOLERANCE
    generator = np.random.default_rng(3)
    for name, value in tensors.items():
        noise = 0.3 * max(value.std(), 0.1) * generator.standard_normal(value.shape)
        moved = largest(tensors | {name: value + noise.astype(np.float32)})
        assert moved < TOLERANCE if name.endswith(idle) else moved > 10 * TOLERANCE, name
