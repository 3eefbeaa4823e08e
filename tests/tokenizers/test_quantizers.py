"""Vector quantisers: gradients, statistics, starts, restarts, residual levels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omni_tokenizers.errors import UsageError
from omni_tokenizers.quantizers import (
    CodebookState,
    EMAVectorQuantizer,
    ResidualQuantizer,
    VectorQuantizerConfig,
    draw,
    k_means,
)

CONFIG = VectorQuantizerConfig(codebook_size=8, dim=3)
KEY = jax.random.key(0)


def latents(*shape, seed=1):
    return jax.random.normal(jax.random.key(seed), (*shape, CONFIG.dim))


def started(config=CONFIG, seed=0):
    quantizer = EMAVectorQuantizer(config, rngs=nnx.Rngs(seed))
    quantizer.initialized[...] = jnp.array(True)
    return quantizer


@nnx.jit
def train(quantizer, z, key=KEY, weights=None):
    return quantizer(z, key, training=True, weights=weights)


@nnx.jit
def evaluate(quantizer, z, weights=None):
    return quantizer(z, training=False, weights=weights)


def values(module):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(module, CodebookState))]


def test_gradient_goes_straight_through():
    """The gradient is the upstream gradient unchanged, plus commitment's 2 c (z - e) / (n d)."""
    quantizer, z, upstream = started(), latents(5), latents(5, seed=2)

    def loss(z):
        result = quantizer(z, training=False)
        return (result.quantized * upstream).sum() + result.commitment

    result = evaluate(quantizer, z)
    np.testing.assert_array_equal(result.quantized, quantizer.lookup(result.codes))
    expected = upstream + CONFIG.commitment * 2 * (z - result.quantized) / z.size
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(z), expected, rtol=1e-5, atol=1e-6)


def test_codes_are_nearest():
    """Each code is the nearest by brute force, also for latents far from the origin."""
    quantizer, z = started(), 50 + latents(4, 6)
    quantizer.sum[...] = quantizer.sum[...] + 50
    codebook = np.asarray(quantizer.codebook(), np.float64)
    distances = np.square(np.asarray(z, np.float64)[..., None, :] - codebook).sum(-1)
    codes = np.asarray(quantizer(z, training=False).codes)
    assert codes.dtype == np.int32 and codes.shape == (4, 6)
    chosen = np.take_along_axis(distances, codes[..., None], -1)[..., 0]
    np.testing.assert_allclose(chosen, distances.min(-1), rtol=1e-2)


