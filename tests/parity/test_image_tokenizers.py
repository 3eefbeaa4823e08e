"""Image tokenizers against transformers and a slow reference, with every parameter, buffer and codebook random.

The other side computes in float64 from the same float32 weights, so that the tolerance measures our error alone.
"""

import numpy as np
import pytest
from flax import nnx

import omni_tokenizers
from omni_tokenizers import checkpoints
from omni_tokenizers.checkpoints import vqgan as vqgan_checkpoints
from omni_tokenizers.checkpoints.interop import to_state

torch = pytest.importorskip("torch", reason="needs torch: pip install 'omni-any-to-any[parity]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'omni-any-to-any[parity]'")

import vqgan_reference as reference  # noqa: E402
from transformers.models.chameleon import modeling_chameleon  # noqa: E402
from transformers.models.janus import modeling_janus  # noqa: E402

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
JANUS = {
    "base_channels": 32,
    "channel_multiplier": [2, 4],
    "num_res_blocks": 1,
    "latent_channels": 6,
    "embed_dim": 4,
    "num_embeddings": 32,
    "num_patches": 16,
}
ORIGINAL = {
    "channels": 32,
    "multipliers": (2, 4),
    "blocks": 1,
    "attention": (),
    "latents": 6,
    "codes": 32,
    "code_dim": 4,
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
def reconstruct(net, codes):
    return net.reconstruct(codes)


@nnx.jit
def decoder_input(net, codes):
    return net.decoder_input(codes)


def randomised(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """A float32 tensor for each shape: norms about 1, biases about 0, matrices that keep the size of what they map.

    The first convolution makes values so small that the first norm's epsilon counts.
    """
    generator, tensors = np.random.default_rng(seed), {}
    for name, shape in shapes.items():
        noise = generator.standard_normal(shape).astype(np.float32)
        if len(shape) > 1:
            tensors[name] = noise / np.float32(np.sqrt(np.prod(shape[1:])))
        else:
            tensors[name] = np.float32(0.3) * noise + np.float32("norm" in name and name.endswith("weight"))
        if name.startswith("encoder.conv_in."):
            tensors[name] *= np.float32(0.02)
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


def check_every_tensor(tokenizer, layout: str, largest, tensors: dict[str, np.ndarray]) -> None:
    """The `largest` error of a net is small, and large with any one tensor moved but a bias of attention's keys."""
    net = tokenizer.net
    rules = vqgan_checkpoints.layout_rules(layout, tokenizer.config)
    places, graphdef, generator = vqgan_checkpoints.pairs(net, rules), nnx.graphdef(net), np.random.default_rng(3)
    assert largest(net) < TOLERANCE and sorted(tensors) == sorted(pair.theirs for pair in places)
    for name, value in tensors.items():
        noise = 0.3 * max(value.std(), 0.1) * generator.standard_normal(value.shape)
        state = to_state(net, tensors | {name: value + noise.astype(np.float32)}, places, "a test")
        moved = largest(nnx.merge(graphdef, state))
        assert moved < TOLERANCE if name.endswith(".k.bias") else moved > 10 * TOLERANCE, name


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

    def largest(net):
        return max(error(latents(net, images(*shape)), values), error(decoder_input(net, codes), theirs))

    tokenizer = vqgan_checkpoints.from_chameleon(settings, tensors, "a test")
    check_every_tensor(tokenizer, "transformers", largest, tensors)


def janus(settings: dict, shape: tuple[int, int, int]):
    """transformers' Janus, random; its latents scaled to unit length, as the original scales them."""
    model = modeling_janus.JanusVQVAE(transformers.models.janus.JanusVQVAEConfig(**settings)).eval()
    tensors = randomised({name: tuple(value.shape) for name, value in model.state_dict().items()})
    load(model, tensors)
    values = last(reference.unit(model.quant_conv(model.encoder(first(images(*shape)))), 1))
    tensors["quantize.embedding.weight"] = 3 * codebook_amid(values, settings["num_embeddings"])
    load(model, tensors)
    return model, tensors, values


def janus_image(model, codes) -> np.ndarray:
    """What transformers decodes, which knows square pictures alone."""
    model.quantize.quant_state_dims = codes.shape[1:]
    return last(model.decode(torch.tensor(np.array(codes)).reshape(len(codes), -1)))


@pytest.mark.parametrize("shape", [(3, 24, 40), (1, 37, 51), (1, 32, 32)])
def test_janus_encodes_as_the_original_and_decodes_as_transformers_does(shape, tmp_path):
    """Codes of latents and codebook at unit length, images within tolerance, from a directory of transformers."""
    model, _, values = janus(JANUS, shape)
    model.float().save_pretrained(tmp_path)
    model.double()
    tokenizer = omni_tokenizers.load(tmp_path)
    assert tokenizer.config.normalized_codes and tokenizer.image_size == 32 and tokenizer.grid == (16, 16)
    ours = latents(tokenizer.net, images(*shape))
    assert error(ours, values) < TOLERANCE
    codes = quantize(tokenizer.net, ours)
    check_codes(codes, values, tokenizer.code_vectors[0])
    assert error(reconstruct(tokenizer.net, codes), janus_image(model, codes)) < TOLERANCE


def test_every_tensor_of_janus_matters():
    """As for Chameleon, with the decoder."""
    shape = (1, 8, 16)
    model, tensors, values = janus(JANUS, shape)
    codes = np.arange(32).reshape(1, 4, 8)
    theirs = janus_image(model, codes)

    def largest(net):
        return max(error(latents(net, images(*shape)), values), error(reconstruct(net, codes), theirs))

    tokenizer = vqgan_checkpoints.from_janus(JANUS, tensors, "a test")
    check_every_tensor(tokenizer, "transformers", largest, tensors)


def original(names, settings: dict, shape: tuple[int, int, int]):
    """Random tensors in a release's layout, and the latents, of unit length for LlamaGen, of `images(*shape)`."""
    tensors = randomised(reference.shapes(names, **settings))
    double = {name: torch.tensor(value).double() for name, value in tensors.items()}
    values = reference.encoded(double, names, first(images(*shape)))
    values = last(reference.unit(values, 1) if names is reference.LLAMAGEN else values)
    codebook = codebook_amid(values, settings["codes"])
    tensors["quantize.embedding.weight"] = 3 * codebook if names is reference.LLAMAGEN else codebook
    return tensors, values


def decoded(names, tensors: dict[str, np.ndarray], codes) -> tuple[np.ndarray, np.ndarray]:
    """The reference's input to its decoder, and its images, of codes."""
    double = {name: torch.tensor(value).double() for name, value in tensors.items()}
    vectors = double["quantize.embedding.weight"][torch.tensor(np.array(codes))].movedim(-1, 1)
    vectors = reference.unit(vectors, 1) if names is reference.LLAMAGEN else vectors
    return tuple(last(result) for result in reference.decoded(double, names, vectors))


ORIGINALS = {
    # Chameleon's vqgan.ckpt in small.
    "taming": (reference.TAMING, ORIGINAL, (3, 24, 40)),
    "taming, odd": (reference.TAMING, ORIGINAL, (1, 37, 51)),
    "taming, attention in stages": (reference.TAMING, ORIGINAL | {"attention": (0, 1), "blocks": 2}, (1, 12, 20)),
    "taming, three stages": (reference.TAMING, ORIGINAL | {"multipliers": (2, 2, 4)}, (3, 20, 28)),
    "llamagen": (reference.LLAMAGEN, ORIGINAL | {"attention": (1,)}, (3, 24, 40)),
    "llamagen, three stages": (
        reference.LLAMAGEN,
        ORIGINAL | {"attention": (2,), "multipliers": (2, 2, 4), "blocks": 2},
        (1, 44, 52),
    ),
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_original_files_encode_and_decode_as_the_reference_does(name, tmp_path):
    """A training's checkpoint, with what does not belong to the net: same latents, codes but for ties, and images."""
    names, settings, shape = ORIGINALS[name]
    tensors, values = original(names, settings, shape)
    content = {key: torch.tensor(value) for key, value in tensors.items()}
    if names is reference.LLAMAGEN:
        content = {"model": content | {"quantize.codebook_used": torch.zeros(65536)}, "optimizer": {"lr": 1e-4}}
    else:
        content = {"state_dict": content | {"loss.discriminator.main.0.weight": torch.ones(3)}, "epoch": 7}
    torch.save(content, tmp_path / "vqgan.ckpt")
    tokenizer = checkpoints.import_checkpoint(tmp_path / "vqgan.ckpt", image_size=64)
    assert tokenizer.config.attention_stages == settings["attention"] and tokenizer.image_size == 64
    ours = latents(tokenizer.net, images(*shape))
    assert error(ours, values) < TOLERANCE
    codes = quantize(tokenizer.net, ours)
    check_codes(codes, values, tokenizer.code_vectors[0])
    start, image = decoded(names, tensors, codes)
    assert error(decoder_input(tokenizer.net, codes), start) < TOLERANCE
    assert error(reconstruct(tokenizer.net, codes), image) < TOLERANCE


@pytest.mark.parametrize("name", ["taming, attention in stages", "llamagen"])
def test_every_tensor_of_original_files_matters(name):
    """As for Chameleon and Janus, in the layouts of the originals."""
    names, settings, _ = ORIGINALS[name]
    shape, codes = (1, 8, 16), np.arange(32).reshape(1, 4, 8)
    tensors, values = original(names, settings, shape)
    _, image = decoded(names, tensors, codes)

    def largest(net):
        return max(error(latents(net, images(*shape)), values), error(reconstruct(net, codes), image))

    tokenizer = vqgan_checkpoints.from_original(tensors, 64, "a test")
    check_every_tensor(tokenizer, name.split(",")[0], largest, tensors)
