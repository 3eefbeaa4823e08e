"""Training losses against slow ones written out, example by example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_tokenizers.audio_metrics import mel_distance
from omni_tokenizers.errors import UsageError
from omni_tokenizers.losses.adversarial import adaptive_weight, deception, feature_matching, hinge
from omni_tokenizers.losses.audio import DAC_MELS, DAC_WINDOWS, AudioLosses
from omni_tokenizers.losses.image import ImageLosses
from omni_tokenizers.quantizers import Quantized
from omni_tokenizers.spectral import mel_filterbank

RANDOM = np.random.default_rng(0)
RATE = 8000


def quantized(commitment=0.0, auxiliary=0.0):
    return Quantized(None, None, *map(jnp.float32, (commitment, 3.0, 0.5, auxiliary)))


def sounds(clips=3, samples=1024):
    return (RANDOM.normal(size=(clips, samples)) * 0.2).astype(np.float32)


def test_image_losses_by_hand():
    """Weighted squared and absolute errors, the quantiser's losses once a picture, and PSNR of each picture."""
    image, estimate = RANDOM.uniform(-1, 1, (2, 4, 5, 4, 3)).astype(np.float32)
    total, weight, metrics = ImageLosses(squared=2.0, absolute=0.5)(estimate, image, quantized(0.3, 0.1))
    error = (estimate - image).astype(np.float64)
    squared, absolute = (values.reshape(4, -1).mean(1) for values in (error**2, np.abs(error)))
    assert float(weight) == 4
    assert float(total) == pytest.approx(float((2 * squared + 0.5 * absolute).sum() + 4 * 0.4), rel=1e-5)
    assert float(metrics["psnr"][0]) == pytest.approx(float((10 * np.log10(4 / squared)).sum()), rel=1e-5)
    assert float(metrics["commitment"][0]) == pytest.approx(1.2, rel=1e-5)


def slow_distances(estimate, audio, frames_present, window, mels):
    """Log-mel, magnitude and complex distances of one clip at one window, frame by frame in float64."""
    hop, edge = window // 4, (window - window // 4) // 2
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    bank, rows = mel_filterbank(RATE, window, mels).astype(np.float64), []
    padded = [np.pad(x.astype(np.float64), (edge, edge + window)) for x in (estimate, audio)]
    for start in range(0, frames_present, hop):
        a, b = (np.fft.rfft(x[start : start + window] * hann) for x in padded)
        mel = [np.log(np.maximum(np.sqrt(np.abs(x) ** 2 + 1e-10) @ bank, 1e-5)) for x in (a, b)]
        wave = np.sqrt(np.abs(a - b) ** 2 + 1e-10).mean()
        rows.append((np.abs(mel[0] - mel[1]).mean(), np.abs(np.abs(a) - np.abs(b)).mean(), wave, np.abs(b).mean()))
    mel, size, wave, level = np.mean(rows, 0)
    return mel, size / level, wave / level


def test_audio_losses_by_hand():
    """All terms of clips of several lengths, DAC's windows; padding and an empty clip weigh nothing."""
    audio, estimate = sounds(4), sounds(4)
    mask = (np.arange(8) < np.array([8, 5, 1, 0])[:, None]).astype(np.float32)  # frames of 128 samples
    present = np.repeat(mask, 128, 1)
    audio, estimate = audio * present, estimate * present
    losses = AudioLosses(DAC_WINDOWS, DAC_MELS, mel=2.0, magnitude=0.7, complex=0.3, waveform=0.5)
    total, weight, metrics = jax.jit(lambda *x: losses(*x, quantized(0.2, 0.1), RATE))(estimate, audio, mask)
    terms = np.zeros(4)
    for clip, frames in enumerate((8, 5, 1)):
        scales = [
            slow_distances(estimate[clip], audio[clip], 128 * frames, window, mels)
            for window, mels in zip(DAC_WINDOWS, DAC_MELS, strict=True)
        ]
        error = np.abs(estimate[clip] - audio[clip])[: 128 * frames].mean()
        terms += [*np.mean(scales, 0), error]
    assert float(weight) == 3
    found = [float(metrics[name][0]) for name in ("mel", "magnitude", "complex", "waveform")]
    np.testing.assert_allclose(found, terms, rtol=2e-4)
    assert float(total) == pytest.approx(float(terms @ [2.0, 0.7, 0.3, 0.5]) + 3 * 0.3, rel=2e-4)