def test_moving_averages_follow_the_paper():
    """Three updates of N and m agree with a slow numpy version."""
    config = dataclasses.replace(CONFIG, decay=0.9, restart_threshold=0.0)
    quantizer = started(config)
    count, total = np.asarray(quantizer.count[...], np.float64), np.asarray(quantizer.sum[...], np.float64)
    for step in range(3):
        z = np.asarray(latents(4, 5, seed=step), np.float64).reshape(-1, 3)
        codebook = total / count[:, None]
        batch_count, batch_total = np.zeros_like(count), np.zeros_like(total)
        for row in z:
            code = np.square(row - codebook).sum(-1).argmin()
            batch_count[code] += 1
            batch_total[code] += row
        count, total = 0.9 * count + 0.1 * batch_count, 0.9 * total + 0.1 * batch_total
        train(quantizer, jnp.asarray(z, jnp.float32).reshape(4, 5, 3))
    np.testing.assert_allclose(quantizer.count[...], count, rtol=1e-5)
    np.testing.assert_allclose(quantizer.sum[...], total, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(quantizer.codebook(), total / count[:, None], rtol=1e-3, atol=1e-5)


def test_first_training_call_starts_by_k_means():
    """Eight tight clusters are found by the first call, and only that call starts anew."""
    centers = 10 * jax.random.normal(jax.random.key(5), (8, 3))
    z = jnp.repeat(centers, 20, 0) + 0.01 * latents(160)
    quantizer = EMAVectorQuantizer(CONFIG, rngs=nnx.Rngs(0))
    result = train(quantizer, z)
    assert len(set(np.asarray(result.codes).tolist())) == 8
    assert float(jnp.square(result.quantized - z).mean()) < 1e-3
    assert float(result.perplexity) == pytest.approx(8, rel=1e-4) and float(result.usage) == 1
    before = np.asarray(quantizer.codebook())
    train(quantizer, z + 5)
    assert np.abs(np.asarray(quantizer.codebook()) - before).max() < 5


def test_k_means_lowers_the_error():
    """More iterations leave a smaller squared error than the random start."""
    z, ones = latents(400), jnp.ones(400)

    def error(iterations):
        count, total = k_means(z, ones, 8, iterations, KEY)
        assert float(count.sum()) == 400
        centers = total / jnp.maximum(count, 1)[:, None]
        return float(jnp.square(z[:, None] - centers).sum(-1).min(-1).mean())

    assert error(10) < 0.97 * error(0)


def test_dead_codes_restart_and_stay():
    """A code that nothing chose becomes a latent of the batch in both statistics, and the next update keeps it."""
    quantizer = started()
    quantizer.sum[...] = quantizer.sum[...].at[3].set(1e6)
    quantizer.count[...] = quantizer.count[...].at[3].set(1e-3)
    z = latents(64)
    train(quantizer, z)
    code = np.asarray(quantizer.codebook()[3])
    assert np.abs(np.asarray(z) - code).max(-1).min() < 1e-3
    assert float(quantizer.count[...][3]) == pytest.approx(float(quantizer.count[...].mean()), rel=0.2)
    train(quantizer, z)
    assert np.abs(np.asarray(quantizer.codebook()[3])).max() < 10


def test_masked_latents_do_not_count():
    """Padding changes neither statistics, start, restarts nor loss, whatever it holds."""
    z, config = latents(40), dataclasses.replace(CONFIG, codebook_size=16)
    weights = jnp.concatenate([jnp.ones(40), jnp.zeros(24)])
    outcomes = []
    for padding in (0.0, 1e4):
        quantizer = EMAVectorQuantizer(config, rngs=nnx.Rngs(0))
        padded = jnp.concatenate([z, jnp.full((24, 3), padding)])
        for step in range(3):
            quantizer.count[...] = quantizer.count[...].at[:4].set(1e-3)  # dead from the second step on
            result = train(quantizer, padded, jax.random.fold_in(KEY, step), weights)
        outcomes.append([*values(quantizer), result.commitment, result.perplexity, result.usage, result.codes[:40]])
    for first, second in zip(*outcomes, strict=True):
        np.testing.assert_array_equal(first, second)
    assert np.abs(outcomes[0][-1]).max() < 16


def test_masked_loss_equals_the_loss_of_the_rest():
    """Commitment and perplexity of a masked batch are those of the latents that count."""
    quantizer, z = started(), latents(12)
    alone = evaluate(quantizer, z[:7])
    masked = evaluate(quantizer, z, (jnp.arange(12) < 7).astype(float))
    for name in ("commitment", "perplexity", "usage"):
        assert float(getattr(masked, name)) == pytest.approx(float(getattr(alone, name)), rel=1e-5)


def test_a_wholly_masked_batch_changes_nothing():
    """Without a single latent that counts, statistics stay as they are and the start waits."""
    quantizer = EMAVectorQuantizer(CONFIG, rngs=nnx.Rngs(0))
    before = values(quantizer)
    result = train(quantizer, latents(6), KEY, jnp.zeros(6))
    for first, second in zip(before, values(quantizer), strict=True):
        np.testing.assert_array_equal(first, second)
    assert float(result.commitment) == 0


def test_evaluation_mutates_nothing():
    """training=False leaves every statistic alone and needs no key."""
    quantizer = ResidualQuantizer(2, CONFIG, rngs=nnx.Rngs(0))
    before = values(quantizer)
    quantizer(latents(6), training=False)
    for first, second in zip(before, values(quantizer), strict=True):
        np.testing.assert_array_equal(first, second)


def test_residual_levels_lower_the_error():
    """Every further level brings the sum of codes nearer; lookup of the codes gives the quantised value."""
    z = latents(16, 16)
    quantizer = ResidualQuantizer(3, CONFIG, rngs=nnx.Rngs(0))
    train(quantizer, z)
    result = evaluate(quantizer, z)
    assert result.codes.shape == (16, 16, 3)
    np.testing.assert_allclose(quantizer.lookup(result.codes), result.quantized, atol=1e-6)
    errors = [float(jnp.square(quantizer.lookup(result.codes[..., :n]) - z).mean()) for n in (1, 2, 3)]
    assert errors[1] < 0.7 * errors[0] and errors[2] < 0.7 * errors[1]


def test_residual_gradient_passes_once_and_commitment_reaches_every_level():
    """Straight-through counts once, however many levels; each level's commitment has a gradient."""
    z = latents(9)
    quantizer = ResidualQuantizer(3, CONFIG, rngs=nnx.Rngs(0))
    train(quantizer, latents(200, seed=3))
    np.testing.assert_allclose(
        jax.jit(jax.grad(lambda z: quantizer(z, training=False).quantized.sum()))(z), jnp.ones_like(z), rtol=1e-6
    )
    result, expected, residual = evaluate(quantizer, z), 0, z
    for index, level in enumerate(quantizer.levels):
        residual = residual - level.lookup(result.codes[..., index])
        expected = expected + CONFIG.commitment * 2 * residual / z.size / 3
    gradient = jax.jit(jax.grad(lambda z: quantizer(z, training=False).commitment))(z)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)


