"""EnCodec, DAC and Mimi from public checkpoints: what transformers recorded, every layout of a file, every damage."""

import json

import numpy as np
import pytest
from audio_codecs import LENGTHS, NAMES, golden

import omni_tokenizers
from omni_tokenizers import weights
from omni_tokenizers.checkpoints import export_checkpoint, import_checkpoint
from omni_tokenizers.codes import Codes
from omni_tokenizers.errors import OmniError

FAMILIES = ("encodec 24k", "dac odd", "mimi")
DIRECTION = "parametrizations.weight.original1"
"""The end of the names of weight norms' directions, as transformers writes them."""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Opens each codec once."""
    opened = {}

    def load(name: str):
        if name not in opened:
            opened[name] = omni_tokenizers.load(golden(name).write(tmp_path_factory.mktemp("theirs") / "codec"))
        return opened[name]

    return load


def padded_batch(clips) -> np.ndarray:
    """The clips' sound in one array, with garbage after each one's end."""
    batch = np.full((len(clips), *clips[0].audio.shape), 0.7, np.float32)
    for row, clip in zip(batch, clips, strict=True):
        row[:, : clip.audio.shape[1]] = clip.audio
    return batch


@pytest.mark.parametrize("name", NAMES)
def test_codes_and_sound_are_those_recorded_of_transformers(loaded, name):
    """Clips of odd lengths, padded in one batch: the codes recorded of each alone, and its sound within 1e-4."""
    tokenizer, clips = loaded(name), golden(name).clips
    codes = tokenizer.encode(padded_batch(clips), np.array(LENGTHS))
    decoded = tokenizer.decode(codes)
    assert tokenizer.frames(codes.lengths).tolist() == [clip.codes.shape[1] for clip in clips]
    assert codes.lengths.tolist() == list(LENGTHS) and decoded.shape == (3, tokenizer.channels, LENGTHS[0])
    for row, clip in enumerate(clips):
        frames, length = clip.codes.shape[1], LENGTHS[row]
        np.testing.assert_array_equal(codes.ids[row, :, :frames], clip.codes)
        assert not codes.ids[row, :, frames:].any() and not decoded[row, :, length:].any()
        if clip.scales is not None:
            np.testing.assert_allclose(codes.scales[row, : len(clip.scales)], clip.scales, rtol=1e-5)
        both = min(length, clip.sound.shape[1])
        largest = np.abs(decoded[row, :, :both] - clip.sound[:, :both]).max()
        assert largest < 1e-4 * np.sqrt(np.square(clip.sound).mean())
        assert not decoded[row, :, both:].any()  # what odd strides of a DAC lose is silent
    for level in range(tokenizer.codebooks):
        used = np.unique(np.concatenate([clip.codes[level] for clip in clips]))
        assert len(used) >= tokenizer.codebook_sizes[level] / 2


@pytest.mark.parametrize("name", FAMILIES)
def test_lengths_are_exact_whatever_fills_a_frame(loaded, name):
    """From one sample on, each clip takes the frames it needs and comes back as long as it was, then silent."""
    tokenizer = loaded(name)
    step = tokenizer.samples_per_frame
    lengths = np.array([1, step, step + 1, LENGTHS[0]])
    codes = tokenizer.encode(np.random.default_rng(0).normal(size=(4, 1, LENGTHS[0])), lengths)
    decoded, frames = tokenizer.decode(codes), -(-lengths // step)
    assert codes.shape == (4, tokenizer.codebooks, frames.max()) and decoded.shape == (4, 1, LENGTHS[0])
    for row, (length, count) in enumerate(zip(lengths, frames, strict=True)):
        assert not codes.ids[row, :, count:].any() and not decoded[row, :, length:].any()
        lost = frames.max() * step - golden(name).clips[0].sound.shape[1]  # by a DAC's odd strides
        assert (decoded[row, :, : min(length, count * step - lost)] != 0).all()


def test_shards_are_read_together(tmp_path, loaded):
    """Weights in several files with an index are the same tokenizer as in one."""
    codec = golden("encodec 24k")
    codec.write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    names, places = sorted(codec.tensors), {}
    for number in range(3):
        part, file = names[number::3], f"model-{number + 1:05}-of-00003.safetensors"
        weights.write(tmp_path / file, {name: codec.tensors[name] for name in part})
        places |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert omni_tokenizers.load(tmp_path).hash == loaded("encodec 24k").hash
    (tmp_path / file).unlink()
    with pytest.raises(OmniError, match=f"{file}: there is no such file"):
        omni_tokenizers.load(tmp_path)
    places["encoder.layers.0.conv.bias"] = "../elsewhere.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(OmniError, match=r"index\.json: 'weight_map' must give the name of a file beside it"):
        omni_tokenizers.load(tmp_path)


def respelled(tensors, change):
    """Tensors with each weight norm as `change(prefix, size, direction)` spells it."""
    result = dict(tensors)
    for name in [name for name in tensors if name.endswith(DIRECTION)]:
        prefix = name.removesuffix(DIRECTION)
        size = result.pop(prefix + DIRECTION.replace("1", "0"))
        result |= change(prefix, size, result.pop(name))
    return result


def test_weight_norms_in_each_spelling_are_one_tokenizer(tmp_path, loaded):
    """Both of PyTorch's spellings give the same bits, and so, within rounding, does a plain weight."""
    codec, ours = golden("encodec 24k"), loaded("encodec 24k")
    older = respelled(codec.tensors, lambda prefix, g, v: {f"{prefix}weight_g": g, f"{prefix}weight_v": v})

    def plain(prefix, g, v):
        norms = np.array([np.sqrt(np.sum(np.square(row, dtype=np.float64))) for row in v])
        return {f"{prefix}weight": (v * (g.ravel() / norms)[:, None, None]).astype(np.float32)}

    fused = respelled(codec.tensors, plain)
    assert not any("original" in name for name in [*older, *fused]) and len(fused) < len(older) == len(codec.tensors)
    codec.write(tmp_path)
    weights.write(tmp_path / "model.safetensors", older)
    assert omni_tokenizers.load(tmp_path).hash == ours.hash
    weights.write(tmp_path / "model.safetensors", fused)
    found, expected = (weights.flatten(tokenizer.state) for tokenizer in (omni_tokenizers.load(tmp_path), ours))
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-7, err_msg=name)


