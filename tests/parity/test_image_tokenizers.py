"""Image tokenizers against transformers and a slow reference, with every parameter, buffer and codebook random."""

import numpy as np
import pytest

import omni_tokenizers
from omni_tokenizers import checkpoints
from omni_tokenizers.checkpoints import vqgan as vqgan_checkpoints

torch = pytest.importorskip("torch", reason="needs torch: pip install 'omni-any-to-any[parity]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'omni-any-to-any[parity]'")

import vqgan_reference as reference  # noqa: E402
from random_vqgans import (  # noqa: E402
    check_codes,
    check_every_tensor,
    codebook_amid,
    decoder_input,
    error,
    first,
    images,
    last,
    latents,
    load,
    quantize,
    randomised,
    reconstruct,
    report,
    shapes_of,
)
from transformers.models.chameleon import modeling_chameleon  # noqa: E402
from transformers.models.janus import modeling_janus  # noqa: E402

pytestmark = pytest.mark.parity

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
# Chameleon's vqgan.ckpt and LlamaGen's VQ-16.
CHAMELEON_RELEASED = {
    "channels": 128,
    "multipliers": (1, 1, 2, 2, 4),
    "blocks": 2,
    "attention": (),
    "latents": 256,
    "codes": 8192,
    "code_dim": 256,
}
LLAMAGEN_RELEASED = CHAMELEON_RELEASED | {"attention": (4,), "codes": 16384, "code_dim": 8}
CASES = {
    "chameleon": (CHAMELEON, (3, 24, 40)),
    "chameleon, odd": (CHAMELEON, (1, 37, 51)),
    "chameleon, attention in a stage": (CHAMELEON | {"attn_resolutions": [16], "num_res_blocks": 2}, (1, 20, 12)),
    "chameleon, three stages": (CHAMELEON | {"channel_multiplier": [2, 2, 4], "attn_resolutions": [8]}, (3, 20, 28)),
    "chameleon, released": ({}, (1, 64, 96)),
}
JANUS_CASES = {
    "janus": (JANUS, (3, 24, 40)),
    "janus, odd": (JANUS, (1, 37, 51)),
    "janus, square": (JANUS, (1, 32, 32)),
    "janus, released": ({}, (1, 64, 96)),
}


def each(cases: dict) -> pytest.MarkDecorator:
    """A test of every case by name; those of the released sizes are slow."""
    slow = {name: [pytest.mark.slow] if name.endswith("released") else [] for name in cases}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks) for name, marks in slow.items()])


def chameleon(settings: dict, shape: tuple[int, int, int]):
    """transformers' encoder, random, with its codebook amid the latents of `images(*shape)`, and these latents."""
    model = modeling_chameleon.ChameleonVQVAE(transformers.models.chameleon.ChameleonVQVAEConfig(**settings)).eval()
    tensors = randomised(shapes_of(model))
    load(model, tensors)
    values = last(model.quant_conv(model.encoder(first(images(*shape)))))
    tensors["quantize.embedding.weight"] = codebook_amid(values, model.config.num_embeddings)
    load(model, tensors)
    return model, tensors, values


def pairs(tokenizer, layout: str):
    """Which of a net's tensors is which of a layout's."""
    return vqgan_checkpoints.pairs(tokenizer.net, vqgan_checkpoints.layout_rules(layout, tokenizer.config))


@each(CASES)
def test_chameleon_encodes_as_transformers_does(name, tmp_path, capsys):
    """A directory that transformers saved: same latents, same codes but for ties, same input to a decoder."""
    settings, shape = CASES[name]
    model, _, values = chameleon(settings, shape)
    model.float().save_pretrained(tmp_path)
    model.double()
    tokenizer = omni_tokenizers.load(tmp_path)
    ours = latents(tokenizer.net, images(*shape))
    codes = quantize(tokenizer.net, ours)
    ties = check_codes(codes, values, tokenizer.code_vectors[0])
    theirs = last(model.post_quant_conv(first(tokenizer.code_vectors[0][np.asarray(codes)])))
    report(capsys, name, ties, codes.size, error(ours, values), error(decoder_input(tokenizer.net, codes), theirs))
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
    check_every_tensor(tokenizer, pairs(tokenizer, "transformers"), largest, tensors)