def test_functional_training_under_jit_is_deterministic():
    """Split, jitted steps that return the statistics, merge: twice the same bits, and the error falls."""

    def run():
        graphdef, params, rest = nnx.split(ResidualQuantizer(2, CONFIG, rngs=nnx.Rngs(0)), nnx.Param, ...)

        @jax.jit
        def step(params, rest, z, key):
            def loss(params):
                net = nnx.merge(graphdef, params, rest, copy=True)
                result = net(z, key, training=True)
                error = jnp.square(result.quantized - z).mean()
                return result.commitment, (error, nnx.state(net, nnx.Not(nnx.Param)))

            (_, (error, rest)), _ = jax.value_and_grad(loss, has_aux=True)(params)
            return error, rest

        errors = []
        for index in range(20):
            key = jax.random.fold_in(KEY, index)
            error, rest = step(params, rest, 3 * jax.random.normal(key, (64, 3)), key)
            errors.append(float(error))
        return errors, [np.asarray(leaf) for leaf in jax.tree.leaves(rest)]

    (errors, first), (again, second) = run(), run()
    assert errors == again and max(errors) < 4
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def test_draw_takes_no_masked_index_and_repeats_only_when_it_must():
    """Indices have mass, are distinct among equals, and follow the key."""
    mass = jnp.array([0.0, 1, 1, 0, 1, 1, 1, 1, 0, 0])
    for seed in range(50):
        indices = np.asarray(draw(mass, 6, jax.random.key(seed)))
        assert sorted(indices.tolist()) == [1, 2, 4, 5, 6, 7]
    assert set(np.asarray(draw(mass, 40, KEY)).tolist()) == {1, 2, 4, 5, 6, 7}
    heavy = jnp.ones(1000)
    assert (np.asarray(draw(heavy, 8, KEY)) != np.asarray(draw(heavy, 8, jax.random.key(1)))).any()


@pytest.mark.parametrize("change", [{"codebook_size": 1}, {"dim": 0}, {"decay": 1.0}])
def test_impossible_settings_are_refused(change):
    """A codebook that cannot work is a usage error, not a crash later."""
    with pytest.raises(UsageError):
        dataclasses.replace(CONFIG, **change)