# One tensor of each family that is no vector and not square.
SOME = {
    "encodec 24k": f"encoder.layers.0.conv.{DIRECTION}",
    "dac odd": "encoder.block.0.conv1.weight",
    "mimi": "encoder_transformer.layers.0.mlp.fc1.weight",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_damaged_tensor_is_named(tmp_path, name):
    """Missing, extra, transposed and not finite tensors each give an error with the tensor's name and the directory."""
    codec, some = golden(name), SOME[name]
    value = codec.tensors[some]
    codec.write(tmp_path)

    def message(change: dict) -> str:
        tensors = {key: value for key, value in (codec.tensors | change).items() if value is not None}
        weights.write(tmp_path / "model.safetensors", tensors)
        with pytest.raises(OmniError) as caught:
            omni_tokenizers.load(tmp_path)
        assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)
        return str(caught.value)

    assert f"tensor '{some}' is missing" in message({some: None})
    assert "tensor 'spare' belongs to no part of this model" in message({"spare": np.zeros(2, np.float32)})
    transposed = message({some: value.T})
    assert f"'{some}'" in transposed and ("has the shape" in transposed or "values for" in transposed)
    damaged = value.copy()
    damaged.flat[-1] = np.nan
    assert f"tensor '{some}' holds values that are not finite" in message({some: damaged})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("encodec 24k", {"model_type": "encodek"}, "no tokenizer is known in a model of type 'encodek'"),
        ("encodec 24k", {"model_type": None}, "no tokenizer is known in a model of type None"),
        ("encodec 24k", {"norm_type": "layer_norm"}, "norm_type = 'layer_norm'"),
        ("encodec 24k", {"pad_mode": "circular"}, "'circular'"),
        ("encodec 24k", {"trim_right_ratio": 0.5}, "trim_right_ratio = 0.5"),
        ("encodec 24k", {"codebook_size": 12}, "codebook_size must be a power of two"),
        ("encodec 24k", {"upsampling_ratios": "4"}, "upsampling_ratios = '4'"),
        ("encodec 24k", {"codebook_dim": 9}, "codebook_dim = 9"),
        ("encodec 48k", {"overlap": 1.5}, "overlap"),
        ("dac odd", {"codebook_dim": 4.5}, "codebook_dim = 4.5"),
        ("dac odd", {"downsampling_ratios": [1, 3, 4]}, "strides"),
        ("mimi", {"hidden_act": "silu"}, "hidden_act = 'silu'"),
        ("mimi", {"num_key_value_heads": 1}, "num_key_value_heads = 1"),
        ("mimi", {"attention_bias": True}, "attention_bias = True"),
        ("mimi", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 200.0}}, "rope_type = 'yarn'"),
        ("mimi", {"num_semantic_quantizers": 5}, "semantic_codebooks"),
        ("mimi", {"frame_rate": -1.0}, "frame_rate = -1.0"),
    ],
)
def test_settings_that_are_not_known_are_refused(tmp_path, name, change, message):
    """A value of config.json that this package has no net for is named, with the directory; nothing is guessed."""
    golden(name).write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**golden(name).config, **change}))
    with pytest.raises(OmniError) as caught:
        omni_tokenizers.load(tmp_path)
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)


