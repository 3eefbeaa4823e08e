"""MusicGen's decoder beside the slow way: no cache, delays undone by hand, guidance in two passes."""

import numpy as np
import pytest

from omni import MusicGen
from omni.interop.musicgen import _decoder, their_shapes
from omni.music import MusicConfig
from omni_tokenizers import weights
from omni_tokenizers.errors import OmniError, UsageError

SHAPE = {"codes": 20, "depth": 2, "dim": 16, "heads": 2, "mlp_dim": 24}


@pytest.fixture(scope="module", params=[1, 2], ids=["mono", "stereo"])
def music(request) -> MusicGen:
    """A decoder with random weights, without a codec."""
    config, random = MusicConfig(codebooks=4, channels=request.param, **SHAPE), np.random.default_rng(0)
    tensors = {
        name: random.standard_normal(shape).astype(np.float32) for name, shape in their_shapes(config, "").items()
    }
    return MusicGen(_decoder(config, tensors, ""))


@pytest.fixture(scope="module")
def given():
    """States of three descriptions of different lengths."""
    states = np.random.default_rng(1).standard_normal((3, 5, 16)).astype(np.float32)
    return states, np.arange(5) < np.array([[5], [2], [0]])


def slow_codes(music: MusicGen, states, mask, frames: int, guidance: float) -> np.ndarray:
    """The likeliest codes, each from passes over all that stands before it: one with the description, one without."""
    config = music.config
    delayed = np.full((len(states), config.codebooks, 1), config.codes)
    for place in range(1, frames + config.codebooks // config.channels):
        with_, without = (music.logits(delayed, *each)[:, :, -1] for each in ((states, mask), (0 * states, 0 * mask)))
        best = (without + guidance * (with_ - without)).argmax(-1)
        begun = place > config.delays
        ended = place > config.delays + frames
        new = np.where(begun & ~ended, best, config.codes)
        delayed = np.concatenate([delayed, new[:, :, None]], axis=2)
    return np.stack([delayed[:, book, delay + 1 :][:, :frames] for book, delay in enumerate(config.delays)], axis=1)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_codes_are_those_of_the_slow_way(music, given, guidance):
    found = music.codes(*given, frames=9, guidance=guidance, temperature=0.0)
    assert found.shape == (3, 4, 9) and found.min() >= 0 and found.max() < 20
    np.testing.assert_array_equal(found, slow_codes(music, *given, 9, guidance))


def test_a_row_is_what_it_is_alone(music, given):
    """Drawn codes of a row depend neither on the rows beside it nor on states that are hidden."""
    together = music.codes(*given, frames=6, seed=5)
    assert not np.array_equal(together, music.codes(*given, frames=6, seed=6))
    for row in range(3):
        states, mask = (each[row : row + 1].copy() for each in given)
        states[~mask] = 7.0
        np.testing.assert_array_equal(music.codes(states, mask, frames=6, seed=5 + row)[0], together[row])


def test_written_and_read_it_is_the_same(music, given, tmp_path):
    music.export(tmp_path)
    codes = np.random.default_rng(2).integers(0, 21, (3, 4, 6))
    np.testing.assert_array_equal(MusicGen.load(tmp_path).logits(codes, *given), music.logits(codes, *given))


def test_wrong_arguments_are_named(music, given):
    for settings, message in (
        ({"frames": 0}, "frames"), ({"frames": 2, "top_k": -1}, "top_k"), ({"frames": 2, "guidance": -1}, "guidance"),
        ({"frames": 2, "seed": -1}, "seed"), ({"frames": 2, "top_p": 0}, "top_p"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            music.codes(*given, **settings)
    with pytest.raises(UsageError, match=r"states are floats \[batch, source, 16\]"):
        music.codes(given[0][..., :8], frames=2)
    with pytest.raises(UsageError, match="mask is"):
        music.codes(given[0], given[1][:2], frames=2)
    with pytest.raises(UsageError, match=r"mask is .* got float64"):
        music.codes(given[0], given[1].astype(float), frames=2)
    with pytest.raises(UsageError, match="not finite"):
        music.codes(given[0] * np.nan, frames=2)
    with pytest.raises(UsageError, match="codes"):
        music.logits(np.full((3, 4, 2), 21), *given)
    with pytest.raises(OmniError, match="codec"):
        music.generate(*given, seconds=1)


def test_damaged_directories_are_refused(music, tmp_path):
    """A missing, an unknown, a wrong and a damaged tensor are named, and so is a setting that is not supported."""
    music.export(tmp_path)
    config, tensors = (tmp_path / "config.json").read_text(), weights.read(tmp_path / "model.safetensors")
    name = "model.decoder.layers.1.fc1.weight"
    for changed, message in (
        ({key: value for key, value in tensors.items() if key != name}, f"{name}' is missing"),
        (tensors | {"more": tensors[name]}, "'more'"),
        (tensors | {name: tensors[name].T}, r"has the shape \[16, 24\], config.json needs \[24, 16\]"),
        (tensors | {name: tensors[name] * np.nan}, "not finite"),
    ):
        weights.write(tmp_path / "model.safetensors", changed)
        with pytest.raises(OmniError, match=message):
            MusicGen.load(tmp_path)
    weights.write(tmp_path / "model.safetensors", tensors)
    for old, new, message in (
        ('"gelu"', '"relu"', "activation_function"),
        ('"num_hidden_layers": 2', '"num_hidden_layers": 1000000000', "tensors are too few"),
        ('"musicgen_decoder"', '"llama"', "is no MusicGen"),
        ('"num_attention_heads": 2', '"num_attention_heads": 3', "heads"),
    ):
        assert old in config
        (tmp_path / "config.json").write_text(config.replace(old, new))
        with pytest.raises(OmniError, match=message):
            MusicGen.load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(OmniError, match=r"no config\.json"):
        MusicGen.load(tmp_path)
