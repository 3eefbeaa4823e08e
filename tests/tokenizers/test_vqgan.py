"""The VQGAN family without torch: recorded codes and pixels, files that are damaged, sizes, export."""

import json
import os
import sys

import image_tokenizer_cases as cases
import numpy as np
import pytest

import omni_tokenizers
from omni_tokenizers import checkpoints, weights
from omni_tokenizers.errors import OmniError, UsageError
from omni_tokenizers.vqgan import VQGANConfig

CASES = ("chameleon", "janus", "taming", "llamagen")
KERNEL = "decoder.conv_out.weight"
"""[3, 32, 3, 3]: with its first axes swapped it has another shape."""


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """A tokenizer of each recorded checkpoint."""
    found = {}
    for case in CASES:
        found[case] = checkpoints.import_checkpoint(cases.write(case, tmp_path_factory.mktemp(case)))
    return found


@pytest.fixture(scope="module")
def arrays():
    """What was recorded."""
    return cases.recorded()[1]


@pytest.mark.parametrize("case", CASES)
def test_recorded_codes_and_pixels(tokenizers, arrays, case):
    """A checkpoint gives the codes and, rounded, the pixels that transformers or the reference computed from it.

    9 x 11 pixels are no multiple of the stride: they are padded by repeating the edge, and cut off again.
    """
    tokenizer = tokenizers[case]
    codes = tokenizer.encode(cases.pictures())
    np.testing.assert_array_equal(codes.ids, arrays[f"{case}/codes"])
    np.testing.assert_array_equal(codes.sizes, [[9, 11]] * 2)
    if case == "chameleon":
        with pytest.raises(OmniError, match=r"no decoder.*vqgan\.ckpt"):
            tokenizer.decode(codes)
    else:
        check_pixels(tokenizer.decode(codes), arrays[f"{case}/pixels"])


def check_pixels(ours: np.ndarray, recorded: np.ndarray) -> None:
    """Ours are the recorded levels, rounded: those between two levels to within a hundredth may become either."""
    assert ours.dtype == np.uint8 and ours.shape == recorded.shape
    assert ((recorded > 0) & (recorded < 255)).mean() > 0.5 and recorded.std() > 10
    assert np.abs(ours - recorded).max() <= 0.51


