"""Emu3's tokenizer against transformers, pictures and videos, with every parameter, buffer and codebook random."""

import json
import re

import numpy as np
import pytest

import omni_tokenizers
from omni_tokenizers import checkpoints, weights
from omni_tokenizers.checkpoints import emu3

torch = pytest.importorskip("torch", reason="needs torch: pip install 'omni-any-to-any[parity]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'omni-any-to-any[parity]'")

from random_vqgans import (  # noqa: E402
    check_codes,
    check_every_tensor,
    codebook_amid,
    error,
    images,
    latents,
    load,
    quantize,
    randomised,
    reconstruct,
    report,
    shapes_of,
)

pytestmark = pytest.mark.parity

# At least two channels in every group of a norm: alone, a channel's bias would vanish in it.
TINY = {
    "base_channels": 32,
    "channel_multiplier": [2, 4],
    "num_res_blocks": 1,
    "attn_resolutions": [1],
    "hidden_size": 128,
    "codebook_size": 32,
}
DEEP = TINY | {
    "channel_multiplier": [2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [1, 2],
    "latent_channels": 6,
    "embed_dim": 6,
    "temporal_downsample_factor": 2,
}
CASES = {
    "batches of 3": (TINY, [(3, 24, 40), (3, 8, 12, 20)]),
    "odd sizes": (TINY, [(1, 37, 51), (1, 13, 21, 15)]),
    "three stages": (DEEP, [(3, 20, 28), (1, 7, 24, 20)]),
    # Three codes along each side at least: where a kernel is larger than what it goes over, XLA's convolutions on CPUs
    # take twenty times as long.
    "released": ({}, [(1, 40, 48), (1, 8, 24, 24)]),
}
SLOW = {"released": [pytest.mark.slow]}
TEXT = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
TEXT |= {"num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def random_emu3(settings: dict, *shapes: tuple[int, ...]):
    """transformers' model, random, with its codebook amid the latents of `images(*shape)`, and these for each shape."""
    model = transformers.Emu3VQVAE(transformers.Emu3VQVAEConfig(**settings)).eval()
    load(model, randomised(shapes_of(model)))
    values = [their_latents(model, images(*shape)) for shape in shapes]
    codebook = codebook_amid(np.concatenate([together(x) for x in values]), model.config.codebook_size)
    model.quantize.embedding.weight.copy_(torch.tensor(codebook))
    return model, values


def together(latents: np.ndarray) -> np.ndarray:
    """All latents in a row, [number, channels]."""
    return latents.reshape(-1, latents.shape[-1])


def channels_third(pixels: np.ndarray) -> torch.Tensor:
    """Pictures or videos as transformers takes them, float64."""
    return torch.tensor(np.moveaxis(np.asarray(pixels, np.float64), -1, -3))


def their_latents(model, pixels: np.ndarray) -> np.ndarray:
    """What is compared with the codebook, [batch, frames, rows, columns, channels]."""
    video = channels_third(pixels).to(model.dtype)
    if video.ndim == 4:
        video = video[:, None].repeat(1, model.config.temporal_downsample_factor, 1, 1, 1)
    return model.quant_conv(model.encoder(video).movedim(1, 2)).movedim(1, -1).numpy()


def their_pixels(model, codes) -> np.ndarray:
    """What is decoded."""
    return np.moveaxis(model.decode(torch.tensor(np.array(codes))).numpy(), -3, -1)


def nearest(model, values: np.ndarray, *, is_picture: bool) -> np.ndarray:
    """The codes of latents in float64."""
    codes = torch.cdist(torch.tensor(values).flatten(0, -2), model.quantize.embedding.weight).argmin(1).numpy()
    codes = codes.reshape(values.shape[:-1])
    return codes[:, 0] if is_picture else codes


def saved(model, directory):
    """Our tokenizer of what transformers saves; the model stays in float32."""
    model.float().save_pretrained(directory)
    return omni_tokenizers.load(directory)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model of transformers, its directory, and our tokenizer of it."""
    directory = tmp_path_factory.mktemp("theirs")
    model, _ = random_emu3(TINY, (1, 8, 12, 20))
    return model, directory, saved(model, directory)


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, [])) for name in CASES])
def test_emu3_encodes_and_decodes_as_transformers_does(name, tmp_path, capsys):
    """A directory that transformers saved: same latents, same codes but for ties, same pixels."""
    settings, shapes = CASES[name]
    model, values = random_emu3(settings, *shapes)
    codes = [nearest(model, value, is_picture=len(shape) == 3) for value, shape in zip(values, shapes, strict=True)]
    pixels = [their_pixels(model, each) for each in codes]
    tokenizer, found, errors = saved(model, tmp_path), [], []
    # The largest has hundreds of millions of parameters.
    del model
    for shape, value, code, pixel in zip(shapes, values, codes, pixels, strict=True):
        ours = latents(tokenizer.net, images(*shape))
        found.append(quantize(tokenizer.net, ours))
        errors += [error(ours, value), error(reconstruct(tokenizer.net, code), pixel)]
    found, values = np.concatenate([np.ravel(x) for x in found]), np.concatenate([together(x) for x in values])
    ties = check_codes(found, values, tokenizer.code_vectors[0])
    report(capsys, f"emu3, {name}", ties, len(found), *errors)


def test_every_tensor_of_emu3_matters():
    """With any one tensor changed the comparison fails; a key's bias alone is nothing to a softmax."""
    shape = (1, 8, 8, 16)
    model, (values,) = random_emu3(TINY, shape)
    codes = nearest(model, values, is_picture=False)
    pixels = their_pixels(model, codes)
    tensors = {name: x.float().numpy() for name, x in model.state_dict().items() if x.is_floating_point()}

    def largest(net):
        return max(error(latents(net, images(*shape)), values), error(reconstruct(net, codes), pixels))

    tokenizer = emu3.from_transformers(TINY, tensors, "a test")
    check_every_tensor(tokenizer, emu3.EMU3.pairs(tokenizer.config), largest, tensors)
    assert error(tokenizer.net.code_vectors(), tensors["quantize.embedding.weight"]) == 0


def test_a_whole_emu3_holds_the_same_tokenizer(tiny, tmp_path):
    """Of a language model with its tokenizer, with or without a head, the tokenizer is read."""
    model, _, tokenizer = tiny
    words = {"<image>": 5, "<|visual token 000000|>": 6}
    config = transformers.Emu3Config(vq_config=TINY, text_config=TEXT, vocabulary_map=words)
    whole = transformers.Emu3ForConditionalGeneration(config)
    whole.model.vqmodel.load_state_dict(model.state_dict())
    for number, each in enumerate((whole, whole.model)):
        each.save_pretrained(tmp_path / str(number))
        assert omni_tokenizers.load(tmp_path / str(number)).hash == tokenizer.hash


def test_the_release_holds_the_same_tokenizer(tiny, tmp_path):
    """Settings and tensors under the names that Emu3's own release gives them are the same tokenizer."""
    _, directory, tokenizer = tiny
    tensors = {}
    for name, value in weights.read(directory / "model.safetensors").items():
        if re.search(r"_proj\.weight$", name):
            value = value[:, :, None, None]
        name = (
            name.replace("down_block.", "")
            .replace("up_block.", "")
            .replace("middle_block.attn_norm", "mid.attn_1.norm")
        )
        name = re.sub(r"attn_norms\.(\d+)", r"attn.\1.norm", name.replace("middle_block", "mid"))
        tensors[re.sub(r"\b([qkv])_proj\b", r"\1", name.replace("out_proj", "proj_out"))] = value
    assert {"decoder.mid.attn_1.norm.conv_y.weight", "encoder.down.1.attn.0.q.weight"} <= tensors.keys()
    weights.write(tmp_path / "model.safetensors", tensors)
    values = {"model_type": "Emu3VisionVQ", "ch": 32, "ch_mult": [2, 4], "z_channels": 4, "double_z": False}
    values |= {"num_res_blocks": 1, "attn_resolutions": [1], "codebook_size": 32, "dropout": 0.0}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert omni_tokenizers.load(tmp_path).hash == tokenizer.hash


def test_export_gives_back_what_was_read(tiny, tmp_path):
    """transformers reads what is exported as the same model; reading it here again changes no bit."""
    model, _, tokenizer = tiny
    checkpoints.export_checkpoint(tokenizer, tmp_path)
    again, report = transformers.Emu3VQVAE.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name], value, err_msg=name)
    own = ("_name_or_path", "architectures", "dtype", "image_size")
    one, other = again.config.to_dict(), model.config.to_dict()
    assert {key: one[key] for key in one if key not in own} == {key: other[key] for key in other if key not in own}
    assert omni_tokenizers.load(tmp_path).hash == tokenizer.hash
