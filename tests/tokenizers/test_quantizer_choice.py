"""Quantisers by configuration: JSON, command line, and the tokenizers that take any of them without losing old ones."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quantizer_cases import LEVELLED, SINGLE

import omni_tokenizers
from omni.bundle import MODELS
from omni.experiment import override
from omni.train.tokenizers import AudioTokenizerTask, ImageTokenizerTask
from omni_tokenizers.audio import AudioTokenizer, AudioTokenizerConfig, SpectralCodec
from omni_tokenizers.base import config_from_dict, config_to_dict
from omni_tokenizers.errors import OmniError, UsageError
from omni_tokenizers.image import ImageTokenizer, ImageTokenizerConfig, ImageVQ
from omni_tokenizers.quantizers import (
    EMAVectorQuantizer,
    FSQConfig,
    LearnedQuantizerConfig,
    ResidualQuantizerConfig,
    VectorQuantizerConfig,
    make_quantizer,
)

IMAGE = ImageTokenizerConfig(image_size=8, patch_size=4, channels=4, multipliers=(1,))
AUDIO = AudioTokenizerConfig(
    mels=8, dim=8, encoder_blocks=1, decoder_blocks=1, loss_windows=(256,), loss_mels=(8,), downsample=1
)


@dataclasses.dataclass(frozen=True)
class Experiment:
    image: ImageTokenizerConfig = IMAGE
    audio: AudioTokenizerConfig = AUDIO


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_shipped_tokenizers_keep_their_hash(modality):
    """Tokenizers saved before there was a choice load, and their configuration and hash are written as they stand."""
    directory = f"{MODELS}/digits/tokenizers/{modality}"
    with open(f"{directory}/tokenizer.json") as file:
        description = json.load(file)
    tokenizer = omni_tokenizers.load(directory)
    assert tokenizer.hash == description["hash"]
    assert json.loads(json.dumps(config_to_dict(tokenizer.config))) == description["config"]


@pytest.mark.parametrize("name", SINGLE | LEVELLED)
def test_json_carries_every_quantiser(name):
    """A configuration comes back from JSON equal, nested ones and their tuples included."""
    kind = dataclasses.replace(IMAGE, quantizer=SINGLE[name]) if name in SINGLE else None
    config = kind or dataclasses.replace(AUDIO, quantizer=LEVELLED[name])
    values = json.loads(json.dumps(config_to_dict(config)))
    assert values["quantizer"]["kind"] == config.quantizer.kind
    assert config_from_dict(type(config), values, "here") == config


@pytest.mark.parametrize(
    ("quantizer", "said"),
    [
        ({"kind": "fsqq"}, "here: unknown kind 'fsqq' of 'config.quantizer'; did you mean 'fsq'?"),
        ({"levels": [4]}, "unknown kind None of 'config.quantizer'; known are ema, learned, simvq, ibq, fsq, lfq"),
        ({"kind": ["fsq"]}, r"unknown kind \['fsq'\]"),
        ({"kind": "residual"}, "unknown kind 'residual'"),
        ({"kind": "fsq", "level": [4]}, "unknown key 'level' in 'config.quantizer'; did you mean 'levels'"),
        ({"kind": "fsq", "levels": [4.5]}, r"'config.quantizer' has levels = \[4.5\]"),
        ({"kind": "fsq", "levels": [1]}, "here: levels must be"),
        ({"kind": "learned", "code_dim": "8"}, "'config.quantizer' has code_dim = '8'"),
        ("fsq", "'config' has quantizer = 'fsq'"),
        ([], r"'config' has quantizer = \[\]"),
    ],
)
def test_wrong_descriptions_are_refused(quantizer, said):
    """A quantiser that a file describes wrongly is one error that says where."""
    with pytest.raises(OmniError, match=said):
        config_from_dict(ImageTokenizerConfig, {"quantizer": quantizer}, "here")


def test_an_unknown_level_is_named_where_it_stands():
    """Configurations within configurations are checked alike."""
    values = {"quantizer": {"kind": "residual", "level": {"kind": "learned", "dims": 3}}}
    with pytest.raises(OmniError, match=r"unknown key 'dims' in 'config\.quantizer\.level'; did you mean 'dim'"):
        config_from_dict(AudioTokenizerConfig, values, "here")


def test_command_line_chooses_and_changes():
    """A quantiser is chosen by its name, at any depth, and one that an experiment chose is changed by its keys."""
    chosen = override(Experiment(), ["image.quantizer:fsq-config", "--image.quantizer.levels", "3", "4"], "omni train")
    assert chosen.image.quantizer == FSQConfig(levels=(3, 4)) and chosen.audio == AUDIO
    words = "audio.quantizer:residual-quantizer-config --audio.quantizer.levels 3 audio.quantizer.level:sim-vq-config"
    assert override(Experiment(), words.split(), "omni train").audio.quantizer.level.kind == "simvq"
    experiment = Experiment(image=dataclasses.replace(IMAGE, quantizer=LearnedQuantizerConfig()))
    changed = override(experiment, ["--image.quantizer.code-dim", "4"], "omni train")
    assert changed.image.quantizer == LearnedQuantizerConfig(code_dim=4)
    assert override(Experiment(), [], "omni train") == Experiment()
    with pytest.raises(UsageError, match="unknown configuration key"):
        override(Experiment(), ["--image.quantizer.code-dim", "4"], "omni train")


@pytest.mark.parametrize(
    ("config", "change", "said"),
    [
        (IMAGE, {"codebook_size": 64}, "codebook_size 64 would do nothing"),
        (IMAGE, {"decay": 0.5}, "decay 0.5"),
        (AUDIO, {"codebooks": 3}, "codebooks 3"),
        (AUDIO, {"code_dim": 4}, "code_dim 4"),
    ],
)
def test_settings_that_a_quantiser_replaces_are_refused_beside_it(config, change, said):
    """What would be ignored is said."""
    quantizer = FSQConfig() if config is IMAGE else ResidualQuantizerConfig()
    with pytest.raises(UsageError, match=said):
        dataclasses.replace(config, quantizer=quantizer, **change)


def test_no_choice_is_the_quantiser_of_before():
    """Without a choice an image net has moving averages of the configuration's own settings."""
    config = dataclasses.replace(IMAGE, codebook_size=16, code_dim=3, decay=0.8, commitment=0.4)
    assert config.chosen_quantizer == VectorQuantizerConfig(16, 3, 0.8, 0.4)
    assert isinstance(make_quantizer(config.chosen_quantizer, rngs=nnx.Rngs(0)), EMAVectorQuantizer)
    assert "quantizer" not in config_to_dict(config)


