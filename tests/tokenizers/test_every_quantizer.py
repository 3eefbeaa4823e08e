"""What holds for every quantiser: codes stand for vectors, masks, extremes, evaluation, precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quantizer_cases import LEVELLED, SINGLE, evaluate, gradients, latents, made

ALL = SINGLE | LEVELLED


@pytest.mark.parametrize("name", ALL)
def test_codes_stand_for_the_quantised_vectors(name):
    """Codes are int32 within their codebooks; lookup, and the codebooks' own rows, give back what was quantised.

    Evaluation needs no key and changes no variable.
    """
    config, quantizer = ALL[name], made(ALL[name])
    before = jax.tree.leaves(nnx.state(quantizer))
    result = evaluate(quantizer, latents(2, 8))
    codes = np.asarray(result.codes)
    if name in SINGLE:
        assert codes.shape == (2, 8) and codes.max() < config.codebook_size
        rows = quantizer.codebook()
        assert rows.shape == (config.codebook_size, 4)
        summed = rows[codes]
    else:
        assert codes.shape == (2, 8, 3) and (codes < config.codebook_sizes).all()
        parts = [book[codes[..., level]] for level, book in enumerate(quantizer.codebooks())]
        summed = sum(parts)
        for number in (1, 2):
            np.testing.assert_allclose(quantizer.lookup(codes[..., :number]), sum(parts[:number]), atol=1e-6)
    assert codes.dtype == np.int32 and codes.min() >= 0 and len(np.unique(codes)) > 2
    np.testing.assert_allclose(quantizer.lookup(result.codes), result.quantized, atol=1e-6)
    np.testing.assert_allclose(summed, result.quantized, atol=1e-6)
    for first, second in zip(before, jax.tree.leaves(nnx.state(quantizer)), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("name", SINGLE)
def test_perplexity_and_usage_count_the_codes(name):
    """They are those of the batch's codes, counted one by one."""
    result = evaluate(made(SINGLE[name]), latents(2, 8))
    share = np.unique(result.codes, return_counts=True)[1] / 16
    assert float(result.perplexity) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-5)
    assert float(result.usage) == pytest.approx(len(share) / SINGLE[name].codebook_size)


@pytest.mark.parametrize("name", ALL)
def test_masked_latents_do_not_count(name):
    """Whatever padding holds: losses, figures and all gradients are those of the latents that count.

    A row twice has the means of the row once, and shares its gradient among the two.
    """
    quantizer, row, upstream = made(ALL[name]), latents(1, 8), latents(1, 8, seed=2)
    twice, padded = jnp.concatenate([row, row]), jnp.concatenate([row, jnp.full((1, 8, 4), 30.0)])
    upstream = jnp.concatenate([upstream, jnp.zeros_like(row)])
    weights = jnp.array([[1.0], [0.0]]) * jnp.ones(8)
    expected, masked = evaluate(quantizer, twice), evaluate(quantizer, padded, weights)
    for figure in ("commitment", "auxiliary", "perplexity", "usage"):
        np.testing.assert_allclose(getattr(masked, figure), getattr(expected, figure), rtol=1e-5, atol=1e-7)
    by_z, by_params = gradients(quantizer, twice, upstream)
    masked_by_z, masked_by_params = gradients(quantizer, padded, upstream, weights)
    np.testing.assert_allclose(masked_by_z[0], by_z.sum(0), rtol=1e-4, atol=1e-6)
    assert not masked_by_z[1].any()
    for parameter, gradient in by_params.items():
        np.testing.assert_allclose(masked_by_params[parameter], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_extremes_have_finite_gradients(name):
    """Latents of 0 or far out give no NaN, and a batch that is wholly masked no loss and no gradient."""
    quantizer = made(ALL[name])
    z = latents(2, 8).at[0, 0].set(0).at[0, 1].set(1e3).at[0, 2].set(jnp.array([0.0, 1, 2, 3]))
    by_z, by_params = gradients(quantizer, z, jnp.ones_like(z))
    assert np.isfinite(by_z).all() and all(np.isfinite(gradient).all() for gradient in by_params.values())
    nothing = evaluate(quantizer, z, jnp.zeros((2, 8)))
    assert float(nothing.commitment) == float(nothing.auxiliary) == 0
    by_z, by_params = gradients(quantizer, z, jnp.zeros_like(z), jnp.zeros((2, 8)))
    assert not by_z.any() and not any(gradient.any() for gradient in by_params.values())


@pytest.mark.parametrize("name", ALL)
def test_bfloat16_latents_are_quantised_in_float32(name):
    """Codes and losses are those of the same numbers in float32, and the vectors come back in bfloat16."""
    quantizer, narrow = made(ALL[name]), latents(2, 8).astype(jnp.bfloat16)
    result, wide = evaluate(quantizer, narrow), evaluate(quantizer, narrow.astype(jnp.float32))
    assert result.quantized.dtype == jnp.bfloat16 and result.commitment.dtype == jnp.float32
    for figure in ("codes", "commitment", "auxiliary"):
        np.testing.assert_allclose(getattr(result, figure), getattr(wide, figure), rtol=1e-6)
    np.testing.assert_array_equal(result.quantized, wide.quantized.astype(jnp.bfloat16))
