"""Layers of the public codecs that are written for speed, against plain loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from layer_cases import slow_conv_transpose1d

from omni_tokenizers.dac import squared_sine
from omni_tokenizers.layers import Conv1d, ConvTranspose1d, elu
from omni_tokenizers.quantizers import nearest
from omni_tokenizers.waveform import bucket


@pytest.mark.parametrize("magnitude", [1e-3, 1, 30, 1e4])
def test_squared_sine_is_exact_far_from_the_origin_too(magnitude):
    x = np.random.default_rng(0).uniform(-magnitude, magnitude, 20000).astype(np.float32)
    np.testing.assert_allclose(jax.jit(squared_sine)(x), np.square(np.sin(x.astype(np.float64))), rtol=0, atol=3e-7)


def test_elu_on_both_sides_of_zero():
    x = np.concatenate([np.linspace(-30, 30, 2001), [-1e30, -1e-6, 0, 1e30]]).astype(np.float32)
    exact = np.where(x > 0, x, np.expm1(np.minimum(x, 0).astype(np.float64)))
    np.testing.assert_allclose(jax.jit(elu)(x), exact, rtol=1e-7, atol=1.2e-7)


@pytest.mark.parametrize(
    ("frames", "inputs", "outputs", "width", "stride", "groups"),
    [
        (9, 4, 6, 4, 2, 1),  # many frames: a convolution
        (3, 12, 5, 8, 4, 1),  # many inputs: a product for each position
        (3, 12, 5, 7, 3, 1),  # no multiple of the stride
        (3, 12, 5, 2, 3, 1),  # gaps
        (9, 6, 4, 4, 2, 2),
        (5, 8, 8, 4, 2, 8),  # Mimi's: each channel alone
    ],
)
def test_transposed_convolutions_add_up_what_overlaps(frames, inputs, outputs, width, stride, groups):
    random = np.random.default_rng(0)
    layer = ConvTranspose1d(inputs, outputs, width, stride=stride, groups=groups, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.asarray(random.standard_normal(outputs).astype(np.float32))
    x = random.standard_normal((2, frames, inputs)).astype(np.float32)
    kernel = np.asarray(layer.kernel[...], np.float64)
    exact = np.stack([slow_conv_transpose1d(clip, kernel, stride, groups) for clip in x])
    without, whole = jax.jit(lambda x: (layer.without_bias(x), layer(x)))(x)
    np.testing.assert_allclose(without, exact, rtol=0, atol=1e-5)
    np.testing.assert_allclose(whole, exact + np.asarray(layer.bias[...]), rtol=0, atol=1e-5)


def test_zeros_beside_a_convolution_are_zeros_before_and_after_its_input():
    layer = Conv1d(3, 4, 5, dilation=2, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((2, 11, 3)).astype(np.float32)
    whole = np.pad(x, ((0, 0), (6, 2), (0, 0)))
    np.testing.assert_allclose(layer(x, (6, 2)), layer(whole), rtol=0, atol=1e-6)


def test_the_nearest_code_is_the_first_of_equals():
    random = np.random.default_rng(0)
    latents = random.standard_normal((50, 3)).astype(np.float32)
    codebook = np.repeat(random.standard_normal((20, 3)).astype(np.float32), 2, axis=0)
    codes, distances = jax.jit(nearest)(jnp.asarray(latents), jnp.asarray(codebook))
    exact = np.square(latents[:, None].astype(np.float64) - codebook).sum(-1)
    np.testing.assert_array_equal(codes, exact.argmin(1))
    np.testing.assert_allclose(distances, exact.min(1), rtol=1e-5)
    assert codes.dtype == jnp.int32 and (np.asarray(codes) % 2 == 0).all()


def test_a_latent_that_is_not_a_number_still_has_a_code():
    codes, _ = jax.jit(nearest)(jnp.asarray([[np.nan, 0.0]]), jnp.zeros((7, 2)))
    assert 0 <= int(codes[0]) < 7


def test_few_sizes_compile_and_little_is_wasted():
    frames = np.arange(1, 2000)
    padded = np.array([bucket(int(count)) for count in frames])
    assert (padded >= frames).all() and (padded[16:] <= 1.125 * frames[16:]).all()
    assert len(np.unique(padded)) < 75
