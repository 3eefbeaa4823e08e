"""Codebooks that gradients move: VQ-VAE, LlamaGen, DAC, SimVQ, IBQ, and the rotation trick."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantizer_cases import DAC, EMA, IBQ, LEARNED, LLAMAGEN, SIMVQ, evaluate, gradients, latents, made, parameters

from omni_tokenizers.errors import UsageError

COMMITMENT, CODEBOOK = 0.3, 0.7
Z, UPSTREAM = latents(2, 8), latents(2, 8, seed=2)
WEIGHTS = jnp.array([1.0, 1, 1, 0.5, 1, 0, 1, 1] * 2).reshape(2, 8)


def weighed(config):
    return dataclasses.replace(config, commitment=COMMITMENT, codebook_weight=CODEBOOK)


def pulls(z, codebook, codes):
    """Gradients of mean over weighted latents and dimensions of |z - e|^2: by z, and by the rows of the codebook."""
    z, codebook, codes = np.asarray(z).reshape(-1, 4), np.asarray(codebook), np.asarray(codes).reshape(-1)
    share = np.asarray(WEIGHTS).reshape(-1, 1) / float(WEIGHTS.sum()) / 4
    by_z = 2 * share * (z - codebook[codes])
    by_codes = np.zeros_like(codebook)
    np.add.at(by_codes, codes, -by_z)
    return by_z.reshape(2, 8, 4), by_codes


def nearest_by_hand(z, codebook):
    difference = np.asarray(z, np.float64).reshape(-1, 1, z.shape[-1]) - np.asarray(codebook, np.float64)
    return np.square(difference).sum(-1).argmin(-1).reshape(z.shape[:-1])


def test_learned_codebook_is_that_of_vq_vae():
    """Codes by brute force; upstream's and commitment's gradients go to z, the codebook loss's alone to the codes."""
    quantizer = made(weighed(LEARNED))
    result = evaluate(quantizer, Z, WEIGHTS)
    codebook = quantizer.vectors[...]
    np.testing.assert_array_equal(result.codes, nearest_by_hand(Z, codebook))
    np.testing.assert_array_equal(result.quantized, codebook[result.codes])
    by_z, by_params = gradients(quantizer, Z, UPSTREAM, WEIGHTS)
    pull_z, pull_codes = pulls(Z, codebook, result.codes)
    np.testing.assert_allclose(by_z, UPSTREAM + COMMITMENT * pull_z, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(by_params["vectors"], CODEBOOK * pull_codes, rtol=1e-5, atol=1e-6)
    distance = float((jnp.square(Z - result.quantized).mean(-1) * WEIGHTS).sum() / WEIGHTS.sum())
    assert float(result.commitment) == pytest.approx(COMMITMENT * distance, rel=1e-5)
    assert float(result.auxiliary) == pytest.approx(CODEBOOK * distance, rel=1e-5)


def test_simvq_learns_its_map_alone():
    """Codes are C W, nearest by brute force; the gradient of W is C' times that of the codes, and C has none."""
    quantizer = made(weighed(SIMVQ))
    result = evaluate(quantizer, Z, WEIGHTS)
    frozen, codebook = np.asarray(quantizer.frozen[...]), np.asarray(quantizer.codebook())
    np.testing.assert_allclose(codebook, frozen @ np.asarray(quantizer.basis[...]), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(result.codes, nearest_by_hand(Z, codebook))
    by_z, by_params = gradients(quantizer, Z, UPSTREAM, WEIGHTS)
    pull_z, pull_codes = pulls(Z, codebook, result.codes)
    assert list(by_params) == ["basis"]
    np.testing.assert_allclose(by_z, UPSTREAM + COMMITMENT * pull_z, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(by_params["basis"], CODEBOOK * frozen.T @ pull_codes, rtol=1e-5, atol=1e-6)


def slow_llamagen(params, z):
    """Unit latents and codes throughout: (quantised, losses, codes)."""
    z, codebook = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (z, params["vectors"]))
    codes = (z @ codebook.T).argmax(-1)
    return straight_through(z, codebook[codes]), losses(z, codebook[codes]), codes


def slow_dac(params, z):
    """Projected latents, the code of the smallest angle, its own length, projected back: (quantised, losses, codes)."""
    z = z @ params["project_in.kernel"] + params["project_in.bias"]
    codebook = params["vectors"]
    unit_z, unit_codes = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (z, codebook))
    codes = (unit_z @ unit_codes.T).argmax(-1)
    quantized = straight_through(z, codebook[codes]) @ params["project_out.kernel"] + params["project_out.bias"]
    return quantized, losses(z, codebook[codes]), codes


def slow_ibq(params, z):
    """The released code's formulas, one by one: (quantised, losses, codes)."""
    codebook, fixed = params["vectors"], jax.lax.stop_gradient
    logits = z @ codebook.T
    soft, codes = jax.nn.softmax(logits), logits.argmax(-1)
    hard = jax.nn.one_hot(codes, len(codebook))
    through, plain = (hard + soft - fixed(soft)) @ codebook, hard @ codebook
    p = jax.nn.softmax(logits / IBQ.temperature)
    mean = (p * WEIGHTS[..., None]).sum((0, 1)) / WEIGHTS.sum()
    sure = -(p * jax.nn.log_softmax(logits / IBQ.temperature)).sum(-1)
    entropies = (sure * WEIGHTS).sum() / WEIGHTS.sum() + (mean * jnp.log(mean + 1e-20)).sum()
    whole = (jnp.square(through - z).mean(-1) * WEIGHTS).sum() / WEIGHTS.sum()
    return through, whole + losses(z, plain) + IBQ.entropy_weight * entropies, codes


def straight_through(z, chosen):
    return z + jax.lax.stop_gradient(chosen - z)


def losses(z, chosen):
    by_z = jnp.square(z - jax.lax.stop_gradient(chosen)).mean(-1)
    by_codes = jnp.square(jax.lax.stop_gradient(z) - chosen).mean(-1)
    return ((COMMITMENT * by_z + CODEBOOK * by_codes) * WEIGHTS).sum() / WEIGHTS.sum()


@pytest.mark.parametrize(
    ("config", "slow"), [(LLAMAGEN, slow_llamagen), (DAC, slow_dac), (IBQ, slow_ibq)], ids=["llamagen", "dac", "ibq"]
)
def test_gradients_are_those_of_a_slow_version(config, slow):
    """Codes, values, losses and all gradients agree with the formulas written out."""
    quantizer = made(weighed(config))
    params = parameters(quantizer)
    result = evaluate(quantizer, Z, WEIGHTS)
    quantized, loss, codes = slow(params, Z)
    np.testing.assert_array_equal(result.codes, codes)
    np.testing.assert_allclose(result.quantized, quantized, rtol=1e-5, atol=1e-6)
    assert float(result.commitment + result.auxiliary) == pytest.approx(float(loss), rel=1e-5)

    def total(params, z):
        quantized, loss, _ = slow(params, z)
        return (quantized * UPSTREAM).sum() + loss

    expected_params, expected_z = jax.jit(jax.grad(total, (0, 1)))(params, Z)
    by_z, by_params = gradients(quantizer, Z, UPSTREAM, WEIGHTS)
    np.testing.assert_allclose(by_z, expected_z, rtol=1e-4, atol=1e-5)
    assert by_params.keys() == expected_params.keys()
    for name, gradient in by_params.items():
        assert np.abs(gradient).max() > 0
        np.testing.assert_allclose(gradient, expected_params[name], rtol=1e-4, atol=1e-5)


def test_every_code_of_ibq_has_a_gradient():
    """Codes that no latent chose are moved by the reconstruction too."""
    quantizer = made(dataclasses.replace(IBQ, codebook_size=64, entropy_weight=0.0))
    assert len(np.unique(evaluate(quantizer, Z).codes)) < 20
    assert (np.abs(gradients(quantizer, Z, UPSTREAM)[1]["vectors"]).max(-1) > 0).all()


def turn(source, goal):
    """The rotation in the plane of two vectors that takes one's direction to the other's (Rodrigues' formula)."""
    first = source / np.linalg.norm(source)
    cosine = first @ goal / np.linalg.norm(goal)
    second = goal / np.linalg.norm(goal) - cosine * first
    sine = np.linalg.norm(second)
    second /= sine
    flat = np.outer(first, first) + np.outer(second, second)
    return np.eye(len(source)) + sine * (np.outer(second, first) - np.outer(first, second)) + (cosine - 1) * flat


@pytest.mark.parametrize("config", [EMA, LEARNED, SIMVQ], ids=["ema", "learned", "simvq"])
def test_rotation_trick_turns_the_gradient(config):
    """The value is the code bit for bit; the gradient by z is |q| / |e| R' times upstream, R turning e onto q."""
    quantizer = made(dataclasses.replace(config, gradient="rotation", commitment=0.0))
    result = evaluate(quantizer, Z)
    np.testing.assert_array_equal(result.quantized, quantizer.lookup(result.codes))
    by_z, _ = gradients(quantizer, Z, UPSTREAM)
    for e, q, upstream, gradient in zip(
        *(np.asarray(x, np.float64).reshape(-1, 4) for x in (Z, result.quantized, UPSTREAM, by_z)), strict=True
    ):
        rotation = turn(e, q)
        scale = np.linalg.norm(q) / np.linalg.norm(e)
        np.testing.assert_allclose(scale * rotation @ e, q, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(gradient, scale * rotation.T @ upstream, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "change", "said"),
    [
        (LEARNED, {"codebook_size": 1}, "at least 2 codes"),
        (LEARNED, {"codebook_size": 1 << 21}, "at most 1048576 codes"),
        (LEARNED, {"code_dim": 0}, "width 1, got 8 of 0"),
        (LEARNED, {"commitment": -1.0}, "commitment must be at least 0, got -1.0"),
        (LEARNED, {"codebook_weight": float("nan")}, "codebook_weight must be at least 0"),
        (LEARNED, {"normalize": "sometimes"}, "normalize must be one of never, search, always, got 'sometimes'"),
        (LEARNED, {"gradient": "rotate"}, "gradient must be one of straight_through, rotation, got 'rotate'"),
        (EMA, {"gradient": ""}, "gradient must be one of"),
        (EMA, {"commitment": -0.1}, "commitment must be at least 0"),
        (SIMVQ, {"dim": 0}, "width 1"),
        (SIMVQ, {"gradient": "none"}, "gradient must be one of"),
        (SIMVQ, {"commitment": -1.0}, "commitment must be"),
        (IBQ, {"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        (IBQ, {"entropy_weight": -1.0}, "entropy_weight must be at least 0"),
        (IBQ, {"codebook_size": 0}, "at least 2 codes"),
    ],
)
def test_impossible_settings_are_refused(config, change, said):
    """A codebook that cannot work is a usage error that names the setting."""
    with pytest.raises(UsageError, match=said):
        dataclasses.replace(config, **change)