def janus(settings: dict, shape: tuple[int, int, int]):
    """transformers' Janus, random; its latents scaled to unit length, as the original scales them."""
    model = modeling_janus.JanusVQVAE(transformers.models.janus.JanusVQVAEConfig(**settings)).eval()
    tensors = randomised(shapes_of(model))
    load(model, tensors)
    values = last(reference.unit(model.quant_conv(model.encoder(first(images(*shape)))), 1))
    tensors["quantize.embedding.weight"] = 3 * codebook_amid(values, model.config.num_embeddings)
    load(model, tensors)
    return model, tensors, values


def janus_image(model, codes) -> np.ndarray:
    """What transformers decodes, which knows square pictures alone."""
    model.quantize.quant_state_dims = codes.shape[1:]
    return last(model.decode(torch.tensor(np.array(codes)).reshape(len(codes), -1)))


@each(JANUS_CASES)
def test_janus_encodes_as_the_original_and_decodes_as_transformers_does(name, tmp_path, capsys):
    """Codes of latents and codebook at unit length, images within tolerance, from a directory of transformers."""
    settings, shape = JANUS_CASES[name]
    model, _, values = janus(settings, shape)
    model.float().save_pretrained(tmp_path)
    model.double()
    tokenizer = omni_tokenizers.load(tmp_path)
    side = settings.get("num_patches", 32)
    assert tokenizer.config.normalized_codes and tokenizer.grid == (side, side)
    ours = latents(tokenizer.net, images(*shape))
    codes = quantize(tokenizer.net, ours)
    ties = check_codes(codes, values, tokenizer.code_vectors[0])
    image = janus_image(model, codes)
    report(capsys, name, ties, codes.size, error(ours, values), error(reconstruct(tokenizer.net, codes), image))


def test_every_tensor_of_janus_matters():
    """As for Chameleon, with the decoder."""
    shape = (1, 8, 16)
    model, tensors, values = janus(JANUS, shape)
    codes = np.arange(32).reshape(1, 4, 8)
    theirs = janus_image(model, codes)

    def largest(net):
        return max(error(latents(net, images(*shape)), values), error(reconstruct(net, codes), theirs))

    tokenizer = vqgan_checkpoints.from_janus(JANUS, tensors, "a test")
    check_every_tensor(tokenizer, pairs(tokenizer, "transformers"), largest, tensors)


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
    "taming, released": (reference.TAMING, CHAMELEON_RELEASED, (1, 64, 96)),
    "llamagen, released": (reference.LLAMAGEN, LLAMAGEN_RELEASED, (1, 64, 96)),
}


@each(ORIGINALS)
def test_original_files_encode_and_decode_as_the_reference_does(name, tmp_path, capsys):
    """A training's checkpoint, with what does not belong to the net: same latents, codes but for ties, and images."""
    names, settings, shape = ORIGINALS[name]
    tensors, values = original(names, settings, shape)
    content = {key: torch.tensor(value) for key, value in tensors.items()}
    if names is reference.LLAMAGEN:
        content = {"model": content | {"quantize.codebook_used": torch.zeros(65536)}, "optimizer": {"lr": 1e-4}}
    else:
        content = {"state_dict": content | {"loss.discriminator.main.0.weight": torch.ones(3)}, "epoch": 7}
    torch.save(content, tmp_path / "vqgan.ckpt")
    tokenizer = checkpoints.import_checkpoint(tmp_path / "vqgan.ckpt", image_size=64, torch_reader=True)
    assert tokenizer.config.attention_stages == settings["attention"] and tokenizer.image_size == 64
    ours = latents(tokenizer.net, images(*shape))
    codes = quantize(tokenizer.net, ours)
    ties = check_codes(codes, values, tokenizer.code_vectors[0])
    start, image = decoded(names, tensors, codes)
    errors = error(decoder_input(tokenizer.net, codes), start), error(reconstruct(tokenizer.net, codes), image)
    report(capsys, name, ties, codes.size, error(ours, values), *errors)


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
    check_every_tensor(tokenizer, pairs(tokenizer, name.split(",")[0]), largest, tensors)
