"""Short-time Fourier analysis and synthesis with exact lengths, and mel filterbanks.

`stft` and `istft` use "same" framing, as Vocos does (Siuzdak 2023, arXiv:2306.00814): `samples`, a multiple of `hop`,
give `samples / hop` frames, frame `t` being centred on sample `(t + 1/2) hop`. Frames are cut by reshapes, not gathers,
and transformed with `jnp.fft`: on a CPU a gather takes twice as long, a product with the Fourier matrix several times.
`analysis` and `synthesis` are the same transforms for signals that go on at both ends.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float


def hann(length: int) -> Float[np.ndarray, " length"]:
    """The periodic Hann window, whose square overlaps to a constant at hops of length/3, length/4 ..."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)).astype(np.float32)


def frame(audio: Float[Array, "*batch samples"], length: int, hop: int) -> Float[Array, "*batch frames length"]:
    """Cut overlapping frames: frame t is `audio[t * hop : t * hop + length]`.

    Samples after the last whole frame are left out. Raises ValueError if `hop` does not divide `length`.
    """
    if length % hop:
        raise ValueError(f"a hop of {hop} does not divide the window length {length}")
    overlap = length // hop
    pieces = audio[..., : audio.shape[-1] // hop * hop].reshape(*audio.shape[:-1], -1, hop)
    frames = pieces.shape[-2] - overlap + 1
    return jnp.concatenate([pieces[..., i : i + frames, :] for i in range(overlap)], axis=-1)


def overlap_add(frames: Float[Array, "*batch frames length"], hop: int) -> Float[Array, "*batch samples"]:
    """Transpose of `frame`: sum the frames, each `hop` samples after the one before."""
    count, length = frames.shape[-2:]
    overlap = length // hop
    pieces = frames.reshape(*frames.shape[:-1], overlap, hop)
    widths = [(0, 0)] * (frames.ndim - 2)
    shifted = [jnp.pad(pieces[..., i, :], [*widths, (i, overlap - 1 - i), (0, 0)]) for i in range(overlap)]
    return sum(shifted).reshape(*frames.shape[:-2], (count + overlap - 1) * hop)


def stft(audio: Float[Array, "*batch samples"], length: int, hop: int) -> Complex[Array, "*batch frames bins"]:
    """Fourier transform of Hann-windowed frames, with zeros of (length - hop) / 2 around the signal.

    `samples` must be a multiple of `hop` (ValueError); frames = samples / hop, bins = length / 2 + 1.
    """
    if audio.shape[-1] % hop or (length - hop) % 2:
        raise ValueError(f"{audio.shape[-1]} samples with a window of {length} do not make whole hops of {hop}")
    edge = (length - hop) // 2
    return analysis(jnp.pad(audio, [(0, 0)] * (audio.ndim - 1) + [(edge, edge)]), length, hop)


def analysis(audio: Float[Array, "*batch samples"], length: int, hop: int) -> Complex[Array, "*batch frames bins"]:
    """Fourier transform of the Hann-windowed frames that `frame` cuts, with nothing around the signal."""
    return jnp.fft.rfft(frame(audio, length, hop) * hann(length), axis=-1)


def istft(
    spectrum: Complex[Array, "*batch frames bins"],
    length: int,
    hop: int,
    mask: Float[Array, "*batch frames"] | None = None,
) -> Float[Array, "*batch samples"]:
    """Least-squares inverse of `stft` (Griffin and Lim 1984, equation 6); samples = frames * hop.

    Frames whose `mask` is 0 count as absent, so that a masked batch gives the samples of each signal alone; where they
    would stand the result is 0.
    """
    mask = jnp.ones(spectrum.shape[:-1]) if mask is None else mask
    window = hann(length)
    frames = jnp.fft.irfft(spectrum, n=length, axis=-1) * window * mask[..., None]
    envelope = overlap_add(jnp.square(window) * mask[..., None], hop)
    covered = jnp.repeat(mask, hop, axis=-1)
    edge = (length - hop) // 2
    inner = slice(edge, edge + spectrum.shape[-2] * hop)
    # A covered sample lies under the middle of its own frame: with hops up to length / 2 the envelope is at least 1/4.
    return overlap_add(frames, hop)[..., inner] / jnp.maximum(envelope[..., inner], 1e-3) * covered


def synthesis(spectrum: Complex[Array, "*batch frames bins"], length: int, hop: int) -> Float[Array, "*batch samples"]:
    """Least-squares inverse of `analysis` (Griffin and Lim 1984, equation 6) within a longer signal.

    Of its (frames - 1) * hop + length samples, the length - hop at each end are the part that these frames have in
    them: what frames before and after would give is to be added.
    """
    window = hann(length)
    added = overlap_add(jnp.fft.irfft(spectrum, n=length, axis=-1) * window, hop)
    envelope = np.square(window).reshape(-1, hop).sum(0)
    return (added.reshape(*added.shape[:-1], -1, hop) / envelope).reshape(added.shape)


def magnitude(spectrum: Complex[Array, "*shape"], floor: float = 1e-5) -> Float[Array, "*shape"]:
    """Absolute value with a finite gradient at 0: sqrt(|spectrum|^2 + floor^2)."""
    return jnp.sqrt(jnp.square(spectrum.real) + jnp.square(spectrum.imag) + floor**2)


def hertz_to_mel(hertz: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Slaney's mel scale (Auditory Toolbox 1998): 200/3 Hz a mel up to 1 kHz, then 27 mels for each factor of 6.4."""
    hertz = np.asarray(hertz, np.float64)
    logarithmic = 15 + 27 * np.log(np.maximum(hertz, 1000) / 1000) / np.log(6.4)
    return np.where(hertz < 1000, hertz * 3 / 200, logarithmic)


def mel_to_hertz(mel: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Inverse of `hertz_to_mel`."""
    mel = np.asarray(mel, np.float64)
    return np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((np.maximum(mel, 15) - 15) / 27))


@functools.lru_cache(maxsize=64)
def mel_filterbank(sample_rate: int, length: int, mels: int) -> Float[np.ndarray, "bins mels"]:
    """Triangular filters from 0 Hz to half the sample rate on Slaney's scale, each of area 1 in Hz; kept, to be read.

    Scale and norm are librosa's defaults, hence those of DAC. A filter narrower than a bin may be all zero.
    """
    frequencies = np.linspace(0, sample_rate / 2, length // 2 + 1)
    corners = mel_to_hertz(np.linspace(0, hertz_to_mel(sample_rate / 2), mels + 2))
    low, centre, high = corners[:-2], corners[1:-1], corners[2:]
    rising = (frequencies[:, None] - low) / (centre - low)
    falling = (high - frequencies[:, None]) / (high - centre)
    triangles = np.maximum(0, np.minimum(rising, falling))
    filters = (triangles * 2 / (high - low)).astype(np.float32)
    filters.setflags(write=False)
    return filters


def log_mel(
    spectrum: Complex[Array, "*batch frames bins"], sample_rate: int, mels: int, floor: float = 1e-5
) -> Float[Array, "*batch frames mels"]:
    """Natural logarithm of the mel-filtered magnitudes of a spectrum, clamped below at `floor`."""
    mel = magnitude(spectrum) @ mel_filterbank(sample_rate, 2 * (spectrum.shape[-1] - 1), mels)
    return jnp.log(jnp.maximum(mel, floor))
