"""Weights and tokenizer directories: round trips, and one clear error for every kind of damage."""

import json

import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import omni_tokenizers
from omni_tokenizers import weights
from omni_tokenizers.base import fingerprint
from omni_tokenizers.codes import Codes, as_codes
from omni_tokenizers.errors import OmniError
from omni_tokenizers.image import ImageTokenizer, ImageTokenizerConfig, ImageVQ

CONFIG = ImageTokenizerConfig(image_size=8, patch_size=2, channels=4, multipliers=(1, 2), codebook_size=8, code_dim=2)


class Net(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 1, rngs=nnx.Rngs(1))])


@pytest.fixture(scope="module")
def tokenizer():
    return ImageTokenizer(CONFIG, ImageVQ(CONFIG, rngs=nnx.Rngs(0)))


def edit(directory, **changes):
    path = directory / "tokenizer.json"
    description = json.loads(path.read_text())
    for key, value in changes.items():
        (description["config"] if key in description["config"] or key == "chanels" else description)[key] = value
    path.write_text(json.dumps(description))


def test_flatten_and_back():
    """Names are dotted paths; the arrays return to their places bit for bit."""
    state = nnx.state(Net())
    tensors = weights.flatten(state)
    assert list(tensors) == ["layers.0.bias", "layers.0.kernel", "layers.1.bias", "layers.1.kernel"]
    other = {name: value + 1 for name, value in tensors.items()}
    for name, value in weights.flatten(weights.unflatten(state, other)).items():
        np.testing.assert_array_equal(value, other[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layers.0.bias"), "'layers.0.bias' is missing"),
        (lambda t: t.update(spare=np.zeros(2)), "'spare' belongs to no parameter"),
        (lambda t: t.update({"layers.1.bias": np.zeros(2)}), r"'layers.1.bias' has the shape \[2\], not \[1\]"),
        (lambda t: t.update({"layers.1.bias": np.array([np.nan])}), "'layers.1.bias' holds values that are not finite"),
    ],
)
def test_wrong_tensors_are_named(change, message):
    """Missing, extra, misshaped and non-finite tensors each give an error with the tensor's name and the source."""
    state = nnx.state(Net())
    tensors = weights.flatten(state)
    change(tensors)
    with pytest.raises(OmniError, match=f"some file: tensor {message}"):
        weights.unflatten(state, tensors, "some file")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_file_round_trip(tmp_path, dtype):
    """Floats are stored as asked and read as float32; other types pass unchanged, scalars and views included."""
    tensors = {"a": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3).T, "n": np.array(3), "f": np.array(True)}
    weights.write(tmp_path / "w", weights.rounded(tensors, dtype))
    back = weights.read(tmp_path / "w")
    assert back["a"].dtype == np.float32 and back["n"].dtype == np.int64 and back["f"].dtype == bool
    np.testing.assert_array_equal(back["a"], tensors["a"].astype(np.dtype(getattr(ml_dtypes, dtype, dtype))))
    assert back["n"] == 3 and back["f"] and back["n"].shape == ()


def test_storage_that_does_not_fit_is_refused():
    """A value beyond float16 is an error that names the tensor, as is an unknown dtype."""
    with pytest.raises(OmniError, match="'big' does not fit float16"):
        weights.rounded({"big": np.array([1e6], np.float32)}, "float16")
    with pytest.raises(OmniError, match="int8"):
        weights.rounded({}, "int8")


def test_unreadable_files_are_refused(tmp_path):
    """Absent, truncated and foreign files are errors that name the file, never a pickle load."""
    with pytest.raises(OmniError, match="no such file"):
        weights.read(tmp_path / "absent")
    weights.write(tmp_path / "whole", {"a": np.zeros(9, np.float32)})
    content = (tmp_path / "whole").read_bytes()
    for damaged in (b"", content[:-4], b"\x80\x04K\x01.", b"\xff" * 64):
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(OmniError, match="damaged: not a whole safetensors file"):
            weights.read(tmp_path / "damaged")


def test_directory_round_trip(tmp_path, tokenizer):
    """A loaded tokenizer has the same class, configuration, hash and codes."""
    tokenizer.save(tmp_path)
    loaded = omni_tokenizers.load(str(tmp_path))
    assert type(loaded) is ImageTokenizer
    assert (loaded.config, loaded.hash) == (tokenizer.config, tokenizer.hash)
    image = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    np.testing.assert_array_equal(loaded.encode(image), tokenizer.encode(image))


def test_rounded_directory_knows_its_own_hash(tmp_path, tokenizer):
    """Half-precision storage loads, with a hash of the weights as stored."""
    tokenizer.save(tmp_path, dtype="bfloat16")
    assert omni_tokenizers.load(tmp_path).hash != tokenizer.hash


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "smell"}, "unknown tokenizer type 'smell'"),
        ({"type": ["image_vq"]}, "unknown tokenizer type"),
        ({"hash": "0" * 16}, "hash"),
        ({"config": None}, "'config' must be a JSON object"),
        ({"chanels": 4}, "unknown key 'chanels' .* did you mean 'channels'"),
        ({"channels": "4"}, "channels = '4'"),
        ({"multipliers": [1, "2"]}, "multipliers"),
        ({"channels": 5}, "has the shape"),
        ({"channels": 10**6}, "has the shape"),
        ({"channels": 10**30}, r"tokenizer\.json: sizes"),
        ({"residual_blocks": 2}, "is missing"),
        ({"residual_blocks": 10**9}, "residual_blocks"),
        ({"image_size": 9}, r"tokenizer\.json: image_size 9"),
        ({"decay": 0.5}, "hash"),
    ],
)
def test_inconsistent_directories_are_refused(tmp_path, tokenizer, changes, message):
    """A description that is wrong, or belongs to other weights, is one clear error."""
    tokenizer.save(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(OmniError, match=message):
        omni_tokenizers.load(tmp_path)


@pytest.mark.parametrize("content", [None, "", "{", "[1]", "[" * 100_000])
def test_broken_descriptions_are_refused(tmp_path, content):
    """No tokenizer.json, or one that is no JSON object, is an error that names it."""
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(OmniError, match=r"tokenizer\.json"):
        omni_tokenizers.load(tmp_path)


def test_changed_weights_change_the_hash(tokenizer):
    """Any change of a value, a name or the configuration gives another hash."""
    tensors = {"a": np.zeros(3, np.float32)}
    hashes = {
        fingerprint({"x": 1}, tensors),
        fingerprint({"x": 2}, tensors),
        fingerprint({"x": 1}, {"b": tensors["a"]}),
        fingerprint({"x": 1}, {"a": np.array([0, 0, 1e-7], np.float32)}),
    }
    assert len(hashes) == 4 and all(len(value) == 16 for value in hashes)


def test_codes_read_as_numpy():
    """np.asarray(codes) gives the int32 ids; ids of any integer type are accepted and checked."""
    codes = as_codes(np.array([[1, 2]], np.int64), axes=("batch", "length"), size=3)
    assert np.asarray(codes).dtype == np.int32 and codes.shape == (1, 2) and len(codes) == 1
    assert as_codes(Codes(codes.ids, np.array([5])), axes=("batch", "length"), size=3).lengths[0] == 5
    for wrong, message in (([[0.5]], "integers"), ([1], "axes"), ([[3]], "outside"), ([[-1]], "outside")):
        with pytest.raises(OmniError, match=message):
            as_codes(wrong, axes=("batch", "length"), size=3)
