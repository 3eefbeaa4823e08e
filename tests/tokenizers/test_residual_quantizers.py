"""Levels of any vector quantiser, quantiser dropout, and the split of semantic and acoustic levels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quantizer_cases import DAC, EMA, IBQ, LEARNED, LLAMAGEN, SIMVQ, evaluate, gradients, latents, made, parameters

from omni_tokenizers.errors import UsageError
from omni_tokenizers.quantizers import (
    CodebookState,
    EMAVectorQuantizer,
    ResidualQuantizer,
    ResidualQuantizerConfig,
    SplitQuantizerConfig,
)

KEY = jax.random.key(0)
Z, UPSTREAM = latents(2, 8), latents(2, 8, seed=2)


@nnx.jit
def train(quantizer, z, key=KEY, weights=None):
    return quantizer(z, key, training=True, weights=weights)


def statistics(module):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(module, CodebookState))]


def test_levels_draw_from_their_own_keys():
    """Without dropout a level trains as it would alone: on the residual, with its number folded into the key."""
    quantizer = ResidualQuantizer(2, EMA, rngs=nnx.Rngs(0))
    rngs, residual = nnx.Rngs(0), latents(40)
    alone = [EMAVectorQuantizer(EMA, rngs=rngs) for _ in range(2)]
    result = train(quantizer, residual)
    for index, level in enumerate(alone):
        expected = train(level, residual, jax.random.fold_in(KEY, index))
        np.testing.assert_array_equal(result.codes[:, index], expected.codes)
        for first, second in zip(statistics(level), statistics(quantizer.levels[index]), strict=True):
            np.testing.assert_allclose(first, second, rtol=1e-6)
        residual = residual - expected.quantized


@pytest.mark.parametrize("level", [EMA, LEARNED, SIMVQ], ids=["ema", "learned", "simvq"])
def test_gradient_goes_around_plain_levels_once(level):
    """Straight-through counts once, however many levels, and each level's commitment reaches z past those before it."""
    quantizer = made(ResidualQuantizerConfig(3, level))
    result, residual, expected = evaluate(quantizer, Z), Z, UPSTREAM
    for index, each in enumerate(quantizer.levels):
        residual = residual - each.lookup(result.codes[..., index])
        expected = expected + level.commitment * 2 * residual / Z.size / 3
    np.testing.assert_allclose(gradients(quantizer, Z, UPSTREAM)[0], expected, rtol=1e-4, atol=1e-6)


def test_rotation_turns_the_latent_to_the_sum_of_levels():
    """With the rotation trick the gradient's length changes by |q| / |z|, q being the sum."""
    quantizer = made(ResidualQuantizerConfig(3, dataclasses.replace(EMA, gradient="rotation", commitment=0.0)))
    result = evaluate(quantizer, Z)
    gradient = gradients(quantizer, Z, UPSTREAM)[0]
    lengths = [np.linalg.norm(x, axis=-1) for x in (gradient, UPSTREAM, result.quantized, Z)]
    np.testing.assert_allclose(lengths[0] / lengths[1], lengths[2] / lengths[3], rtol=1e-4)


@pytest.mark.parametrize("level", [DAC, IBQ], ids=["dac", "ibq"])
def test_gradient_goes_through_levels_that_learn_from_it(level):
    """Gradients by z and all parameters are those of a chain of single quantisers, as DAC's: r <- r - level(r)."""
    quantizer = made(ResidualQuantizerConfig(3, level))
    graphdef, params, rest = nnx.split(quantizer, nnx.Param, ...)

    def chain(params, z):
        net = nnx.merge(graphdef, params, rest, copy=True)
        residual, loss, total = z, 0, 0
        for each in net.levels:
            result = each(residual, training=False)
            residual, total = residual - result.quantized, total + result.quantized
            loss = loss + (result.commitment + result.auxiliary) / 3
        return (total * UPSTREAM).sum() + loss

    expected, expected_z = jax.jit(jax.grad(chain, (0, 1)))(params, Z)
    by_z, by_params = gradients(quantizer, Z, UPSTREAM)
    np.testing.assert_allclose(by_z, expected_z, rtol=1e-4, atol=1e-6)
    expected = {".".join(map(str, path)): value[...] for path, value in nnx.to_flat_state(expected)}
    for name, gradient in by_params.items():
        assert np.abs(gradient).max() > 0
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_dropout_leaves_out_later_levels():
    """A dropped row is the sum of its first levels, 1 to all alike; about the configured share is dropped."""
    z = latents(4000, 2)
    quantizer = made(ResidualQuantizerConfig(3, LEARNED, dropout=0.6))
    result = train(quantizer, z)
    sums = [np.asarray(quantizer.lookup(result.codes[..., :number])) for number in (1, 2, 3)]
    fits = np.stack([np.abs(each - result.quantized).max((1, 2)) < 1e-6 for each in sums])
    assert (fits.sum(0) == 1).all()  # a whole row has one number of levels
    np.testing.assert_allclose(fits.mean(1), [0.2, 0.2, 0.6], atol=0.025)
    whole = evaluate(quantizer, z)
    np.testing.assert_array_equal(whole.codes, result.codes)
    np.testing.assert_allclose(whole.quantized, sums[2], atol=1e-6)
    other = train(quantizer, z, jax.random.key(1))
    assert (np.asarray(other.quantized) != np.asarray(result.quantized)).any()


