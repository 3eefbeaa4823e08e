"""Image tokenizer: shapes, errors, learning, and the measures of pictures."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.ndimage
from flax import nnx

from omni_tokenizers.codes import codebook_use
from omni_tokenizers.errors import OmniError, UsageError
from omni_tokenizers.image import (
    Convolution,
    ImageTokenizer,
    ImageTokenizerConfig,
    ImageVQ,
    depth_to_space,
    normalized,
    space_to_depth,
)
from omni_tokenizers.image_metrics import ms_ssim, psnr, ssim

CONFIG = ImageTokenizerConfig(
    image_size=16, patch_size=4, channels=16, multipliers=(1, 2), codebook_size=32, code_dim=4
)
GENERATOR = np.random.default_rng(0)


def pictures(number, size=16, generator=GENERATOR):
    """Two flat colours, one left and one right."""
    colours = generator.integers(0, 2, (number, 1, 2, 3)) * 200 + 20
    return np.repeat(np.repeat(colours, size, 1), size // 2, 2).astype(np.uint8)


def loss_of(net, batch, key, *, training):
    """(total, weight, metrics) of a batch, as the trainer has them."""
    image = normalized(batch["image"])
    estimate, quantized = net.autoencode(image, key, training=training)
    return net.config.losses(estimate, image, quantized)


@pytest.fixture(scope="module")
def tokenizer():
    return ImageTokenizer(CONFIG, ImageVQ(CONFIG, rngs=nnx.Rngs(0)))


def test_depth_and_space_are_inverse():
    """Patches are cut where they lie and put back there."""
    x = jnp.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    deep = space_to_depth(x, 2)
    np.testing.assert_array_equal(deep[1, 0, 2], x[1, 0:2, 4:6].reshape(-1))
    np.testing.assert_array_equal(depth_to_space(deep, 2), x)


def test_convolution_is_a_convolution():
    """The product over shifted copies equals XLA's 3 x 3 convolution."""
    layer, x = Convolution(3, 5, rngs=nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (2, 6, 4, 3))
    kernel = layer.linear.kernel[...].reshape(3, 3, 3, 5)
    expected = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)


def test_shapes_and_types(tokenizer):
    """Codes are int32 on the grid, pictures uint8; Codes and bare ids decode alike; nothing gives nothing."""
    images = GENERATOR.integers(0, 256, (3, 16, 16, 3), np.uint8)
    codes = tokenizer.encode(images)
    ids = np.asarray(codes)
    assert tokenizer.grid == (2, 2) and ids.shape == (3, 2, 2) and ids.dtype == np.int32
    decoded = tokenizer.decode(codes)
    assert decoded.shape == images.shape and decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, tokenizer.decode(ids.astype(np.int64)))
    assert tokenizer.encode(images[:0]).shape == (0, 2, 2)
    assert tokenizer.decode(ids[:0]).shape == (0, 16, 16, 3)


def test_codes_do_not_depend_on_the_batch(tokenizer):
    """Padding and cutting of batches change no code, beyond one chunk too."""
    images = GENERATOR.integers(0, 256, (261, 16, 16, 3), np.uint8)
    whole = np.asarray(tokenizer.encode(images))
    for few in (slice(0, 1), slice(1, 4), slice(255, 261)):
        np.testing.assert_array_equal(tokenizer.encode(images[few]), whole[few])


