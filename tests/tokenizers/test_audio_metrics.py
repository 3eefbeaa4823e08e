"""Measures of sound against what is known by hand."""

import sys

import numpy as np
import pytest
import scipy.signal

from omni_tokenizers import audio_metrics
from omni_tokenizers.errors import OmniError
from omni_tokenizers.spectral import mel_filterbank


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, 8000)) * 0.1


def test_mel_distance_of_a_gain_is_its_logarithm_at_each_window(noise):
    """Ten times the amplitude moves every log10 mel by 1 at 7 windows; 0 for equal sound."""
    assert audio_metrics.mel_distance(noise, noise, 16000) == 0
    # Bands narrower than a bin stay at the floor: they are counted, as in DAC, and differ by 0.
    expected = 0
    for window, mels in zip((32, 64, 128, 256, 512, 1024, 2048), (5, 10, 20, 40, 80, 160, 320), strict=True):
        expected += (mel_filterbank(16000, window, mels).sum(0) > 0).mean()
    assert 6 < expected <= 7
    assert audio_metrics.mel_distance(noise, noise * 10, 16000) == pytest.approx(expected, rel=1e-3)


def test_log10_mel_equals_scipy(noise):
    """Frames are centred with reflected edges and windowed by a periodic Hann window, as torch.stft does by default."""
    length, hop = 512, 128
    window = scipy.signal.get_window("hann", length)
    _, _, spectrum = scipy.signal.stft(
        np.pad(noise[0], length // 2, mode="reflect"),
        window=window,
        nperseg=length,
        noverlap=length - hop,
        boundary=None,
    )
    expected = np.log10(np.maximum(np.abs(spectrum.T) * window.sum() @ mel_filterbank(16000, length, 80), 1e-5))
    ours = audio_metrics._log10_mel(noise[0], 16000, length, 80)
    np.testing.assert_allclose(ours, expected[: len(ours)], atol=1e-5)


def test_lengths_leave_padding_out(noise):
    """What stands past a clip's length changes no measure."""
    lengths = np.array([8000, 5000, 300])
    estimate = noise * 0.5 + np.random.default_rng(1).normal(size=noise.shape) * 0.01
    dirty = np.where(np.arange(8000) < lengths[:, None], estimate, 9)
    for measure in (
        lambda x: audio_metrics.mel_distance(noise, x, 16000, lengths),
        lambda x: audio_metrics.si_sdr(noise, x, lengths),
    ):
        assert measure(dirty) == measure(estimate)
        assert measure(dirty) != measure(estimate * 0 + noise.mean())


def test_si_sdr_is_the_power_ratio_whatever_the_scale():
    """Orthogonal noise at a hundredth of the power is 20 dB, at any gain and offset; silence is left out."""
    time = np.arange(1600) / 1600
    signal, noise = np.sin(20 * np.pi * time)[None], 0.1 * np.cos(20 * np.pi * time)[None]
    assert audio_metrics.si_sdr(signal, 0.3 * (signal + noise) + 0.2) == pytest.approx(20, abs=1e-6)
    both = np.concatenate([signal, 0 * signal])
    assert audio_metrics.si_sdr(both, np.concatenate([signal + noise, noise])) == pytest.approx(20, abs=1e-6)
    assert np.isnan(audio_metrics.si_sdr(0 * signal, noise))


def test_stoi_joins_short_clips():
    """Clips too short for STOI are joined: 1 for equal sound, less with noise; NaN below 3 s in all."""
    pytest.importorskip("pystoi")
    generator = np.random.default_rng(0)
    speech = generator.normal(size=(12, 6000)) * (0.1 + np.abs(np.sin(np.arange(6000) / 900)))
    noisy = speech + generator.normal(size=speech.shape)
    assert audio_metrics.stoi(speech, speech, 16000) == pytest.approx(1, abs=1e-3)
    assert audio_metrics.stoi(speech, noisy, 16000) < 0.95
    assert np.isnan(audio_metrics.stoi(speech[:3], noisy[:3], 16000))


def test_pesq_falls_with_noise_and_tells_silence_apart(caplog):
    """Equal speech scores the scale's end, noise less, silence in its place least; clips without speech are counted."""
    pytest.importorskip("pesq")
    rng, time = np.random.default_rng(0), np.arange(48000) / 24000
    voice = 0.2 * np.sin(2 * np.pi * 150 * time) * scipy.signal.sawtooth(2 * np.pi * 150 * time) * (time % 0.5 < 0.3)
    speech = np.stack([voice, np.roll(voice, 5000)])
    noisy = speech + 0.03 * rng.normal(size=speech.shape)
    assert audio_metrics.pesq(speech, speech, 24000) == pytest.approx(4.64, abs=0.01)
    assert 1 < audio_metrics.pesq(speech, noisy, 24000) < 4
    assert audio_metrics.pesq(speech, 0 * speech, 24000) == 1
    assert not caplog.records
    lengths = np.array([48000, 3000])
    alone = audio_metrics.pesq(speech[:1], noisy[:1], 24000)
    assert audio_metrics.pesq(speech, noisy, 24000, lengths) == alone
    assert "1 of 2 clips" in caplog.text
    assert np.isnan(audio_metrics.pesq(0 * speech, noisy, 24000))
    assert np.isnan(audio_metrics.pesq(0 * speech, 0 * speech, 24000))


@pytest.mark.parametrize(
    ("measure", "package", "extra"), [("stoi", "pystoi", "quickstart"), ("pesq", "pesq", "speech")]
)
def test_missing_packages_name_the_extra(noise, monkeypatch, measure, package, extra):
    """Without the package that measures, the error says what to install."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(OmniError, match=extra):
        getattr(audio_metrics, measure)(noise, noise, 16000)


def test_codebook_usage_counts_the_whole_set_without_padding():
    """Two of four codes in equal parts: usage 1/2, perplexity 2; one code: perplexity 1; padding does not count."""
    codes = np.array([[[0, 1, 3], [2, 2, 1]], [[1, 0, 3], [2, 2, 1]]])
    first, second = audio_metrics.codebook_usage(codes, (4, 8), np.array([2, 2]))
    assert first == pytest.approx({"usage": 0.5, "perplexity": 2.0})
    assert second == pytest.approx({"usage": 0.125, "perplexity": 1.0})
    assert audio_metrics.codebook_usage(codes, (4, 8))[0]["usage"] == 0.75


def test_shapes_that_differ_are_refused(noise):
    """Comparing arrays of two shapes is an error for people, not a broadcast."""
    with pytest.raises(OmniError, match="one shape"):
        audio_metrics.si_sdr(noise, noise[:1])
