"""Discriminators: shapes, what they see, and that they learn to tell."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from omni_tokenizers.discriminators import PatchDiscriminatorConfig, STFTDiscriminatorConfig, WeightNormConv2d
from omni_tokenizers.errors import UsageError
from omni_tokenizers.losses.adversarial import hinge

PATCH = PatchDiscriminatorConfig(channels=32, layers=2)
STFT = STFTDiscriminatorConfig(windows=(64, 32), channels=4, dilations=(1, 2))


def test_patch_discriminator_sees_patches():
    """A logit of VQGAN's three halvings depends on 70 x 70 pixels and on no other picture of the batch."""
    net = PatchDiscriminatorConfig(channels=32).make(rngs=nnx.Rngs(0))
    assert [layer.kernel.shape[2:] for layer in net.layers] == [(3, 32), (32, 64), (64, 128), (128, 256)]
    net.norms = nnx.List([lambda x: x] * 3)  # which see a whole picture
    image = np.random.default_rng(0).normal(size=(2, 128, 128, 3)).astype(np.float32)
    (logits,), features = net(image)
    assert logits.shape == (2, 14, 14) and [x.shape[1] for x in features] == [64, 32, 16, 15]
    seen = np.abs(jax.grad(lambda x: net(x)[0][0][0, 7, 7])(jnp.array(image))).sum(-1)
    rows, columns = np.nonzero(seen[0])
    assert np.ptp(rows) == np.ptp(columns) == 69 and not seen[1].any()


def test_pictures_of_a_batch_are_apart():
    """With its norms too, what a discriminator says of an example does not depend on the batch."""
    image = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype(np.float32)
    audio = np.random.default_rng(0).normal(size=(3, 256)).astype(np.float32)
    for config, batch in ((PATCH, image), (STFT, audio)):
        verdict = jax.jit(config.make(rngs=nnx.Rngs(0)).__call__)
        for whole, alone in zip(jax.tree.leaves(verdict(batch)), jax.tree.leaves(verdict(batch[1:2])), strict=True):
            np.testing.assert_allclose(whole[1:2], alone, atol=1e-5)


def test_weight_norm_is_of_outputs():
    """At first the kernel is the direction itself; scaling a direction changes nothing, its length scales an output."""
    net = WeightNormConv2d(2, 3, (3, 9), rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(1, 5, 12, 2)).astype(np.float32)
    plain = jax.lax.conv_general_dilated(
        x, net.direction[...], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    before = net(x)
    np.testing.assert_allclose(before, plain, atol=1e-5)
    net.direction[...] = net.direction[...] * jnp.array([1.0, 5.0, 0.1])
    np.testing.assert_allclose(net(x), before, atol=1e-5)
    net.length[...] = net.length[...] * jnp.array([1.0, 2.0, 1.0])
    np.testing.assert_allclose(net(x), before * jnp.array([1.0, 2.0, 1.0]), atol=1e-5)


def textures(random, real):
    """Noise against noise in blocks of 2 x 2, of the same brightness and contrast."""
    noise = random.normal(size=(8, 16, 16, 3))
    return (noise if real else noise[:, ::2, ::2].repeat(2, 1).repeat(2, 2)).astype(np.float32)


def tones(random, real):
    """Decaying against growing notes, with equal mean spectra."""
    time = np.arange(256) / 256
    tone = np.sin(2 * np.pi * (random.uniform(10, 40, (8, 1)) * time + random.uniform(size=(8, 1))))
    return (tone * np.exp(-4 * (time if real else 1 - time))).astype(np.float32)


@pytest.mark.parametrize(
    ("config", "examples", "rate"), [(PATCH, textures, 1e-3), (STFT, tones, 1e-2)], ids=["patch", "stft"]
)
def test_it_learns_to_tell(config, examples, rate):
    """A few steps of the hinge loss, which is 1 for a guess, tell examples that were not seen yet."""
    graphdef, params = nnx.split(config.make(rngs=nnx.Rngs(0)))
    optimizer = optax.adam(rate, 0.5, 0.9)

    def loss(params, real, fake):
        net = nnx.merge(graphdef, params)
        return hinge(net(real)[0], net(fake)[0]).mean()

    # Optimised, as for users: its convolutions run twenty times as long without.
    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
    def step(params, moments, real, fake):
        value, gradient = jax.value_and_grad(loss)(params, real, fake)
        updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments, value

    random, moments = np.random.default_rng(0), optimizer.init(params)
    losses = []
    for _ in range(60):
        params, moments, value = step(params, moments, examples(random, True), examples(random, False))
        losses.append(float(value))
    assert losses[0] > 0.8 and np.mean(losses[-10:]) < 0.4


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (PatchDiscriminatorConfig, {"channels": 48}),
        (PatchDiscriminatorConfig, {"layers": 0}),
        (STFTDiscriminatorConfig, {"windows": (30,)}),
        (STFTDiscriminatorConfig, {"windows": ()}),
        (STFTDiscriminatorConfig, {"dilations": (0,)}),
    ],
)
def test_impossible_discriminators(config, fields):
    """Settings of which no net can be made are usage errors."""
    with pytest.raises(UsageError):
        config(**fields)


@pytest.mark.parametrize(
    ("config", "smallest", "smaller"),
    [
        (PATCH, (1, 12, 12, 3), (1, 16, 11, 3)),
        (PatchDiscriminatorConfig(channels=32, layers=1), (1, 6, 6, 3), (1, 5, 8, 3)),
        (STFT, (1, 64), (1, 63)),
    ],
)
def test_examples_too_small_to_judge(config, smallest, smaller):
    """The smallest examples have a logit of every part; smaller ones are usage errors that say what is needed."""
    net = config.make(rngs=nnx.Rngs(0))
    assert all(logits.size for logits in jax.eval_shape(net, jnp.zeros(smallest))[0])
    with pytest.raises(UsageError, match=f"needs .*{smallest[1] if len(smallest) > 2 else 'as long, got 63'}"):
        jax.eval_shape(net, jnp.zeros(smaller))