@pytest.mark.parametrize("name", ["ema", "dac", "llamagen", "simvq", "ibq", "fsq", "lfq"])
def test_image_tokenizer_takes_it(name, tmp_path):
    """Every parameter learns, the loss has all of the quantiser's terms, and a saved tokenizer comes back the same."""
    config = dataclasses.replace(IMAGE, quantizer=SINGLE[name])
    net = ImageVQ(config, rngs=nnx.Rngs(0))
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), np.uint8)
    total, metrics, gradients = first_step(ImageTokenizerTask(None, config), net, {"image": images})
    terms = sum(float(metrics[term][0]) for term in ("reconstruction", "commitment", "auxiliary"))
    assert float(total) == pytest.approx(terms, rel=1e-5)
    check_gradients(gradients)
    tokenizer = ImageTokenizer(config, net)
    tokenizer.save(tmp_path)
    loaded = omni_tokenizers.load(tmp_path)
    assert loaded.config == config and loaded.hash == tokenizer.hash
    assert loaded.codebook_sizes == (config.quantizer.codebook_size,)
    assert loaded.code_vectors[0].shape == (config.quantizer.codebook_size, 4)
    codes = tokenizer.encode(images)
    np.testing.assert_array_equal(loaded.encode(images), codes)
    np.testing.assert_array_equal(loaded.decode(codes), tokenizer.decode(codes))


@pytest.mark.parametrize("name", ["residual dac", "split"])
def test_audio_tokenizer_takes_it(name, tmp_path):
    """As for images, with several codebooks."""
    config = dataclasses.replace(AUDIO, quantizer=LEVELLED[name])
    codec = SpectralCodec(config, rngs=nnx.Rngs(0))
    sound = np.random.default_rng(0).normal(size=(4, 3200)).astype(np.float32) * 0.2
    total, metrics, gradients = first_step(
        AudioTokenizerTask(None, config), codec, {"audio": sound, "length": np.array([3200, 3200, 2000, 900])}
    )
    weights = {"mel": 1, "magnitude": 1, "complex": 0.1, "commitment": 1, "auxiliary": 1}
    terms = sum(weight * float(metrics[term][0]) for term, weight in weights.items())
    assert float(total) == pytest.approx(terms, rel=1e-5)
    check_gradients(gradients)
    tokenizer = AudioTokenizer(config, codec)
    tokenizer.save(tmp_path)
    loaded = omni_tokenizers.load(tmp_path)
    assert loaded.config == config and loaded.hash == tokenizer.hash and loaded.codebooks == 3
    assert [vectors.shape for vectors in loaded.code_vectors] == [(8, 4)] * 3
    codes = tokenizer.encode(sound[:, None])
    np.testing.assert_array_equal(loaded.encode(sound[:, None]), codes)
    np.testing.assert_array_equal(loaded.decode(codes), tokenizer.decode(codes))


def first_step(task, net, batch):
    """Loss, metrics and gradients by name of a training step."""
    graphdef, params, rest = nnx.split(net, nnx.Param, ...)
    params = jax.tree.map(lambda p: p + 0.1, params)  # a kernel of 0, as blocks begin with, hides what is before it

    @jax.jit
    def step(params):
        def loss(params):
            model = nnx.merge(graphdef, params, rest, copy=True)
            total, _, metrics = task.loss(model, batch, jax.random.key(0), training=True)
            return total, metrics

        return jax.value_and_grad(loss, has_aux=True)(params)

    (total, metrics), gradients = step(params)
    return total, metrics, {".".join(map(str, path)): value[...] for path, value in nnx.to_flat_state(gradients)}


def check_gradients(gradients):
    for name, gradient in gradients.items():
        assert np.isfinite(gradient).all(), name
        assert float(jnp.abs(gradient).max()) > 0, name
