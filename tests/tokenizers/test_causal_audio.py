"""The causal spectral codec at 24 kHz: what depends on what, whole ends, padding, learning, and its configuration."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import streaming_cases
from audio_cases import loss_of
from flax import nnx

import omni_tokenizers
from omni_tokenizers.audio import AudioTokenizer, AudioTokenizerConfig, SpectralCodec
from omni_tokenizers.base import config_to_dict

TWICE = AudioTokenizerConfig(
    sample_rate=24000,
    hop=240,
    window=480,
    mels=40,
    dim=24,
    encoder_blocks=1,
    decoder_blocks=1,
    codebook_size=32,
    loss_windows=(512,),
    loss_mels=(40,),
    causal=True,
)
"""50 Hz; a window of two hops."""
SIXFOLD = dataclasses.replace(TWICE, window=1440)
"""A window of six hops, which ends three frames of codes later."""


@pytest.fixture(scope="module")
def tokenizer() -> AudioTokenizer:
    """Random weights and codes, six hops under a window."""
    return streaming_cases.random_tokenizer(SIXFOLD)


def noise(batch: int, samples: int) -> np.ndarray:
    """Noise whose loudness changes all the time: [batch, samples] within [-1, 1]."""
    generator = np.random.default_rng(0)
    loudness = np.abs(np.sin(np.arange(samples) / 700 + np.arange(batch)[:, None]))
    return (np.clip(generator.normal(size=(batch, samples)) * 0.3, -1, 1) * loudness).astype(np.float32)


def test_frames_see_the_past_alone(tokenizer):
    """Latents of a frame change with its last sample and not with the next; sound lags behind codes by `delay`."""
    config, net = tokenizer.config, tokenizer.net
    step, mask = config.samples_per_frame, jnp.ones((1, 8))
    audio = noise(1, 8 * step)
    latents = jax.jit(net.latents)
    whole = latents(audio, mask)
    changed = latents(np.where(np.arange(8 * step) < 4 * step, audio, 0.5).astype(np.float32), mask)
    np.testing.assert_array_equal(whole[:, :4], changed[:, :4])
    assert not np.allclose(whole[:, 4], changed[:, 4])

    vectors = np.random.default_rng(1).normal(size=(1, 8, config.code_dim)).astype(np.float32)
    other = np.where(np.arange(8)[:, None] < 4, vectors, 1).astype(np.float32)
    sound, changed = (jax.jit(net.synthesize)(each, mask) for each in (vectors, other))
    end = 4 * step - config.delay
    np.testing.assert_array_equal(sound[:, :end], changed[:, :end])
    assert not np.allclose(sound[:, end : end + step], changed[:, end : end + step])


def test_a_clip_is_decoded_to_its_last_sample(tokenizer):
    """The end of a clip is as loud as its middle: no window fades it out, and no division by little blows it up."""
    codes = tokenizer.encode(noise(4, 48 * tokenizer.samples_per_frame)[:, None])
    sound = tokenizer.decode(codes)[:, 0]
    middle, end = np.abs(sound[:, 2000:-2000]).mean(), np.abs(sound[:, -tokenizer.config.hop :]).mean()
    assert middle / 5 < end < middle * 5


def test_padding_changes_nothing(tokenizer):
    """Clips of several lengths in one batch, garbage after their ends, encode and decode as each does alone."""
    audio, lengths = noise(4, 9600), np.array([9600, 9001, 480, 3])
    dirty = np.where(np.arange(9600) < lengths[:, None], audio, 0.7).astype(np.float32)
    together = tokenizer.encode(dirty[:, None], lengths)
    sound = tokenizer.decode(together)
    for index, length in enumerate(lengths):
        alone = tokenizer.encode(audio[index : index + 1, None, :length])
        np.testing.assert_array_equal(together.ids[index, :, : alone.shape[2]], alone.ids[0])
        np.testing.assert_allclose(sound[index, 0, :length], tokenizer.decode(alone)[0, 0], atol=1e-5)
        assert not sound[index, 0, length:].any()


def test_training_brings_reconstruction_nearer_and_reaches_every_parameter():
    """40 steps on four clips take a third off the mel distance, empty clips do no harm; every parameter moves."""
    codec = nnx.jit(lambda: SpectralCodec(TWICE, rngs=nnx.Rngs(0)))()
    graphdef, params, rest = nnx.split(codec, nnx.Param, ...)
    batch = {"audio": jnp.array(noise(4, 9600)), "length": jnp.array([9600, 9000, 481, 0])}
    optimizer = optax.adam(5e-3)

    def loss(params, rest, key):
        net = nnx.merge(graphdef, params, rest, copy=True)
        total, weight, metrics = loss_of(net, batch, key, training=True)
        return total / weight, (metrics["mel"][0] / weight, nnx.split(net, nnx.Param, ...)[2])

    @jax.jit
    def step(params, rest, moments, key):
        grads, (mel, rest) = jax.grad(loss, has_aux=True)(params, rest, key)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), rest, moments, mel

    start, moments, history = params, optimizer.init(params), []
    for index in range(40):
        params, rest, moments, mel = step(params, rest, moments, jax.random.key(index))
        history.append(float(mel))
    assert history[-1] < 2 / 3 * history[0]
    for (path, before), (_, after) in zip(nnx.to_flat_state(start), nnx.to_flat_state(params), strict=True):
        assert np.isfinite(after[...]).all() and not np.array_equal(before[...], after[...]), path


def test_configuration_says_causal_only_where_it_is(tokenizer, tmp_path):
    """Codecs made before there was a choice keep description and hash; a causal one is loaded as one."""
    assert "causal" not in config_to_dict(AudioTokenizerConfig())
    tokenizer.save(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["config"]["causal"] is True
    loaded = omni_tokenizers.load(tmp_path)
    audio = noise(1, 5000)[:, None]
    assert loaded.config == tokenizer.config
    np.testing.assert_array_equal(loaded.encode(audio).ids, tokenizer.encode(audio).ids)
