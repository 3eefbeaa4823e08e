"""Emu3's tokenizer without torch: recorded codes and pixels, pictures as videos, causal time, damaged files, export."""

import json

import image_tokenizer_cases as cases
import jax.numpy as jnp
import numpy as np
import pytest

import omni_tokenizers
from omni_tokenizers import checkpoints, emu3, weights
from omni_tokenizers.errors import OmniError, UsageError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The recorded one."""
    return omni_tokenizers.load(cases.write("emu3", tmp_path_factory.mktemp("emu3")))


@pytest.mark.parametrize("name", ["pictures", "videos"])
def test_recorded_codes_and_pixels(tokenizer, name):
    """A directory of transformers gives the codes and, rounded, the pixels that transformers computed from it.

    7 frames of 9 x 11 pixels are no multiple of the strides: they are padded by repetition, and cut off again.
    """
    pixels, arrays = getattr(cases, name)(), cases.recorded()[1]
    codes = tokenizer.encode(pixels)
    np.testing.assert_array_equal(codes.ids, arrays[f"emu3/{name} codes"])
    np.testing.assert_array_equal(codes.sizes, [pixels.shape[1:-1]] * len(pixels))
    decoded, recorded = tokenizer.decode(codes), arrays[f"emu3/{name} pixels"]
    assert decoded.dtype == np.uint8 and decoded.shape == pixels.shape
    assert ((recorded > 0) & (recorded < 255)).mean() > 0.5 and recorded.std() > 10
    # Levels between two to within a hundredth may become either.
    assert np.abs(decoded - recorded).max() <= 0.51


def test_a_picture_is_a_video_of_equal_frames(tokenizer):
    """Its codes are those of one code's frames, and its pixels the first of them."""
    pictures = cases.pictures()
    codes = tokenizer.encode(np.repeat(pictures[:1, None], 8, 1)).ids
    of_pictures = tokenizer.encode(pictures).ids
    assert codes.shape == (1, 2, 5, 6) and of_pictures.shape == (2, 5, 6)
    np.testing.assert_array_equal(of_pictures[0], codes[0, 0])
    np.testing.assert_array_equal(tokenizer.decode(of_pictures)[0], tokenizer.decode(codes)[0, 0])


def test_time_is_causal(tokenizer):
    """Later frames change no earlier code, and later codes no earlier frame; earlier ones do change what follows."""
    frames = np.random.default_rng(0).integers(0, 256, (1, 8, 10, 12, 3), np.uint8)
    other = frames.copy()
    other[:, 4:] = 255 - other[:, 4:]
    one, two = tokenizer.encode(frames).ids, tokenizer.encode(other).ids
    np.testing.assert_array_equal(one[:, 0], two[:, 0])
    assert (one[:, 1] != two[:, 1]).any()
    first, second = one[:, 0], one[:, 1]
    decoded = tokenizer.decode(one)
    later_changed = tokenizer.decode(np.stack([first, (second + 1) % 32], 1))
    earlier_changed = tokenizer.decode(np.stack([(first + 1) % 32, second], 1))
    np.testing.assert_array_equal(decoded[:, :4], later_changed[:, :4])
    assert (decoded[:, 4:] != later_changed[:, 4:]).any() and (decoded[:, 4:] != earlier_changed[:, 4:]).any()


def test_a_long_video_goes_through_in_groups(monkeypatch):
    """However many frames there are, the nets see but a few together, and every frame once."""
    monkeypatch.setattr(emu3, "PIXELS", 100)
    seen = []

    def net(x, guide):
        seen.append((x.shape, guide.shape))
        return x.sum((1, 2)) + guide.sum((1, 2))

    x, guide = jnp.arange(7 * 4 * 3.0).reshape(7, 2, 2, 3), jnp.arange(7 * 3.0).reshape(7, 1, 1, 3)
    result = emu3._a_few_at_a_time(net, 40, x, guide)
    np.testing.assert_array_equal(result, x.sum((1, 2)) + guide.sum((1, 2)))
    assert set(seen) == {((2, 2, 2, 3), (2, 1, 1, 3))}