def test_dropped_levels_count_in_no_statistic_or_loss():
    """Each level trains as if the rows that go without it were masked; masks of the caller hold besides."""
    quantizer, z = made(ResidualQuantizerConfig(3, EMA, dropout=0.7)), latents(12, 5)
    weights = np.array([1.0, 1, 1, 1, 0]) * np.ones((12, 1))
    books = [np.asarray(book) for book in quantizer.codebooks()]
    alone = [EMAVectorQuantizer(EMA, rngs=nnx.Rngs(0)) for _ in range(3)]
    for level, held in zip(alone, quantizer.levels, strict=True):
        nnx.update(level, nnx.state(held))
    result = train(quantizer, z, KEY, weights)
    sums = np.cumsum([book[result.codes[..., index]] for index, book in enumerate(books)], 0)
    number = np.abs(sums - result.quantized).max((2, 3)).argmin(0) + 1
    assert set(number) == {1, 2, 3}
    losses, residual = [], z
    for index, level in enumerate(alone):
        present = weights * (index < number)[:, None]
        expected = train(level, residual, jax.random.fold_in(KEY, index), present)
        for first, second in zip(statistics(level), statistics(quantizer.levels[index]), strict=True):
            np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-5)
        losses.append(float(expected.commitment))
        residual = residual - expected.quantized
    assert float(result.commitment) == pytest.approx(np.mean(losses), rel=1e-4)


def test_split_sums_two_branches_of_one_latent():
    """Value and gradients are those of both branches written out; no semantic code is in the acoustic residual."""
    level = dataclasses.replace(LEARNED, dim=3)
    quantizer = made(SplitQuantizerConfig(dim=4, semantic_levels=1, acoustic_levels=2, level=level))
    params = parameters(quantizer)

    def branch(params, z, name, levels):
        inner = z @ params[f"{name}.project_in.kernel"]
        residual, loss, fixed = inner, 0, jax.lax.stop_gradient
        for index in range(levels):
            codebook = params[f"{name}.residual.levels.{index}.vectors"]
            codes = jnp.square(residual[..., None, :] - codebook).sum(-1).argmin(-1)
            chosen = codebook[codes]
            loss += level.commitment * jnp.square(residual - fixed(chosen)).mean()
            loss += level.codebook_weight * jnp.square(fixed(residual) - chosen).mean()
            residual = residual - fixed(chosen)
        quantized = inner + fixed(inner - residual - inner)
        return quantized @ params[f"{name}.project_out.kernel"], loss

    def slow(params, z):
        semantic, loss = branch(params, z, "semantic", 1)
        acoustic, more = branch(params, z, "acoustic", 2)
        return semantic + acoustic, (loss + more) / 3

    result = evaluate(quantizer, Z)
    value, loss = slow(params, Z)
    np.testing.assert_allclose(result.quantized, value, rtol=1e-4, atol=1e-5)
    assert float(result.commitment + result.auxiliary) == pytest.approx(float(loss), rel=1e-5)

    def total(params, z):
        value, loss = slow(params, z)
        return (value * UPSTREAM).sum() + loss

    expected, expected_z = jax.jit(jax.grad(total, (0, 1)))(params, Z)
    by_z, by_params = gradients(quantizer, Z, UPSTREAM)
    np.testing.assert_allclose(by_z, expected_z, rtol=1e-4, atol=1e-5)
    for name, gradient in by_params.items():
        assert np.abs(gradient).max() > 0
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-4, atol=1e-5)


def test_split_drops_acoustic_levels_only():
    """With dropout the semantic code and at least one acoustic one stand for every row."""
    quantizer = made(SplitQuantizerConfig(dim=4, semantic_levels=2, acoustic_levels=3, level=LEARNED, dropout=1.0))
    result = train(quantizer, latents(300, 2))
    sums = [np.asarray(quantizer.lookup(result.codes[..., :number])) for number in (3, 4, 5)]
    fits = np.stack([np.abs(each - result.quantized).max((1, 2)) < 1e-5 for each in sums])
    assert (fits.sum(0) == 1).all()
    np.testing.assert_allclose(fits.mean(1), 1 / 3, atol=0.1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"levels": 0}, "at least one level, got 0"),
        ({"levels": 65}, "at most 64 levels"),
        ({"dropout": 1.5}, "share of rows, 0 to 1, got 1.5"),
        ({"level": LLAMAGEN}, 'normalize "search" or "never"'),
    ],
)
def test_impossible_levels_are_refused(settings, said):
    """Levels that cannot be are a usage error, in a split too."""
    with pytest.raises(UsageError, match=said):
        ResidualQuantizerConfig(**settings)
    split = {"acoustic_levels" if name == "levels" else name: value for name, value in settings.items()}
    with pytest.raises(UsageError, match=said):
        SplitQuantizerConfig(**split)


def test_a_split_needs_a_latent():
    """A width of 0 is a usage error."""
    with pytest.raises(UsageError, match="width 1"):
        SplitQuantizerConfig(dim=0)