def test_mel_term_is_the_metric_but_for_edges():
    """With DAC's windows the mel term is the mel distance that evaluation reports, in other units."""
    audio, estimate = sounds(2, 16384), 0.3 * sounds(2, 16384)
    mel, *_ = jax.jit(lambda *x: AudioLosses(DAC_WINDOWS, DAC_MELS).distances(*x, np.ones_like(audio), RATE))(
        estimate, audio
    )
    assert float(mel.mean()) * 7 / np.log(10) == pytest.approx(mel_distance(audio, estimate, RATE), rel=0.02)


@pytest.mark.slow
def test_audio_losses_of_silence_have_a_gradient():
    """Silence, in the original or in both, gives a finite gradient."""
    losses = AudioLosses((64, 128), (5, 10), waveform=1.0)
    gradient = jax.grad(lambda x, y: losses(x, y, jnp.ones((1, 2)), quantized(), RATE)[0])
    for estimate in (sounds(1, 256), np.zeros((1, 256), np.float32)):
        assert np.isfinite(gradient(estimate, np.zeros((1, 256), np.float32))).all()


def test_adversarial_losses_by_hand():
    """Hinges and means over positions and scales of each example."""
    real = [RANDOM.normal(size=(2, 3, 4)), RANDOM.normal(size=(2, 5))]
    fake = [RANDOM.normal(size=(2, 3, 4)), RANDOM.normal(size=(2, 5))]
    for example in range(2):
        hinges = [
            (np.maximum(0, 1 - r[example]).mean() + np.maximum(0, 1 + f[example]).mean()) / 2
            for r, f in zip(real, fake, strict=True)
        ]
        assert float(hinge(real, fake)[example]) == pytest.approx(float(np.mean(hinges)), rel=1e-5)
        means = np.mean([f[example].mean() for f in fake])
        assert float(deception(fake)[example]) == pytest.approx(-float(means), rel=1e-5)
        matching = np.mean(
            [
                np.abs(r[example] - f[example]).mean() / np.abs(r[example]).mean()
                for r, f in zip(real, fake, strict=True)
            ]
        )
        assert float(feature_matching(real, fake)[example]) == pytest.approx(float(matching), rel=1e-5)


def test_equal_features_match():
    """Feature matching is 0 for equal features, and never moves the original's."""
    features = [RANDOM.normal(size=(2, 3, 4)).astype(np.float32), np.zeros((2, 5), np.float32)]
    np.testing.assert_array_equal(feature_matching(features, features), np.zeros(2))
    moved = jax.grad(lambda real: feature_matching(real, [x + 1 for x in features]).sum())
    assert all((gradient == 0).all() for gradient in moved([jnp.array(x) for x in features]))


def test_adaptive_weight_is_clamped():
    """The ratio of norms; at most 1e4 where the adversarial gradient vanishes."""
    gradient = {"kernel": jnp.array([3.0, 4.0])}
    assert float(adaptive_weight(gradient, {"kernel": jnp.array([0.0, 2.0])})) == pytest.approx(5 / 2.0001, rel=1e-6)
    assert float(adaptive_weight({"kernel": jnp.array([300.0])}, {"kernel": jnp.zeros(1)})) == 1e4


@pytest.mark.parametrize("fields", [{"windows": (100,), "mels": (5,)}, {"mels": (5,)}, {"mel": -1.0}])
def test_losses_that_cannot_be(fields):
    """Windows that hops do not tile, or without bands, and negative weights are usage errors."""
    with pytest.raises(UsageError):
        AudioLosses(**fields)
