"""Spectral transforms: exact inverses and lengths, agreement with independent definitions, usable gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from omni_tokenizers import spectral


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 3200)).astype(np.float32)


@pytest.mark.parametrize(("length", "hop"), [(640, 320), (640, 160), (1280, 320), (256, 64)])
def test_istft_inverts_stft_up_to_the_edges(noise, length, hop):
    """Synthesis of an analysis is the signal, every sample of it, the first and last included."""
    audio = noise[:, : noise.shape[1] // hop * hop]
    spectrum = spectral.stft(audio, length, hop)
    assert spectrum.shape == (2, audio.shape[1] // hop, length // 2 + 1)
    np.testing.assert_allclose(spectral.istft(spectrum, length, hop), audio, atol=1e-4)


def test_masked_istft_equals_the_shorter_signal_alone(noise):
    """Frames that the mask takes out leave no trace: padding in a batch changes no sample."""
    spectrum = spectral.stft(noise, 640, 160)
    mask = (jnp.arange(20) < 13).astype(jnp.float32)[None].repeat(2, 0)
    masked = spectral.istft(spectrum, 640, 160, mask)
    np.testing.assert_allclose(masked[:, : 13 * 160], spectral.istft(spectrum[:, :13], 640, 160), atol=1e-5)
    assert not masked[:, 13 * 160 :].any()


def test_stft_equals_scipy(noise):
    """The same numbers as scipy's short-time Fourier transform of the padded signal."""
    padded = np.pad(noise, ((0, 0), (240, 240)))
    window = scipy.signal.get_window("hann", 640)
    options = {"window": window, "nperseg": 640, "noverlap": 480, "boundary": None, "padded": False}
    expected = scipy.signal.stft(padded, **options)[2].swapaxes(1, 2) * window.sum()
    np.testing.assert_allclose(spectral.stft(noise, 640, 160), expected, atol=1e-3)


def test_frame_and_overlap_add_are_transposes(noise):
    """<frame(x), y> = <x, overlap_add(y)>, so that synthesis sums exactly the samples that analysis cut."""
    frames = spectral.frame(noise, 256, 64)
    other = np.random.default_rng(1).normal(size=frames.shape).astype(np.float32)
    assert np.array_equal(frames[0, 3], noise[0, 192:448])
    left, right = (frames * other).sum(), (noise * spectral.overlap_add(other, 64)).sum()
    np.testing.assert_allclose(left, right, rtol=1e-4)


def test_synthesis_of_pieces_adds_up_to_the_signal():
    """Within a longer signal: pieces of frames give parts that sum to the samples, exactly where all frames reach."""
    audio = np.random.default_rng(0).normal(size=(2, 4000)).astype(np.float32)
    for length, hop in ((400, 200), (400, 100)):
        spectrum = spectral.analysis(audio, length, hop)
        total = np.zeros_like(audio)
        for start in range(0, spectrum.shape[1], 7):
            part = spectral.synthesis(spectrum[:, start : start + 7], length, hop)
            total[:, start * hop : start * hop + part.shape[1]] += part
        whole = slice(length - hop, -(length - hop))
        np.testing.assert_allclose(total[:, whole], audio[:, whole], atol=1e-5)


@pytest.mark.parametrize("call", [lambda x: spectral.stft(x[:, :100], 640, 160), lambda x: spectral.frame(x, 640, 150)])
def test_lengths_that_do_not_fit_are_refused(noise, call):
    """No signal is cut or filled silently."""
    with pytest.raises(ValueError, match="hop"):
        call(noise)


def test_mel_scale():
    """Published anchors of Slaney's scale: linear to 1 kHz = 15 mel, then 27 mel for a factor of 6.4."""
    np.testing.assert_allclose(spectral.hertz_to_mel(np.array([0, 200, 1000, 6400])), [0, 3, 15, 42])
    hertz = np.linspace(0, 8000, 50)
    np.testing.assert_allclose(spectral.mel_to_hertz(spectral.hertz_to_mel(hertz)), hertz, atol=1e-9)


def test_mel_filterbank_equals_its_definition_bin_by_bin():
    """Every weight equals the triangle between three corner frequencies, of area 1, worked out by interpolation."""
    bank = spectral.mel_filterbank(16000, 512, 40)
    steps = np.linspace(0, 15 + 27 * np.log(8) / np.log(6.4), 42)
    corners = [200 * m / 3 if m < 15 else 1000 * np.exp((m - 15) * np.log(6.4) / 27) for m in steps]
    for band in range(40):
        three = corners[band : band + 3]
        expected = (
            np.interp(np.arange(257) * 16000 / 512, three, [0, 1, 0], left=0, right=0) / (three[2] - three[0]) * 2
        )
        np.testing.assert_allclose(bank[:, band], expected, atol=1e-7)


def test_log_mel_gradient_is_finite_on_silence():
    """Silence, which clips contain, gives no NaN gradient; a tone lands in the band of its frequency."""

    def log_mel(x):
        return spectral.log_mel(spectral.stft(x, 640, 160), 16000, 40)

    grad = jax.grad(lambda x: log_mel(x).sum())(jnp.zeros(1600))
    assert np.isfinite(grad).all()
    tone = jnp.sin(2 * jnp.pi * 1000 * jnp.arange(3200) / 16000)
    band = log_mel(tone)[10].argmax()
    centre = spectral.mel_to_hertz(np.linspace(0, spectral.hertz_to_mel(8000), 42))[band + 1]
    assert abs(centre - 1000) < 100
