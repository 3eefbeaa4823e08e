"""Small video tokenizers with every parameter random, and videos for them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omni_tokenizers.emu3 import Emu3Config, Emu3Tokenizer
from omni_tokenizers.quantizers import FSQConfig
from omni_tokenizers.video import VideoTokenizer, VideoTokenizerConfig
from omni_tokenizers.video_streaming import VideoStreams

CONFIGS = {
    "one stage": VideoTokenizerConfig(8, 4, 4, 8, (1,), 1, FSQConfig((5, 5, 5))),
    "two stages": VideoTokenizerConfig(8, 2, 3, 8, (1, 2), 2, FSQConfig((5, 5, 5))),
    "every frame": VideoTokenizerConfig(8, 4, 1, 8, (1,), 1, FSQConfig((5, 5, 5))),
}


EMU3 = Emu3Config(
    image_size=8,
    channels=32,
    multipliers=(1, 1, 1),
    residual_blocks=1,
    attention_stages=(),
    latent_channels=4,
    codebook_size=125,
    temporal_downsampling=4,
)
STREAMING = CONFIGS | {"emu3": EMU3}


@functools.cache
def tokenizer(name: str = "one stage") -> VideoStreams:
    """The tokenizer called `name`."""
    return random_tokenizer(STREAMING[name])


def random_tokenizer(config: VideoTokenizerConfig | Emu3Config) -> VideoStreams:
    """Noise in every parameter, so that no layer passes for being at its start."""
    kind = VideoTokenizer if isinstance(config, VideoTokenizerConfig) else Emu3Tokenizer
    graphdef, params, rest = nnx.split(kind.net_class(config, rngs=nnx.Rngs(0)), nnx.Param, ...)
    generator = np.random.default_rng(0)

    def noisy(path, x):
        scale = 0.3 if x.ndim == 1 else 1.2 / np.sqrt(np.prod(x.shape[:-1]))
        return jnp.asarray((path[-2].key == "scale") + generator.normal(size=x.shape) * scale, jnp.float32)

    params = jax.tree_util.tree_map_with_path(noisy, params)
    net = nnx.merge(graphdef, params, rest)
    if kind is Emu3Tokenizer:
        # Codes that are latents of a video, so that many are in use.
        latents = nnx.jit(lambda net, x: net.latents(x / 127.5 - 1))(net, videos(64, 2).astype(np.float32))
        net.codebook.vectors[...] = latents.reshape(-1, latents.shape[-1])[: config.codebook_size]
    return kind(config, net)


def videos(time: int, batch: int = 1, size: int = 8, seed: int = 0) -> np.ndarray:
    """Squares of 4 x 4 pixels whose colours change with every frame, and noise: uint8 [batch, time, size, size, 3]."""
    generator = np.random.default_rng([seed, 7])
    squares = generator.integers(0, 200, (batch, time, size // 4, size // 4, 3)).repeat(4, 2).repeat(4, 3)
    return (squares + generator.integers(0, 56, squares.shape)).astype(np.uint8)


@functools.partial(jax.jit, static_argnames="graphdef")
def encoded_whole(graphdef, state, video, frames):
    """Codes by the net in one piece, without steps."""
    return nnx.merge(graphdef, state).encode(video, frames)


@functools.partial(jax.jit, static_argnames="graphdef")
def decoded_whole(graphdef, state, codes, frames):
    """Pixels by the net in one piece, without steps."""
    return nnx.merge(graphdef, state).decode(codes, frames)