@pytest.mark.parametrize("case", ["chameleon", "janus"])
def test_a_whole_model_holds_the_same_tokenizer(tokenizers, tmp_path, case):
    """Of a directory with a language model too, in several files, the tokenizer's section and tensors are read."""
    tensors = {f"model.vqmodel.{name}": value for name, value in cases.tensors_of(case).items()}
    files = dict.fromkeys(tensors, "model-00001-of-00002.safetensors")
    weights.write(tmp_path / "model-00001-of-00002.safetensors", tensors)
    files["lm_head.weight"] = "model-00002-of-00002.safetensors"  # not there, and not needed
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    config = {"model_type": case, "vq_config": cases.recorded()[0][case]["config"], "text_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert omni_tokenizers.load(tmp_path).hash == tokenizers[case].hash


def without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


DAMAGE = {
    "missing": lambda tensors, name: without(tensors, name),
    "belongs to no part": lambda tensors, name: tensors | {"decoder.more.weight": tensors[name]},
    "has the shape": lambda tensors, name: tensors | {name: tensors[name].swapaxes(0, 1)},
    "not finite": lambda tensors, name: tensors | {name: np.where(tensors[name] == tensors[name].max(), np.nan, 0)},
}


@pytest.mark.parametrize("message", DAMAGE)
@pytest.mark.parametrize("case", ["janus", "taming"])
def test_a_damaged_checkpoint_is_named(tmp_path, case, message):
    """A tensor that is missing, unknown, transposed or not finite is named, with the file or directory."""
    name = "decoder.more.weight" if message == "belongs to no part" else KERNEL
    path = cases.write(case, tmp_path, DAMAGE[message](cases.tensors_of(case), KERNEL))
    with pytest.raises(OmniError, match=message) as caught:
        checkpoints.import_checkpoint(path)
    assert repr(name) in str(caught.value) and str(path) in str(caught.value)


def test_what_belongs_to_training_is_left_out(tokenizers, tmp_path):
    """Tensors of a loss, and how often LlamaGen used its codes, change nothing."""
    for case, more in {"taming": "loss.logvar", "llamagen": "quantize.codebook_used"}.items():
        path = cases.write(case, tmp_path, cases.tensors_of(case) | {more: np.zeros(3, np.float32)})
        assert checkpoints.import_checkpoint(path).hash == tokenizers[case].hash


def test_a_pickle_that_asks_for_more_than_tensors_is_refused(tmp_path):
    """What such a file would run is named, and not run."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install 'omni-any-to-any[torch]'")

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    torch.save({"state_dict": {"encoder.conv_in.weight": Hostile()}}, tmp_path / "vqgan.ckpt")
    with pytest.raises(OmniError, match=r"vqgan\.ckpt: refused.*needs \w+\.system to be run"):
        checkpoints.import_checkpoint(tmp_path / "vqgan.ckpt", torch_reader=True)
    assert not (tmp_path / "executed").exists()


def test_torch_files_need_torch(tmp_path, monkeypatch):
    """Without torch the error says which extra has it."""
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "vqgan.ckpt").touch()
    with pytest.raises(OmniError, match=r"vqgan\.ckpt.*omni-any-to-any\[torch\]"):
        checkpoints.import_checkpoint(tmp_path / "vqgan.ckpt", torch_reader=True)


def test_bad_input_is_an_error_of_one_line(tokenizers):
    """What are no pictures and what are no codes is said."""
    tokenizer, pictures = tokenizers["janus"], cases.pictures()
    ids = np.zeros((2, 5, 6), np.int32)
    for bad, message in {
        "floats": (pictures / 255.0, "must be uint8"),
        "one picture": (pictures[0], r"\[batch, height, width, 3\]"),
        "grey": (pictures[..., :1], r"\[batch, height, width, 3\]"),
        "empty": (pictures[:, :0], "not empty"),
    }.values():
        with pytest.raises(OmniError, match=message):
            tokenizer.encode(bad)
    for bad, message in {
        "too high": (ids + 32, "code 32 is outside the codebook, which holds 0 to 31"),
        "negative": (ids - 1, "code -1 is outside"),
        "floats": (ids * 1.0, "codes must be integers"),
        "flat": (ids[0], r"\[batch, rows, columns\]"),
        "empty": (ids[:, :0], "must not be empty"),
        "sizes too large": (omni_tokenizers.Codes(ids, sizes=np.array([[11, 12]] * 2)), "sizes must lie in 1 to"),
        "too few sizes": (omni_tokenizers.Codes(ids, sizes=np.zeros((0, 2), int)), "sizes must be 2 x 2 integers"),
    }.values():
        with pytest.raises(OmniError, match=message):
            tokenizer.decode(bad)


def test_each_picture_has_its_own_size(tokenizers):
    """Decoded pictures of several sizes are black beyond their own, and the same as alone."""
    tokenizer = tokenizers["janus"]
    ids = np.random.default_rng(0).integers(0, 32, (2, 5, 6), np.int32)
    whole = tokenizer.decode(ids)
    cut = tokenizer.decode(omni_tokenizers.Codes(ids, sizes=np.array([[9, 3], [2, 11]])))
    assert whole.shape == (2, 10, 12, 3) and cut.shape == (2, 9, 11, 3)
    np.testing.assert_array_equal(cut[0, :, :3], whole[0, :9, :3])
    np.testing.assert_array_equal(cut[1, :2], whole[1, :2, :11])
    assert not cut[0, :, 3:].any() and not cut[1, 2:].any()


@pytest.mark.parametrize("case", CASES)
def test_saved_and_exported_tokenizers_load_as_the_same(tokenizers, tmp_path, case):
    """Our own directory and transformers', where it has such a model, give back every bit."""
    tokenizer = tokenizers[case]
    tokenizer.save(tmp_path / "ours")
    again = omni_tokenizers.load(tmp_path / "ours")
    assert (again.hash, again.config) == (tokenizer.hash, tokenizer.config)
    if case == "taming":
        with pytest.raises(OmniError, match="transformers has no such VQGAN"):
            checkpoints.export_checkpoint(tokenizer, tmp_path / "theirs")
    else:
        checkpoints.export_checkpoint(tokenizer, tmp_path / "theirs")
        assert omni_tokenizers.load(tmp_path / "theirs").hash == tokenizer.hash


def test_a_configuration_that_makes_no_net_is_refused():
    """Sizes that do not fit together are errors that say which."""
    for settings, message in (
        ({"channels": 33}, "multiples of 32"),
        ({"attention_stages": (5,)}, "0 to 4"),
        ({"attention_stages": (2, 1)}, "must rise"),
        ({"multipliers": ()}, "one stage at least"),
        ({"residual_blocks": 65}, "up to 64"),
        ({"code_dim": 0}, "code_dim"),
    ):
        with pytest.raises(UsageError, match=message):
            VQGANConfig(**settings)
