"""Mimi, the codec of Moshi (Défossez et al. 2024, arXiv:2410.00037): 24 kHz at 12.5 frames a second.

A transformer stands between SEANet and a further downsampling, and again on the way back. The first codebooks are
taught meaning; they and the rest quantise the same latents, each branch in a projection of its own.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from omni_tokenizers.codebooks import Codebook, ResidualCodebooks
from omni_tokenizers.edges import PaddedConv1d, TrimmedConvTranspose1d, silenced
from omni_tokenizers.errors import UsageError
from omni_tokenizers.layers import Conv1d
from omni_tokenizers.quantizers import CodebookState
from omni_tokenizers.quantizers.base import PRECISION, first_lowest
from omni_tokenizers.seanet import SEANetConfig, SEANetDecoder, SEANetEncoder
from omni_tokenizers.transformer import CausalTransformer
from omni_tokenizers.waveform import WaveformTokenizer


@dataclasses.dataclass(frozen=True)
class MimiConfig(SEANetConfig):
    """A Mimi; the default is the public one."""

    filters: int = 64
    """Channels after the first convolution; each stride doubles them."""
    dim: int = 512
    """Width of a latent, and of the transformers."""
    strides: tuple[int, ...] = (4, 5, 6, 8)
    """Downsampling of each stage of the encoder, from the samples on; the decoder mirrors it."""
    last_width: int = 3
    """Width of the last convolution."""
    conv_shortcut: bool = False
    """Whether a residual unit's input is added through a convolution, or as it is."""
    lstm_layers: int = 0
    """Recurrent layers at the rate of the latents, in the encoder and in the decoder."""
    padding: str = "constant"
    """What convolutions see beyond the edges: "constant" (zeros), "reflect" or "replicate"."""
    sample_rate: int = 24000
    """Samples per second."""
    downsampling: int = 2
    """Latents in one frame of codes."""
    transformer_layers: int = 8
    """Layers of each transformer."""
    heads: int = 8
    """Attention heads."""
    head_dim: int = 64
    """Width of a head."""
    mlp_dim: int = 2048
    """Width within an MLP."""
    window: int = 250
    """Latents that attention sees, the present one included."""
    rope_theta: float = 10000.0
    """Base of the wavelengths of rotary positions."""
    norm_epsilon: float = 1e-5
    """Added to variances."""
    codebooks: int = 32
    """Levels of both branches together."""
    semantic_codebooks: int = 1
    """Levels of the first branch."""
    codebook_size: int = 2048
    """Codes of each codebook."""
    code_dim: int = 256
    """Width of a code vector."""

    def __post_init__(self):
        super().__post_init__()
        sizes = (self.sample_rate, self.heads, self.head_dim, self.mlp_dim, self.window, self.codebook_size)
        if min(*sizes, self.code_dim) < 1 or self.transformer_layers < 0 or self.downsampling < 2:
            raise UsageError("sample_rate and sizes must be positive, and downsampling at least 2")
        if (
            max(*sizes, self.code_dim, self.downsampling) > 1 << 20
            or max(self.transformer_layers, self.codebooks) > 1024
        ):
            raise UsageError("sizes go up to 2^20, layers and codebooks to 1024")
        if not 1 <= self.semantic_codebooks < self.codebooks or self.head_dim % 2:
            raise UsageError("semantic_codebooks lies in 1 to codebooks - 1, and head_dim is even")
        if not self.rope_theta > 0 or not self.norm_epsilon > 0:
            raise UsageError("rope_theta and norm_epsilon must be positive")

    @property
    def samples_per_frame(self) -> int:
        """Samples that one frame of codes stands for."""
        return self.hop * self.downsampling


class CountedCodebook(Codebook):
    """A codebook kept as training counted it: each vector is a sum over how often it was chosen."""

    def __init__(self, codes: int, dim: int, *, rngs: nnx.Rngs):
        self.sum = CodebookState(jax.random.normal(rngs.params(), (codes, dim)))
        self.count = CodebookState(jnp.ones(codes))

    def codebook(self) -> Float[Array, "codes dim"]:
        """The vectors."""
        return self.sum[...] / self._counts()[:, None]

    def encode(self, latents: Float[Array, "batch frames dim"]) -> Int[Array, "batch frames"]:
        """The nearest code of each latent."""
        # |v|^2 - 2 v z of v = sum / count: to divide all sums first would write the codebook anew in every call.
        rows, counts = latents.reshape(-1, latents.shape[-1]), self._counts()
        product = jnp.einsum("kd,nd->kn", self.sum[...], rows, precision=PRECISION)
        squares = jnp.square(self.sum[...]).sum(-1) / counts
        codes = first_lowest((squares[:, None] - 2 * product) / counts[:, None])
        return codes.reshape(latents.shape[:-1])

    def lookup(self, codes: Int[Array, "batch frames"]) -> Float[Array, "batch frames dim"]:
        """What each code stands for."""
        return self.sum[...][codes] / self._counts()[codes][..., None]

    def _counts(self) -> Float[Array, " codes"]:
        return jnp.maximum(self.count[...], 1e-5)