def test_input_that_does_not_fit_is_refused(loaded):
    """Codes out of range, too many codebooks, sound of another shape or with NaN, codes of 48 kHz without scales."""
    mono, stereo, dac = loaded("encodec 24k"), loaded("encodec 48k"), loaded("dac odd")
    quiet = np.zeros((1, 1, 48), np.float32)
    cases = [
        (lambda: mono.decode(np.full((1, 2, 3), 16)), "code 16 is outside the codebook, which holds 0 to 15"),
        (lambda: mono.decode(np.full((1, 2, 3), -1)), "code -1 is outside"),
        (lambda: mono.decode(np.zeros((1, 5, 3), int)), r"\[batch, 1 to 3, frames\]"),
        (lambda: mono.decode(np.zeros((1, 2, 0), int)), "not empty"),
        (lambda: mono.decode(np.zeros((1, 2, 3))), "codes must be integers"),
        (lambda: mono.decode(Codes(np.zeros((1, 2, 3), np.int32), np.array([37]))), "lengths must lie in 1 to 36"),
        (lambda: loaded("mimi").decode(np.zeros((1, 1, 3), int)), r"\[batch, 2 to 5, frames\]"),
        (lambda: stereo.decode(np.zeros((1, 2, 3), int)), "these codes need scales"),
        (lambda: stereo.decode(Codes(np.zeros((1, 2, 3), int), None, np.ones((1, 2)))), "scales must be finite"),
        (lambda: stereo.encode(quiet), r"must be \[batch, 2, samples\]"),
        (lambda: mono.encode(quiet * np.nan), "NaN"),
        (lambda: mono.encode(quiet[:, :, :0]), "must not be empty"),
        (lambda: mono.encode(quiet.astype(np.int16)), "floating point"),
        (lambda: mono.encode(quiet, np.array([49])), "lengths must lie in 1 to 48"),
        (lambda: dac.encode(quiet, codebooks=4), "1 to 3 codebooks, not 4"),
        (lambda: mono.encode(quiet, bandwidth=0.5), r"a bandwidth of 0\.8, 1\.6, 2\.4 kbit/s"),
        (lambda: mono.encode(quiet, bandwidth=0.8, codebooks=1), "either codebooks or a bandwidth"),
    ]
    for call, message in cases:
        with pytest.raises(OmniError, match=message):
            call()


def test_a_bandwidth_buys_the_first_codebooks(loaded):
    """1.6 kbit/s at 200 frames of 4 bits a second are two codebooks, the first two of all."""
    clip = golden("encodec 24k").clips[2]
    codes = loaded("encodec 24k").encode(clip.audio[None], bandwidth=1.6)
    np.testing.assert_array_equal(codes.ids[0], clip.codes[:2])


@pytest.mark.parametrize("name", ["encodec 48k", "dac odd", "mimi"])
def test_directories_of_both_kinds_hold_the_same_tokenizer(tmp_path, loaded, name):
    """What `save` and `export_checkpoint` write loads with the configuration and, to the last bit, the weights.

    The export has the names, shapes and settings of transformers.
    """
    codec, tokenizer = golden(name), loaded(name)
    tokenizer.save(tmp_path / "ours")
    export_checkpoint(tokenizer, tmp_path / "theirs")
    for again in (omni_tokenizers.load(tmp_path / "ours"), import_checkpoint(tmp_path / "theirs")):
        assert (again.hash, again.config, type(again)) == (tokenizer.hash, tokenizer.config, type(tokenizer))
    tensors = weights.read(tmp_path / "theirs" / "model.safetensors")
    assert {key: value.shape for key, value in tensors.items()} == {k: v.shape for k, v in codec.tensors.items()}
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    shared = config.keys() & codec.config.keys()
    assert {key: config[key] for key in shared} == {key: codec.config[key] for key in shared}
    assert {"model_type", "sampling_rate", "codebook_size"} <= shared
