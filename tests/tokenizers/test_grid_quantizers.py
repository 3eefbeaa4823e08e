"""Quantisers without a learned codebook: finite scalars (FSQ) and bits (LFQ)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantizer_cases import evaluate, gradients, latents, made

from omni_tokenizers.errors import UsageError
from omni_tokenizers.quantizers import FSQConfig, LFQConfig

LEVELS = np.array([2, 3, 5, 8])
FSQ = FSQConfig(levels=tuple(LEVELS.tolist()))
Z, UPSTREAM = 2 * latents(2, 8), latents(2, 8, seed=2)


def bounded(z):
    """FSQ's bound in float64: integers from -floor(L / 2) on are the levels."""
    reach, offset = (LEVELS - 1) * 1.001 / 2, np.where(LEVELS % 2 == 0, 0.5, 0)
    return np.tanh(np.asarray(z, np.float64) + np.arctanh(offset / reach)) * reach - offset


def test_fsq_rounds_to_the_grid():
    """Codes are the nearest points of the grid by brute force, each dimension counted in steps of its own."""
    quantizer = made(FSQ)
    result = evaluate(quantizer, Z)
    grid = np.asarray(quantizer.codebook(), np.float64)
    assert len(np.unique(grid, axis=0)) == FSQ.codebook_size == 240 and np.abs(grid).max() == 1
    distances = np.square(bounded(Z)[..., None, :] - grid * (LEVELS // 2)).sum(-1)
    np.testing.assert_array_equal(result.codes, distances.argmin(-1))
    np.testing.assert_array_equal(result.quantized, quantizer.lookup(result.codes))
    assert float(result.commitment) == float(result.auxiliary) == 0


def test_fsq_reaches_every_code():
    """Latents that are squeezed onto a point of the grid get its code, for all of them; a latent of 0 gives 0."""
    quantizer = made(FSQ)
    reach, offset = (LEVELS - 1) * 1.001 / 2, np.where(LEVELS % 2 == 0, 0.5, 0)
    steps = np.asarray(quantizer.codebook()) * (LEVELS // 2)
    z = np.arctanh((steps + offset) / reach) - np.arctanh(offset / reach)
    np.testing.assert_array_equal(evaluate(quantizer, jnp.asarray(z, jnp.float32)).codes, np.arange(240))
    assert not evaluate(quantizer, jnp.zeros((1, 4))).quantized.any()
    far = evaluate(quantizer, jnp.array([[-1e4] * 4, [1e4] * 4])).codes
    np.testing.assert_array_equal(far, [0, 239])


def test_fsq_gradient_is_that_of_the_bound():
    """Rounding passes the gradient: reach sech^2(z + shift) / floor(L / 2) times upstream."""
    reach, offset = (LEVELS - 1) * 1.001 / 2, np.where(LEVELS % 2 == 0, 0.5, 0)
    slope = 1 - np.square(np.tanh(np.asarray(Z, np.float64) + np.arctanh(offset / reach)))
    expected = reach * slope / (LEVELS // 2) * UPSTREAM
    np.testing.assert_allclose(gradients(made(FSQ), Z, UPSTREAM)[0], expected, rtol=1e-4, atol=1e-6)


def test_lfq_takes_signs():
    """The code of the nearest vector of signs by brute force; its bit i is the sign of dimension i."""
    quantizer = made(LFQConfig(bits=4))
    result = evaluate(quantizer, Z)
    codebook = np.asarray(quantizer.codebook())
    assert len(np.unique(codebook, axis=0)) == 16 and (np.abs(codebook) == 1).all()
    distances = np.square(np.asarray(Z)[..., None, :] - codebook).sum(-1)
    np.testing.assert_array_equal(result.codes, distances.argmin(-1))
    np.testing.assert_array_equal(result.codes, (np.asarray(Z) > 0) @ [1, 2, 4, 8])
    np.testing.assert_array_equal(result.quantized, quantizer.lookup(result.codes))


@pytest.mark.parametrize("temperature", [1.0, 0.01])
@pytest.mark.parametrize("bits", [1, 4, 5])
def test_lfq_losses_are_those_over_all_codes(bits, temperature):
    """Both entropies, commitment and the gradient equal those of the softmax over all 2^bits codes, for each latent."""
    config = LFQConfig(bits=bits, temperature=temperature, entropy_weight=0.2, commitment=0.3)
    z, upstream = 0.3 * latents(2, 8, dim=bits), latents(2, 8, dim=bits, seed=2)
    weights = jnp.array([1.0, 1, 0.5, 1, 0, 1, 1, 1] * 2).reshape(2, 8)
    quantizer = made(config)
    codebook = quantizer.codebook()

    def mean(x):
        return (x * weights).sum() / weights.sum()

    def losses(z):
        logits = -jnp.square(z[..., None, :] - codebook).sum(-1) / temperature
        p = jax.nn.softmax(logits)
        average = (p * weights[..., None]).sum((0, 1)) / weights.sum()
        sample = mean(-(p * jax.nn.log_softmax(logits)).sum(-1))
        return 0.3 * mean(jnp.square(z - jnp.sign(z)).mean(-1)), 0.2 * (
            sample + (average * jnp.log(average + 1e-30)).sum()
        )

    result = evaluate(quantizer, z, weights)
    for found, expected in zip((result.commitment, result.auxiliary), losses(z), strict=True):
        assert float(found) == pytest.approx(float(expected), rel=1e-4, abs=1e-6)
    expected = jax.jit(jax.grad(lambda z: sum(losses(z)) + (z * upstream).sum()))(z)
    np.testing.assert_allclose(gradients(quantizer, z, upstream, weights)[0], expected, rtol=1e-3, atol=1e-4)


def test_lfq_of_many_bits_is_exact_in_little_memory():
    """18 bits: uniform signs at high temperature have the entropy of 2^18 codes, and sure latents that of their own."""
    z = 2.0 * (jnp.arange(64)[:, None] >> jnp.arange(18) & 1) - 1  # 64 codes
    result = evaluate(made(LFQConfig(bits=18, entropy_weight=1.0, commitment=0.0)), z)
    assert float(result.auxiliary) == pytest.approx(-np.log(64), rel=1e-5)
    soft = evaluate(made(LFQConfig(bits=18, entropy_weight=1.0, commitment=0.0, temperature=1e6)), z)
    assert float(soft.auxiliary) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    ("config", "settings", "said"),
    [
        (FSQConfig, {"levels": ()}, "one or more numbers of 2 to 256"),
        (FSQConfig, {"levels": (8, 1)}, r"numbers of 2 to 256, got \(8, 1\)"),
        (FSQConfig, {"levels": (257,)}, "2 to 256"),
        (FSQConfig, {"levels": (128, 128, 128)}, "at most 1048576 codes"),
        (LFQConfig, {"bits": 0}, "bits must be 1 to 20, got 0"),
        (LFQConfig, {"bits": 21}, "bits must be 1 to 20"),
        (LFQConfig, {"temperature": -1.0}, "temperature must be above 0"),
        (LFQConfig, {"commitment": -1.0}, "commitment must be at least 0"),
    ],
)
def test_impossible_settings_are_refused(config, settings, said):
    """A grid that cannot be is a usage error that names the setting."""
    with pytest.raises(UsageError, match=said):
        config(**settings)
