"""Large checkpoints: each tensor read when it is asked for, headers that lie about their file refused."""

import json

import numpy as np
import pytest
import safetensors.numpy

from omni_tokenizers import weights
from omni_tokenizers.errors import OmniError
from omni_tokenizers.tensor_files import INDEX, MODEL, open_directory, open_file, write_directory, write_file

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.float32(7) * np.ones((5,), np.float32),
    "counts": np.array([1, 2], np.int64),
    "none": np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize("shard_bytes", [1 << 20, 24])
def test_what_is_written_is_read(tmp_path, shard_bytes):
    """One file or several hold the same tensors, shapes known without reading; integers keep their type."""
    shapes = {name: value.shape for name, value in TENSORS.items()}
    write_directory(tmp_path, shapes, TENSORS.items(), "float32", shard_bytes=shard_bytes)
    assert (tmp_path / INDEX).exists() == (shard_bytes == 24)
    found = open_directory(tmp_path)
    assert sorted(found) == sorted(TENSORS) and {name: found.shape(name) for name in found} == shapes
    for name, value in TENSORS.items():
        np.testing.assert_array_equal(found[name], value)
        assert found[name].dtype == value.dtype


def test_only_files_with_wanted_tensors_are_opened(tmp_path):
    """A tokenizer inside a large model needs the files that hold it, and no others."""
    shapes = {name: value.shape for name, value in TENSORS.items()}
    write_directory(tmp_path, shapes, TENSORS.items(), "float32", shard_bytes=24)
    places = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    (tmp_path / places["a"]).unlink()
    np.testing.assert_array_equal(open_directory(tmp_path, lambda name: name == "b")["b"], TENSORS["b"])
    with pytest.raises(OmniError, match=f"{places['a']}: there is no such file"):
        open_directory(tmp_path)


def header(**changes):
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | changes
    content = json.dumps({"a": entry}).encode()
    return len(content).to_bytes(8, "little") + content + bytes(24)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(data_offsets=[0, 25]), "lies at bytes 0 to 25 of 24"),
        (header(data_offsets=[-8, 16]), "lies at bytes -8"),
        (header(data_offsets=[24, 0]), "lies at bytes 24 to 0"),
        (header(data_offsets="ab"), "not a whole safetensors file"),
        (header(shape=[2, 4]), "not a whole safetensors file"),
        (header(dtype="F8"), "the type F8, which cannot be read"),
        (b"", "not a whole safetensors file"),
        (b"\x05" + bytes(7) + b"[1,2]", "not a whole safetensors file"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, content, message):
    """Whatever a header says of its file, the answer is a tensor that is there or one line."""
    (tmp_path / MODEL).write_bytes(content)
    with pytest.raises(OmniError, match=message) as caught:
        open_file(tmp_path / MODEL)["a"]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("places", [None, [], {"a": 3}, {"a": ""}, {"a": "../x"}, {"a": "/etc/x"}, {"a": "x\\y"}])
def test_an_index_names_files_beside_it(tmp_path, places):
    """Paths out of the directory, and what is no path, are refused before anything is opened."""
    weights.write(tmp_path / "x", TENSORS)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(OmniError, match="'weight_map' must give the name of a file beside it"):
        open_directory(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_file_written_tensor_by_tensor_is_what_the_format_says(tmp_path, dtype):
    """safetensors' own reader finds every tensor, rounded to the type."""
    tensors = {name: value for name, value in TENSORS.items() if value.dtype == np.float32} | {"one": np.float32([0.1])}
    tensors["scalar"] = np.float32(3)
    shapes = {name: value.shape for name, value in tensors.items()}
    write_file(tmp_path / "one.safetensors", shapes, tensors.items(), dtype)
    found = safetensors.numpy.load_file(tmp_path / "one.safetensors")
    assert found.keys() == tensors.keys()
    for name, value in weights.rounded(tensors, dtype).items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        np.testing.assert_array_equal(found[name], value)


def test_a_value_too_large_for_a_type_is_named(tmp_path):
    with pytest.raises(OmniError, match="'a' does not fit float16"):
        write_file(tmp_path / "x", {"a": (1,)}, [("a", np.full(1, 1e20, np.float32))], "float16")
    with pytest.raises(OmniError, match="'int4'"):
        write_file(tmp_path / "y", {"a": (1,)}, [], "int4")
    assert not (tmp_path / "y").exists()


def test_a_file_stays_what_it_was_where_another_cannot_be_written(tmp_path):
    """A value that does not fit, and tensors in another order than was said: the file of before is still there."""
    shapes, values = {"a": (2,), "b": (2,)}, {"a": np.float32([1, 2]), "b": np.float32([3, 4])}
    write_file(tmp_path / "x", shapes, values.items(), "float16")
    before = (tmp_path / "x").read_bytes()
    with pytest.raises(OmniError, match="'b' does not fit"):
        write_file(tmp_path / "x", shapes, (values | {"b": np.float32([1e9, 1])}).items(), "float16")
    with pytest.raises(ValueError, match="'b'"):
        write_file(tmp_path / "x", shapes, reversed(values.items()), "float16")
    with pytest.raises(ValueError, match="'a'"):
        write_file(tmp_path / "x", {"a": (1, 2), "b": (2,)}, values.items(), "float16")
    assert (tmp_path / "x").read_bytes() == before
