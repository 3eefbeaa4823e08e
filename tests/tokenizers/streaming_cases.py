"""Small codecs that stream, with every parameter random, and sound for them; what happens to a stream."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from hypothesis import strategies as st

from omni_tokenizers.audio import AudioTokenizer, AudioTokenizerConfig, SpectralCodec
from omni_tokenizers.base import NetTokenizer
from omni_tokenizers.encodec import EncodecConfig, EncodecNet, EncodecTokenizer
from omni_tokenizers.mimi import MimiConfig, MimiNet, MimiTokenizer
from omni_tokenizers.quantizers import nearest
from omni_tokenizers.streaming import StreamingCodec

ENCODEC = {
    "sample_rate": 2400,
    "filters": 4,
    "dim": 8,
    "strides": (3,),
    "lstm_layers": 1,
    "codebook_size": 16,
    "bandwidths": (9.6,),
}
MIMI = {
    "sample_rate": 2400,
    "filters": 4,
    "dim": 8,
    "strides": (3,),
    "residual_layers": 0,
    "transformer_layers": 1,
    "heads": 2,
    "head_dim": 4,
    "mlp_dim": 12,
    "window": 5,
    "codebooks": 4,
    "codebook_size": 16,
    "code_dim": 4,
}
SPECTRAL = {
    "sample_rate": 2400,
    "hop": 8,
    "window": 16,
    "mels": 8,
    "dim": 12,
    "encoder_blocks": 1,
    "decoder_blocks": 1,
    "codebook_size": 16,
    "code_dim": 4,
    "causal": True,
}
_DEEP = {"strides": (2, 3), "residual_layers": 2, "conv_shortcut": False}
CONFIGS = {
    "encodec": EncodecConfig(**ENCODEC),
    "encodec replicate": EncodecConfig(**ENCODEC | _DEEP | {"lstm_layers": 2, "padding": "replicate"}),
    "mimi": MimiConfig(**MIMI),
    "mimi reflect": MimiConfig(**MIMI | _DEEP | {"transformer_layers": 2, "padding": "reflect", "window": 1}),
    "spectral": AudioTokenizerConfig(**SPECTRAL),
    "spectral six hops": AudioTokenizerConfig(**SPECTRAL | {"window": 48}),
}
RELEASED = {
    "encodec": EncodecConfig(),
    "mimi": MimiConfig(),
    "spectral": AudioTokenizerConfig(sample_rate=24000, hop=240, window=960, dim=64, causal=True),
}
_TYPES = {EncodecConfig: EncodecTokenizer, MimiConfig: MimiTokenizer, AudioTokenizerConfig: AudioTokenizer}


ROWS = 3
"""Rows of a stream to which something happens."""


def events(sizes: list[int]) -> st.SearchStrategy:
    """What happens to a stream: each row gets a piece of so many steps of time, or a row ends and another sound or
    video begins in it."""
    pieces = st.lists(st.sampled_from(sizes), min_size=ROWS, max_size=ROWS)
    return st.lists(st.one_of(pieces, st.integers(0, ROWS - 1)), max_size=30)


def streamed(half, sources, events, most: int, axis: int = 1) -> list[tuple[np.ndarray, np.ndarray]]:
    """Runs events; of each sound or video that a row had, what was pushed and what came out.

    Args:
        sources: its number -> an array to cut pieces from, `most` long along the axis of time.
    """
    done, current = [], {}

    def begin(row):
        current[row] = [sources(len(done) + row), 0, []]

    def end(row):
        source, taken, outputs = current[row]
        outputs.append(half.finish(row))
        done.append((source.take(range(taken), axis), np.concatenate(outputs, axis)))
        half.reset(row)
        begin(row)

    for row in range(ROWS):
        begin(row)
    for event in [*events, *range(ROWS)]:
        if isinstance(event, int):
            end(event)
            continue
        pieces = []
        for row, size in enumerate(event):
            source, taken, _ = current[row]
            current[row][1] = min(taken + size, most)
            pieces.append(source.take(range(taken, current[row][1]), axis))
        for row, output in enumerate(half.push(pieces)):
            current[row][2].append(output)
    return done


@functools.cache
def tokenizer(name: str) -> StreamingCodec:
    """The codec called `name`."""
    return random_tokenizer(CONFIGS[name])


def random_tokenizer(config) -> StreamingCodec:
    """A codec with noise in every parameter, so that no layer passes for being at its start; its codes are latents of
    some sound, so that many are in use."""
    generator = np.random.default_rng(0)

    def noisy(path, x):
        if path[-2].key in ("count", "initialized"):
            return np.ones(x.shape, x.dtype)
        scale = 0.3 if x.ndim == 1 else 1.3 / np.sqrt(np.prod(x.shape[:-1]))
        offset = x.ndim == 1 and path[-2].key in ("scale", "mlp_scale", "attention_scale")
        return (offset + generator.normal(size=x.shape) * scale).astype(np.float32)

    tokenizer = made(_TYPES[type(config)], config, noisy)
    net = tokenizer.net
    nnx.jit(_fill_codebooks)(net, noise(120 * config.samples_per_frame))
    return type(tokenizer)(config, net)


def made(kind: type, config, fill) -> NetTokenizer:
    """A tokenizer whose arrays are what `fill(path, shape)` gives; nothing is compiled."""
    abstract = nnx.eval_shape(lambda: kind.net_class(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    return kind(config, nnx.merge(graphdef, jax.tree_util.tree_map_with_path(fill, state)))


def _fill_codebooks(net, audio) -> None:
    for levels, latents in zip(_branches(net), _latents(net, audio), strict=True):
        _fill(levels, latents)


def _branches(net) -> list:
    """Levels of each residual quantiser."""
    return [part.levels for part in ((net.semantic, net.acoustic) if isinstance(net, MimiNet) else (net.quantizer,))]


def _latents(net, audio) -> list:
    """What each residual quantiser gets of sound in whole frames: [frames, dim]."""
    lengths = jnp.array([audio.shape[1]])
    if isinstance(net, SpectralCodec):
        return [net.latents(*net.prepare(audio, lengths))[0]]
    latents = net.encoder(audio[..., None], lengths)
    if isinstance(net, EncodecNet):
        return [latents[0]]
    lengths = -(-lengths // net.config.hop)
    latents = net.down(net.encoder_transformer(latents, lengths), lengths)
    return [branch.enter(latents)[0] for branch in (net.semantic, net.acoustic)]


def widest_tie(tokenizer: StreamingCodec, audio: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> float:
    """How far the squared distances of two codes for the same sound are apart in float64, relatively, where they differ
    in a frame first: levels after that quantise something else."""
    net, widest = tokenizer.net, 0.0
    audio = np.pad(audio, ((0, 0), (0, -audio.shape[1] % tokenizer.samples_per_frame)))
    latents = nnx.jit(_latents)(net, audio)
    for levels, branch in zip(_branches(net), latents, strict=True):
        books = [np.asarray(level.codebook(), np.float64) for level in levels]
        for frame in np.flatnonzero((ours[: len(books)] != theirs[: len(books)]).any(0)):
            residual = np.asarray(branch[frame], np.float64)
            level = int(np.argmax(ours[: len(books), frame] != theirs[: len(books), frame]))
            residual = residual - sum(book[ours[index, frame]] for index, book in enumerate(books[:level]))
            one, other = (np.square(residual - books[level][codes[level, frame]]).sum() for codes in (ours, theirs))
            widest = max(widest, abs(one - other) / max(one, other))
        ours, theirs = ours[len(books) :], theirs[len(books) :]
    return widest


def _fill(levels, latents) -> None:
    """Vectors of each level: latents that are left, blurred by half their spread."""
    residual = latents
    for index, level in enumerate(levels):
        vectors = level.vectors if hasattr(level, "vectors") else level.sum
        pick, blur = jax.random.split(jax.random.key(index))
        chosen = residual[jax.random.choice(pick, len(residual), vectors.shape[:1])]
        vectors[...] = chosen + 0.5 * residual.std(0) * jax.random.normal(blur, vectors.shape)
        residual = residual - level.codebook()[nearest(residual, level.codebook())[0]]


def noise(samples: int, seed: int = 0) -> np.ndarray:
    """Noise whose loudness changes all the time: float32 [1, samples] within [-1, 1]."""
    generator = np.random.default_rng(seed)
    loudness = np.abs(np.sin(np.arange(samples) / 70 + seed))
    return (np.clip(generator.normal(size=(1, samples)) * 0.4, -1, 1) * loudness).astype(np.float32)
