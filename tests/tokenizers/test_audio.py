"""The spectral codec: shapes and lengths, independence of padding, refusals, learning, saving."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import omni_tokenizers
from omni_tokenizers.audio import AudioTokenizer, AudioTokenizerConfig, SpectralCodec
from omni_tokenizers.codes import Codes
from omni_tokenizers.errors import OmniError, UsageError
from omni_tokenizers.quantizers import CodebookState
from omni_tokenizers.waveform import whole_frames

SMALL = AudioTokenizerConfig(
    dim=32, encoder_blocks=1, decoder_blocks=1, codebook_size=32, mels=40, loss_windows=(512, 1024), loss_mels=(40, 80)
)


def clips(count: int = 4, samples: int = 9600) -> np.ndarray:
    """Chirps of several pitches with noise: [count, samples] within [-1, 1]."""
    generator = np.random.default_rng(0)
    time = np.arange(samples) / 16000
    pitch = np.linspace(150, 900, count)[:, None]
    noise = generator.normal(size=(count, samples)) * 0.02
    return (0.5 * np.sin(2 * np.pi * pitch * time * (1 + time)) + noise).astype(np.float32)


def loss_of(codec, batch, key, *, training):
    """(total, weight, metrics) of a batch, as the trainer has them."""
    audio, mask = whole_frames(batch["audio"], batch["length"], codec.config.samples_per_frame)
    estimate, quantized = codec.autoencode(audio, batch["length"], key, training=training)
    return codec.config.losses(estimate, audio, mask, quantized, codec.config.sample_rate)


def make_step(codec: SpectralCodec, optimizer: optax.GradientTransformation):
    """A jitted step (params, rest, moments, batch, key) -> (params, rest, moments, metrics) and its starting values."""
    graphdef, params, rest = nnx.split(codec, nnx.Param, ...)

    def loss(params, rest, batch, key):
        net = nnx.merge(graphdef, params, rest, copy=True)
        total, weight, metrics = loss_of(net, batch, key, training=True)
        return total / weight, (metrics, nnx.split(net, nnx.Param, ...)[2])

    @jax.jit
    def step(params, rest, moments, batch, key):
        grads, (metrics, rest) = jax.grad(loss, has_aux=True)(params, rest, batch, key)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), rest, moments, metrics

    return step, (params, rest, optimizer.init(params)), graphdef


@pytest.fixture(scope="module")
def trained() -> tuple[AudioTokenizer, list[float]]:
    """A small tokenizer after 60 steps on four clips of several lengths, and its mel distances."""
    codec = SpectralCodec(SMALL, rngs=nnx.Rngs(0))
    step, state, graphdef = make_step(codec, optax.adam(5e-3))
    batch = {"audio": clips(), "length": np.array([9600, 9000, 6400, 3000], np.int32)}
    history = []
    for index in range(60):
        *state, metrics = step(*state, batch, jax.random.fold_in(jax.random.key(0), index))
        total, weight = metrics["mel"]
        history.append(float(total / weight))
    return AudioTokenizer(SMALL, nnx.merge(graphdef, *state[:2])), history


def test_training_brings_reconstruction_nearer(trained):
    """The loss reaches every part: the mel distance falls by more than half within 60 steps."""
    _, history = trained
    assert np.isfinite(history).all()
    assert history[-1] < 0.5 * history[0]


def test_shapes_and_rates(trained):
    """Codes are [batch, codebooks, frames], frames rounded up; decoding restores the length, mono, within [-1, 1]."""
    tokenizer, _ = trained
    codes = tokenizer.encode(clips(2, 7001)[:, None])
    assert tokenizer.samples_per_frame == 640
    assert codes.shape == (2, 2, 11)
    assert codes.ids.dtype == np.int32
    assert tokenizer.decode(codes).shape == (2, 1, 7001)
    whole = tokenizer.decode(np.asarray(codes))
    assert whole.shape == (2, 1, 11 * 640)
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(whole[..., :7001], tokenizer.decode(codes))
    assert np.abs(whole).max() <= 1


def test_default_is_at_most_60_tokens_a_second():
    """The contract with the language model, which has to model every one of them."""
    config = AudioTokenizerConfig()
    assert config.sample_rate / config.samples_per_frame * config.codebooks <= 60


def test_padding_in_a_batch_changes_nothing(trained):
    """Clips of several lengths in one batch, with garbage after their ends, encode and decode as each does alone."""
    tokenizer, _ = trained
    audio, lengths = clips(), np.array([9600, 9001, 640, 3])
    dirty = np.where(np.arange(9600) < lengths[:, None], audio, 0.7).astype(np.float32)
    together = tokenizer.encode(dirty[:, None], lengths)
    sound = tokenizer.decode(together)
    for index, length in enumerate(lengths):
        alone = tokenizer.encode(audio[index : index + 1, None, :length])
        frames = alone.shape[2]
        np.testing.assert_array_equal(together.ids[index, :, :frames], alone.ids[0])
        assert not together.ids[index, :, frames:].any()
        np.testing.assert_allclose(sound[index, 0, :length], tokenizer.decode(alone)[0, 0], atol=1e-5)
        assert not sound[index, 0, length:].any()


def test_masked_frames_are_as_if_absent(trained):
    """A clip that fills its frames has the same latents and sound as one with masked frames after it.

    On the network itself: a clip's frames are padded to a bucket, and which one depends on its neighbours.
    """
    net = trained[0].net
    audio = clips(2, 5 * 640)
    longer = np.pad(audio, ((0, 0), (0, 3 * 640)))
    alone, mask = jnp.ones((2, 5)), jnp.ones((2, 8)).at[:, 5:].set(0)
    latents, sound = jax.jit(net.latents), jax.jit(net.synthesize)
    np.testing.assert_allclose(latents(longer, mask)[:, :5], latents(audio, alone), atol=1e-4)
    vectors = np.random.default_rng(0).normal(size=(2, 8, SMALL.code_dim)).astype(np.float32)
    whole = sound(vectors, mask)
    np.testing.assert_allclose(whole[:, : 5 * 640], sound(vectors[:, :5], alone), atol=1e-4)
    assert not whole[:, 5 * 640 :].any()


def test_padding_stays_out_of_loss_and_statistics():
    """Garbage past the ends, and whole empty clips, change neither loss nor codebook."""

    @nnx.jit
    def train(codec, batch):
        total, weight, _ = loss_of(codec, batch, jax.random.key(0), training=True)
        return total, weight, jax.tree.leaves(nnx.state(codec, CodebookState))

    lengths = np.array([9600, 5000, 0, 0], np.int32)
    audio = clips()
    dirty = np.where(np.arange(9600) < lengths[:, None], audio, 0.9).astype(np.float32)
    results = []
    for sound, length in ((audio[:2], lengths[:2]), (dirty, lengths)):
        codec = SpectralCodec(SMALL, rngs=nnx.Rngs(0))
        batch = {"audio": jnp.array(sound), "length": jnp.array(length)}
        # A fixed codebook: the k-means start draws other latents from a batch of another shape.
        for level in codec.quantizer.levels:
            level.initialized[...] = jnp.ones((), bool)
            level.config = dataclasses.replace(level.config, restart_threshold=0.0)
        total, weight, statistics = train(codec, batch)
        results.append([total, weight, *statistics])
    for alone, padded in zip(*results, strict=True):
        np.testing.assert_allclose(alone, padded, rtol=1e-4, atol=1e-4)
    assert float(results[0][1]) == 2


def test_every_parameter_has_a_gradient():
    """No layer is cut off by the quantiser, a mask or a clamp."""
    codec = SpectralCodec(SMALL, rngs=nnx.Rngs(0))
    graphdef, params, rest = nnx.split(codec, nnx.Param, ...)
    batch = {"audio": jnp.array(clips()), "length": jnp.full(4, 9600)}

    def loss(params):
        net = nnx.merge(graphdef, params, rest, copy=True)
        return loss_of(net, batch, jax.random.key(0), training=True)[0]

    for path, gradient in nnx.to_flat_state(jax.jit(jax.grad(loss))(params)):
        value = np.asarray(gradient[...])
        assert np.isfinite(value).all(), path
        assert np.abs(value).max() > 0, path


def test_evaluation_leaves_the_codebook_alone():
    """A loss without training mutates nothing and needs no key."""
    codec = SpectralCodec(SMALL, rngs=nnx.Rngs(0))
    before = jax.tree.map(np.array, nnx.state(codec))
    batch = {"audio": jnp.array(clips()), "length": jnp.full(4, 9600)}
    nnx.jit(lambda codec: loss_of(codec, batch, None, training=False)[0])(codec)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, jax.tree.map(np.array, nnx.state(codec))))


def test_silence_and_channels(trained):
    """Silence gives finite sound; several channels encode as their mean."""
    tokenizer, _ = trained
    assert np.isfinite(tokenizer.decode(tokenizer.encode(np.zeros((1, 1, 5000), np.float32)))).all()
    stereo = np.stack([clips(1)[0] * 1.5, clips(1)[0] * 0.5])[None]
    assert np.array_equal(tokenizer.encode(stereo).ids, tokenizer.encode(clips(1)[None]).ids)


def test_silence_has_a_finite_loss():
    """A batch of nothing but silence, or of empty clips, does not poison training."""
    codec = SpectralCodec(SMALL, rngs=nnx.Rngs(0))
    graphdef, params, rest = nnx.split(codec, nnx.Param, ...)

    def loss(params, length):
        net = nnx.merge(graphdef, params, rest, copy=True)
        return loss_of(net, {"audio": jnp.zeros((2, 6400)), "length": length}, jax.random.key(0), training=True)[0]

    gradient = jax.jit(jax.grad(loss))
    for length in (6400, 0):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient(params, jnp.full(2, length))))


@pytest.mark.parametrize(
    ("audio", "lengths", "message"),
    [
        (np.zeros((1, 100), np.float32), None, "channels"),
        (np.zeros((1, 1, 100), np.int16), None, "floating"),
        (np.zeros((1, 1, 0), np.float32), None, "empty"),
        (np.full((1, 1, 100), np.nan, np.float32), None, "NaN"),
        (np.zeros((1, 1, 100), np.float32), [101], "100"),
        (np.zeros((1, 1, 100), np.float32), [0], "1 to 100"),
        (np.zeros((2, 1, 100), np.float32), [100], "2 integers"),
    ],
)
def test_bad_sound_is_refused(trained, audio, lengths, message):
    """Each says what is wrong instead of a traceback from inside."""
    with pytest.raises(OmniError, match=message):
        trained[0].encode(audio, lengths)


@pytest.mark.parametrize(
    "codes",
    [
        np.zeros((1, 3, 4), int),
        np.full((1, 2, 4), 32),
        np.zeros((1, 2, 0), int),
        np.zeros((2, 4), int),
        Codes(np.zeros((1, 2, 4), np.int32), np.array([2561])),
        Codes(np.zeros((1, 2, 4), np.int32), np.array([5, 5])),
    ],
)
def test_bad_codes_are_refused(trained, codes):
    """Codes of another tokenizer, or lengths that their frames do not hold, are errors."""
    with pytest.raises(OmniError):
        trained[0].decode(codes)


@pytest.mark.parametrize("fields", [{"window": 500}, {"window": 320}, {"loss_mels": (40,)}, {"downsample": 0}])
def test_contradicting_configuration_is_refused(fields):
    """A window that hops do not tile, or scales without bands, fails at once."""
    with pytest.raises(UsageError):
        AudioTokenizerConfig(**fields)


def test_saved_tokenizer_is_the_same(trained, tmp_path):
    """Loading gives the same hash, codes and sound."""
    tokenizer, _ = trained
    tokenizer.save(tmp_path)
    loaded = omni_tokenizers.load(tmp_path)
    codes = tokenizer.encode(clips()[:, None])
    assert loaded.hash == tokenizer.hash
    assert np.array_equal(loaded.encode(clips()[:, None]).ids, codes.ids)
    np.testing.assert_array_equal(loaded.decode(codes), tokenizer.decode(codes))