def test_a_picture_of_any_size_keeps_it(tokenizer):
    """It is padded by its edge to whole codes, and decoding cuts that off; nothing is kept where nothing was padded."""
    images = GENERATOR.integers(0, 256, (2, 13, 21, 3), np.uint8)
    codes = tokenizer.encode(images)
    padded = tokenizer.encode(np.pad(images, ((0, 0), (0, 3), (0, 3), (0, 0)), mode="edge"))
    np.testing.assert_array_equal(codes.sizes, [[13, 21]] * 2)
    np.testing.assert_array_equal(codes.ids, padded.ids)
    assert codes.ids.shape == (2, 2, 3) and padded.sizes is None
    np.testing.assert_array_equal(tokenizer.decode(codes), tokenizer.decode(padded)[:, :13, :21])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 16, 16, 3), np.float32), "uint8"),
        (np.zeros((16, 16, 3), np.uint8), "must be"),
        (np.zeros((1, 0, 32, 3), np.uint8), r"not empty, got \[1, 0, 32, 3\]"),
        (np.zeros((1, 16, 16, 4), np.uint8), "must be"),
        ("picture.png", "uint8"),
    ],
)
def test_wrong_pictures_are_refused(tokenizer, images, message):
    """Types and shapes that do not fit are errors for people."""
    with pytest.raises(OmniError, match=message):
        tokenizer.encode(images)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.full((1, 2, 2), 32), "code 32 is outside"),
        (np.full((1, 2, 2), -1), "outside"),
        (np.zeros((1, 2, 0), int), "must not be empty"),
        (np.zeros((2, 2), int), "axes"),
        (np.zeros((1, 2, 2)), "integers"),
    ],
)
def test_wrong_codes_are_refused(tokenizer, codes, message):
    """Codes out of range, of another shape or type are errors for people."""
    with pytest.raises(OmniError, match=message):
        tokenizer.decode(codes)


@pytest.mark.parametrize("change", [{"image_size": 20}, {"channels": 0}, {"multipliers": ()}, {"codebook_size": 1}])
def test_impossible_settings_are_refused(change):
    """A net that cannot be built is a usage error before anything is built."""
    with pytest.raises(UsageError):
        dataclasses.replace(CONFIG, **change)


def test_loss_is_a_sum_over_pictures():
    """total / weight is the mean loss; uint8 and floating point pictures give the same; every parameter learns."""
    net, images = ImageVQ(CONFIG, rngs=nnx.Rngs(0)), pictures(6)
    loss = nnx.jit(lambda net, images: loss_of(net, {"image": images}, None, training=False))
    total, weight, metrics = loss(net, images)
    assert float(weight) == 6 and set(metrics) >= {"reconstruction", "psnr", "perplexity", "usage"}
    expected = (metrics["reconstruction"][0] + metrics["commitment"][0]) / 6
    assert float(total / weight) == pytest.approx(float(expected), rel=1e-5)
    parts = sum(loss(net, images[start : start + 3])[0] for start in (0, 3))
    assert float(parts) == pytest.approx(float(total), rel=1e-4)
    assert float(loss(net, images / 127.5 - 1)[0]) == pytest.approx(float(total), rel=1e-5)


@pytest.mark.slow
def test_it_learns():
    """A few steps, called as the trainer calls it, reconstruct simple pictures; all codes' statistics are returned."""
    graphdef, params, rest = nnx.split(ImageVQ(CONFIG, rngs=nnx.Rngs(0)), nnx.Param, ...)
    optimizer = optax.adam(3e-3)
    moments = optimizer.init(params)

    @jax.jit
    def step(params, rest, moments, images, key):
        def loss(params):
            net = nnx.merge(graphdef, params, rest, copy=True)
            total, weight, metrics = loss_of(net, {"image": images}, key, training=True)
            return total / weight, (metrics, nnx.state(net, nnx.Not(nnx.Param)))

        (_, (metrics, rest)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), rest, moments, metrics, gradients

    generator = np.random.default_rng(1)  # its own, so that the order of the tests changes nothing
    for index in range(250):
        images, key = pictures(32, generator=generator), jax.random.key(index)
        params, rest, moments, metrics, gradients = step(params, rest, moments, images, key)
    assert all(float(jnp.abs(gradient).max()) > 0 for gradient in jax.tree.leaves(gradients))
    tokenizer = ImageTokenizer(CONFIG, nnx.merge(graphdef, params, rest))
    held_out = pictures(64, generator=np.random.default_rng(9))
    estimate = tokenizer.decode(tokenizer.encode(held_out))
    assert psnr(held_out, estimate) > 20
    # The trainer's measure is the same up to rounding and clipping.
    last = float(metrics["psnr"][0] / metrics["psnr"][1])
    assert last == pytest.approx(psnr(held_out, estimate), abs=4)


def test_psnr_by_hand():
    """An error of 5 everywhere is 34.15 dB; equal pictures are infinitely near."""
    black = np.zeros((2, 16, 16, 3), np.uint8)
    assert psnr(black, black + 5) == pytest.approx(34.1514, abs=1e-3)
    assert psnr(black, black) == np.inf