class ProjectedCodebooks(ResidualCodebooks):
    """Residual codebooks in a projection of the latents."""

    def __init__(self, levels: int, config: MimiConfig, *, rngs: nnx.Rngs):
        super().__init__(CountedCodebook(config.codebook_size, config.code_dim, rngs=rngs) for _ in range(levels))
        self.enter = Conv1d(config.dim, config.code_dim, 1, use_bias=False, rngs=rngs)
        self.leave = Conv1d(config.code_dim, config.dim, 1, use_bias=False, rngs=rngs)

    def encode(self, latents: Float[Array, "batch frames dim"], number: int) -> Int[Array, "batch number frames"]:
        """Codes of the first `number` levels."""
        return super().encode(self.enter(latents), number)

    def lookup(self, codes: Int[Array, "batch number frames"]) -> Float[Array, "batch frames dim"]:
        """What the codes of all levels stand for together."""
        return self.leave(super().lookup(codes))


class MimiNet(nnx.Module):
    """Encoder, two branches of residual codebooks, decoder."""

    def __init__(self, config: MimiConfig, *, rngs: nnx.Rngs):
        self.config = config
        dim, stride = config.dim, config.downsampling
        self.encoder = SEANetEncoder(config, rngs=rngs)
        self.encoder_transformer = _transformer(config, rngs)
        self.down = PaddedConv1d(
            dim, dim, 2 * stride, stride=stride, causal=config.causal, padding="replicate", use_bias=False, rngs=rngs
        )
        self.semantic = ProjectedCodebooks(config.semantic_codebooks, config, rngs=rngs)
        self.acoustic = ProjectedCodebooks(config.codebooks - config.semantic_codebooks, config, rngs=rngs)
        self.up = TrimmedConvTranspose1d(
            dim, dim, 2 * stride, stride=stride, groups=dim, causal=config.causal, use_bias=False, rngs=rngs
        )
        self.decoder_transformer = _transformer(config, rngs)
        self.decoder = SEANetDecoder(config, rngs=rngs)

    def encode(
        self, audio: Float[Array, "batch samples channels"], lengths: Int[Array, " batch"], codebooks: int
    ) -> Int[Array, "batch codebooks frames"]:
        """Codes of the first `codebooks` levels, of which the semantic ones are the first."""
        latents, lengths = self.encoder(silenced(audio, lengths), lengths), -(-lengths // self.config.hop)
        latents = self.down(self.encoder_transformer(latents, lengths), lengths)
        semantic = self.config.semantic_codebooks
        codes = self.semantic.encode(latents, semantic)
        if codebooks == semantic:
            return codes
        return jnp.concatenate([codes, self.acoustic.encode(latents, codebooks - semantic)], 1)

    def decode(
        self, ids: Int[Array, "batch codebooks frames"], frames: Int[Array, " batch"]
    ) -> Float[Array, "batch samples channels"]:
        """Sound of the first `frames` frames of codes; what follows them is undefined."""
        semantic, acoustic = jnp.split(ids, [self.config.semantic_codebooks], 1)
        latents = self.semantic.lookup(semantic)
        if acoustic.shape[1]:
            latents = latents + self.acoustic.lookup(acoustic)
        latents, lengths = self.up(latents, frames), frames * self.config.downsampling
        return self.decoder(self.decoder_transformer(latents, lengths), lengths)


class MimiTokenizer(WaveformTokenizer):
    """Sound [batch, channels, samples] to codes [batch, codebooks, frames] and back; the semantic codes come first."""

    type = "mimi"
    config_class = MimiConfig
    net_class = MimiNet
    encoding = ("encoder", "encoder_transformer", "down")
    decoding = ("up", "decoder_transformer", "decoder")

    def __init__(self, config: MimiConfig, net: MimiNet):
        super().__init__(config, net)
        self.fewest_codebooks = config.semantic_codebooks
        self.first_frames = -(-config.first_latents // config.downsampling)

    @property
    def obstacle(self) -> str | None:
        return None if self.config.causal and not self.config.group_norm else super().obstacle

    @property
    def code_vectors(self) -> tuple[Float[np.ndarray, "codes code_dim"], ...]:
        """The vectors of each level's codes, float32."""
        net = self.net
        return tuple(np.asarray(level.codebook()) for part in (net.semantic, net.acoustic) for level in part.levels)


def _transformer(config: MimiConfig, rngs: nnx.Rngs) -> CausalTransformer:
    return CausalTransformer(
        config.dim,
        config.transformer_layers,
        heads=config.heads,
        head_dim=config.head_dim,
        mlp_dim=config.mlp_dim,
        window=config.window,
        rope_theta=config.rope_theta,
        norm_epsilon=config.norm_epsilon,
        rngs=rngs,
    )