@pytest.mark.parametrize("prefix", ["vqmodel.", "model.vqmodel."])
def test_a_whole_model_holds_the_same_tokenizer(tokenizer, tmp_path, prefix):
    """Under either of the names that versions of transformers give it."""
    tensors = {prefix + name: value for name, value in cases.tensors_of("emu3").items()}
    weights.write(tmp_path / "model.safetensors", tensors | {"lm_head.weight": np.ones((2, 2), np.float32)})
    config = {"model_type": "emu3", "vq_config": cases.recorded()[0]["emu3"]["config"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert omni_tokenizers.load(tmp_path).hash == tokenizer.hash


def test_saved_and_exported_tokenizers_load_as_the_same(tokenizer, tmp_path):
    """Our own directory and transformers' give back every bit; half precision leaves codebook and statistics alone."""
    tokenizer.save(tmp_path / "ours")
    again = omni_tokenizers.load(tmp_path / "ours")
    assert (again.hash, again.config) == (tokenizer.hash, tokenizer.config)
    checkpoints.export_checkpoint(tokenizer, tmp_path / "theirs")
    assert omni_tokenizers.load(tmp_path / "theirs").hash == tokenizer.hash
    tokenizer.save(tmp_path / "half", dtype="bfloat16")
    one, other = (weights.read(tmp_path / name / "weights.safetensors") for name in ("ours", "half"))
    same = {name for name in one if np.array_equal(one[name], other[name])}
    assert "codebook.vectors" in same and {name for name in one if name.endswith((".mean", ".var"))} <= same
    assert "to_code.kernel" not in same


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("encoder.time_conv.1.conv.conv.weight", None, "is missing"),
        ("decoder.norm_out.conv_y.weight", lambda value: value.swapaxes(0, 1), "has the shape"),
        ("decoder.time_res_stack.0.norm2.running_var", lambda value: value * np.nan, "not finite"),
        ("decoder.up_block.up.1.attn.2.q_proj.weight", lambda value: np.eye(64), "belongs to no part"),
    ],
)
def test_a_damaged_checkpoint_is_named(tmp_path, name, damage, message):
    """A tensor that is missing, transposed, not finite or unknown is named."""
    tensors = cases.tensors_of("emu3")
    value = tensors.pop(name, None)
    tensors |= {} if damage is None else {name: damage(value).astype(np.float32)}
    with pytest.raises(OmniError, match=message) as caught:
        omni_tokenizers.load(cases.write("emu3", tmp_path, tensors))
    assert repr(name) in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"embed_dim": 8}, "embed_dim = 8"),
        ({"double_latent": True}, "double_latent = True"),
        ({"num_attention_heads": 2}, "num_attention_heads = 2"),
        ({"temporal_downsample_factor": 3}, "power of two"),
        ({"attn_resolutions": [2]}, "0 to 1"),
        ({"channel_multiplier": "1, 2"}, "channel_multiplier"),
    ],
)
def test_settings_that_are_not_known_are_refused(tmp_path, changed, message):
    """Before any tensor is looked at, with the file."""
    directory = cases.write("emu3", tmp_path)
    config = json.loads((directory / "config.json").read_text()) | changed
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(OmniError, match=message) as caught:
        omni_tokenizers.load(directory)
    assert str(tmp_path) in str(caught.value)


def test_bad_input_is_an_error_of_one_line(tokenizer):
    """What are neither pictures nor videos, and what are no codes of either, is said."""
    with pytest.raises(OmniError, match=r"\[batch, height, width, 3\] or \[batch, time, height, width, 3\]"):
        tokenizer.encode(cases.pictures()[0])
    with pytest.raises(OmniError, match="not empty"):
        tokenizer.encode(cases.videos()[:, :0])
    with pytest.raises(OmniError, match="code 32 is outside"):
        tokenizer.decode(np.full((1, 1, 2, 2), 32))
    with pytest.raises(OmniError, match=r"\[batch, rows, columns\]"):
        tokenizer.decode(np.zeros((2, 2), int))
    with pytest.raises(OmniError, match="sizes must lie in 1 to"):
        tokenizer.decode(omni_tokenizers.Codes(np.zeros((1, 2, 5, 6), int), sizes=np.array([[9, 9, 11]])))


def test_what_transformers_cannot_hold_is_not_exported(tmp_path):
    """Attention in a stage of another width than the last."""
    with pytest.raises(OmniError, match="as wide as the last"):
        checkpoints.emu3._write(emu3.Emu3Config(attention_stages=(0, 3)))
    with pytest.raises(UsageError, match="power of two"):
        emu3.Emu3Config(temporal_downsampling=6)