def test_ssim_orders_pictures():
    """Equal pictures score 1, a little noise less, much noise least."""
    clean = np.repeat(np.arange(32, dtype=np.uint8) * 6, 32).reshape(1, 32, 32, 1).repeat(3, -1)
    noise = np.random.default_rng(0).normal(size=clean.shape)
    little, much = (np.clip(clean + scale * noise, 0, 255).astype(np.uint8) for scale in (5, 60))
    assert ssim(clean, clean) == pytest.approx(1)
    assert 1 > ssim(clean, little) > ssim(clean, much) + 0.1


def test_ms_ssim_equals_the_paper_written_out():
    """Against a slow version: windows cut one by one, the five scales' means, the paper's exponents."""
    rng = np.random.default_rng(0)
    smooth = 128 + 400 * scipy.ndimage.gaussian_filter(rng.normal(size=(2, 181, 176, 3)), (0, 2, 2, 0))
    reference, estimate = (
        np.clip(smooth + noise * rng.normal(size=smooth.shape), 0, 255).astype(np.uint8) for noise in (0, 20)
    )
    planes = (np.moveaxis(images, -1, 1).reshape(-1, 181, 176) for images in (reference, estimate))
    expected = np.mean([slow_ms_ssim(*pair) for pair in zip(*planes, strict=True)])
    assert ms_ssim(reference, estimate) == pytest.approx(expected, rel=1e-6)
    assert 0.5 < expected < 0.99 and ms_ssim(reference, reference) == pytest.approx(1)


def slow_ms_ssim(a, b):
    """Wang, Simoncelli and Bovik 2003, equation 7, for one channel."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    a, b, score = a.astype(float), b.astype(float), 1.0
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        x, y = (np.lib.stride_tricks.sliding_window_view(image, (11, 11)) for image in (a, b))
        mean_x, mean_y = (np.einsum("ijkl,kl->ij", each, window) for each in (x, y))
        dx, dy = x - mean_x[..., None, None], y - mean_y[..., None, None]
        xx, yy, xy = (np.einsum("ijkl,ijkl,kl->ij", *pair, window) for pair in ((dx, dx), (dy, dy), (dx, dy)))
        value = (2 * xy + 58.5225) / (xx + yy + 58.5225)
        if scale == 4:
            value = value * (2 * mean_x * mean_y + 6.5025) / (mean_x**2 + mean_y**2 + 6.5025)
        score *= value.mean() ** weight
        rows, columns = range(0, len(a), 2), range(0, a.shape[1], 2)
        a, b = (np.array([[image[i : i + 2, j : j + 2].mean() for j in columns] for i in rows]) for image in (a, b))
    return score


def test_ms_ssim_needs_its_coarsest_window():
    """Below 176 pixels the coarsest scale holds no window; contrast turned around scores 0, not NaN."""
    small = np.zeros((1, 175, 200, 3), np.uint8)
    with pytest.raises(OmniError, match="176 x 176"):
        ms_ssim(small, small)
    noise = GENERATOR.integers(0, 256, (1, 176, 176, 3), np.uint8)
    assert ms_ssim(noise, 255 - noise) == 0


def test_ssim_names_what_is_missing(monkeypatch):
    """Without scikit-image the error names the extra."""
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    with pytest.raises(OmniError, match="quickstart"):
        ssim(np.zeros((1, 16, 16, 3), np.uint8), np.zeros((1, 16, 16, 3), np.uint8))


def test_measures_refuse_other_input():
    """Floats and unequal shapes are errors, not silent broadcasts."""
    image = np.zeros((1, 16, 16, 3), np.uint8)
    for reference, estimate in ((image / 255, image), (image, image[:, :8]), (image[0], image[0])):
        with pytest.raises(OmniError):
            psnr(reference, estimate)


def test_codebook_use_over_the_set():
    """Even use of half the codes: usage 1/2, perplexity half the size."""
    use = codebook_use(np.arange(8).reshape(2, 2, 2) % 4, 8)
    assert use["usage"] == 0.5 and use["perplexity"] == pytest.approx(4)
