"""MusicGen's decoder: sound from what a text encoder made of a description (Copet et al. 2023, arXiv:2306.05284).

Not one of the early-fusion models of this package: codebooks are parallel, each later by a frame than the one before
(the delay pattern), and the description comes by cross-attention to states that the caller gives.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Bool, Float, Int

from omni.generate.sampling import sample
from omni.model.norms import layer_norm
from omni.parts import Audio
from omni_tokenizers.base import NetTokenizer
from omni_tokenizers.errors import OmniError, UsageError

Layer = dict[str, Array]
Cache = list[tuple[Array, Array]]
_EPSILON = 1e-5  # of norms
_HIDDEN = -1e30  # a score that no softmax shows; where all are so low, all count the same


@dataclasses.dataclass(frozen=True)
class MusicConfig:
    """The decoder's shape."""

    codes: int = 2048
    """Of each codebook."""
    codebooks: int = 4
    channels: int = 1
    """2: left and right take turns among the codebooks, and each pair of them has one delay."""
    depth: int = 24
    dim: int = 1024
    heads: int = 16
    mlp_dim: int = 4096

    @property
    def delays(self) -> Int[np.ndarray, " codebooks"]:
        """Frames by which each codebook comes later."""
        return np.arange(self.codebooks) // self.channels

    def __post_init__(self) -> None:
        if min(dataclasses.astuple(self)) < 1 or self.channels > 2 or self.codebooks % self.channels:
            raise OmniError(f"{self}: sizes must be at least 1, channels 1 or 2, and codebooks the same for each")
        if self.dim % self.heads or self.dim % 2 or self.dim < 4:
            raise OmniError(f"a width of {self.dim} must be even, at least 4, and a multiple of {self.heads} heads")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["embedding", "layers", "norm", "norm_bias", "heads", "projection", "projection_bias"],
    meta_fields=["config"],
)
@dataclasses.dataclass(frozen=True)
class MusicDecoder:
    """The weights; matrices are [inputs, outputs]."""

    config: MusicConfig
    embedding: Float[Array, "codebooks codes_and_start dim"]
    layers: list[Layer]
    norm: Float[Array, " dim"]
    norm_bias: Float[Array, " dim"]
    heads: Float[Array, "codebooks dim codes"]
    projection: Float[Array, "states dim"] | None
    """Of given states into the decoder's width; None where they have it."""
    projection_bias: Float[Array, " dim"] | None


class MusicGen:
    """A decoder with its codec.

    Attributes:
      decoder: the weights.
      codec: what turns codes into sound; None where none lies with the decoder.
    """

    def __init__(self, decoder: MusicDecoder, codec: NetTokenizer | None = None):
        self.decoder, self.codec = decoder, codec

    @classmethod
    def load(cls, directory: epath.PathLike) -> MusicGen:
        """Reads a directory of transformers with a whole MusicGen, or its decoder alone (`MusicgenForCausalLM`).

        Raises:
          OmniError: another model, settings that are not supported, or files that are missing or damaged.
        """
        from omni.interop import musicgen

        return cls(*musicgen.load(directory))

    def export(self, directory: epath.PathLike) -> None:
        """Writes the decoder as a directory that transformers loads as `MusicgenForCausalLM`.

        Raises:
          OmniError: a decoder that projects its states, which that class does not.
        """
        from omni.interop import musicgen

        musicgen.export(self.decoder, directory)

    @property
    def config(self) -> MusicConfig:
        """The decoder's shape."""
        return self.decoder.config

    def __repr__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.decoder))
        return f"MusicGen({self.config.codebooks} x {self.config.codes} codes; {count / 1e6:.1f} million parameters)"

    def logits(
        self,
        codes: Int[np.ndarray, "batch codebooks length"],
        states: Float[np.ndarray, "batch source width"],
        mask: Bool[np.ndarray, "batch source"] | None = None,
    ) -> Float[np.ndarray, "batch codebooks length codes"]:
        """Float32 logits for what comes after each place of delayed codes, of which `config.codes` is the start.

        Raises:
          UsageError: of another shape, or codes that there are not.
        """
        codes = np.asarray(codes)
        inside = codes.size and codes.dtype.kind in "iu" and codes.min() >= 0 and codes.max() <= self.config.codes
        if codes.ndim != 3 or codes.shape[1] != self.config.codebooks or not inside:
            wanted = f"[batch, {self.config.codebooks}, length] in 0..{self.config.codes}"
            raise UsageError(f"logits takes integer codes {wanted}, got {codes.dtype} {list(codes.shape)}")
        states, mask = self._checked(states, mask)
        if len(states) != len(codes):
            raise UsageError(f"there are {len(codes)} rows of codes and {len(states)} of states")
        return np.asarray(_logits(self.decoder, jnp.asarray(codes, jnp.int32), states, mask))

    def codes(
        self,
        states: Float[np.ndarray, "batch source width"],
        mask: Bool[np.ndarray, "batch source"] | None = None,
        *,
        frames: int,
        guidance: float = 3.0,
        temperature: float = 1.0,
        top_k: int = 250,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Int[np.ndarray, "batch codebooks frames"]:
        """Codes of sounds, one for each row of states.

        Args:
          states: of a text encoder, which for published models is T5's last hidden state.
          mask: which of them count; all by default. A row without any is a sound without a description.
          frames: how many of each codebook; published models have 50 a second, and were trained on 30 seconds.
          guidance: logits are pushed away from those without description (Ho and Salimans 2022, arXiv:2207.12598);
            1 leaves them.
          temperature, top_k, top_p: as of `omni.generate.sampling.sample`; the defaults are MusicGen's.
          seed: of the first row; each row behind it has the next number, so that it is what it would be alone.

        Raises:
          UsageError: a wrong argument.
        """
        states, mask = self._checked(states, mask)
        if type(frames) is not int or frames < 1:
            raise UsageError(f"frames is a whole number of at least 1, not {frames!r}")
        if type(top_k) is not int or top_k < 0 or not 0 < top_p <= 1:
            raise UsageError(f"top_k is a whole number, 0 for all, and top_p above 0 to 1; got {top_k!r}, {top_p!r}")
        if type(seed) is not int or not 0 <= seed < 1 << 32:
            raise UsageError(f"seed is a whole number from 0 below 2^32, not {seed!r}")
        if not (0 <= guidance < math.inf and 0 <= temperature < math.inf):
            raise UsageError(f"guidance and temperature are at least 0, not {guidance!r} and {temperature!r}")
        if guided := guidance != 1:
            states = jnp.concatenate([states, jnp.zeros_like(states)])
            mask = jnp.concatenate([mask, jnp.zeros_like(mask)])
        settings = jnp.float32(guidance), jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p)
        return np.asarray(_generate(self.decoder, states, mask, frames, guided, jnp.uint32(seed), *settings))

    def generate(
        self,
        states: Float[np.ndarray, "batch source width"],
        mask: Bool[np.ndarray, "batch source"] | None = None,
        *,
        seconds: float,
        **settings: Any,
    ) -> list[Audio]:
        """Sounds of so many seconds, rounded up to whole frames; `settings` are those of `codes`.

        Raises:
          UsageError: a wrong argument.
          OmniError: no codec lies with the decoder.
        """
        if self.codec is None:
            raise OmniError("this MusicGen came without its codec, audio_encoder: call codes, and decode them with one")
        if not 0 < seconds < math.inf:
            raise UsageError(f"seconds is a time above 0, not {seconds!r}")
        # Rounded first: 8.06 s are 403 frames of 20 ms, and no 404th for what floats leave behind the point.
        frames = math.ceil(round(seconds * self.codec.sample_rate / self.codec.samples_per_frame, 6))
        codes = self.codes(states, mask, frames=frames, **settings)
        sides = [self.codec.decode(codes[:, side :: self.config.channels]) for side in range(self.config.channels)]
        return [Audio(sound, self.codec.sample_rate) for sound in np.concatenate(sides, axis=1)]

    def _checked(self, states: Any, mask: Any) -> tuple[Array, Array]:
        """States and mask as arrays that belong together; `UsageError` where they do not."""
        states, projection = np.asarray(states), self.decoder.projection
        width = self.config.dim if projection is None else len(projection)
        if states.ndim != 3 or states.shape[-1] != width or states.dtype.kind != "f" or not states.size:
            raise UsageError(f"states are floats [batch, source, {width}], got {states.dtype} {list(states.shape)}")
        if not np.isfinite(states).all():
            raise UsageError("states hold values that are not finite")
        mask = np.ones(states.shape[:2], bool) if mask is None else np.asarray(mask)
        if mask.shape != states.shape[:2] or mask.dtype.kind not in "biu":
            wanted, got = f"bool {list(states.shape[:2])} as states are", f"{mask.dtype} {list(mask.shape)}"
            raise UsageError(f"mask is [batch, source], {wanted}, got {got}")
        return jnp.asarray(states, jnp.float32), jnp.asarray(mask.astype(bool))


@jax.jit
def _logits(decoder: MusicDecoder, codes: Array, states: Array, mask: Array) -> Array:
    length = codes.shape[2]
    source = read_source(decoder, states, mask)
    cache = init_cache(decoder.config, len(codes), length)
    return step(decoder, codes, jnp.int32(0), source, mask, cache)[0]


@partial(jax.jit, static_argnames=("frames", "guided"))
def _generate(
    decoder: MusicDecoder, states, mask, frames: int, guided: bool, seed, guidance, temperature, top_k, top_p
) -> Int[Array, "batch codebooks frames"]:
    """Codes without delays. Where it is `guided`, the second half of the rows has no description and gives no codes."""
    config, rows = decoder.config, len(states)
    batch, delays = rows // (1 + guided), jnp.asarray(config.delays)
    length = frames + int(config.delays.max()) + 1
    source = read_source(decoder, states, mask)
    keys = jax.vmap(jax.random.key)(seed + jnp.arange(batch))

    def one(place: Array, carried: tuple[Array, Cache]) -> tuple[Array, Cache]:
        """The codes at a place from those before it."""
        codes, cache = carried
        before = jax.lax.dynamic_slice_in_dim(codes, place - 1, 1, axis=2)
        logits, cache = step(decoder, jnp.tile(before, (1 + guided, 1, 1)), place - 1, source, mask, cache)
        logits = logits[:, :, 0]
        if guided:
            described, without = logits[:batch], logits[batch:]
            logits = without + guidance * (described - without)
        flat = logits.reshape(-1, config.codes)
        each = partial(jnp.full, len(flat))
        own = jax.vmap(partial(jax.random.fold_in, data=place))(keys)
        own = jax.vmap(partial(jax.random.split, num=config.codebooks))(own).reshape(-1)
        settings = each(temperature), each(top_k), each(top_p), each(0.0)
        drawn, _ = sample(flat, jnp.ones_like(flat, bool), own, *settings)
        known = (place > delays) & (place <= delays + frames)
        new = jnp.where(known, drawn.reshape(batch, -1), config.codes)
        return jax.lax.dynamic_update_index_in_dim(codes, new, place, axis=2), cache

    codes = jnp.full((batch, config.codebooks, length), config.codes, jnp.int32)
    codes, _ = jax.lax.fori_loop(1, length, one, (codes, init_cache(config, rows, length)))
    places = delays[:, None] + 1 + jnp.arange(frames)
    return jnp.take_along_axis(codes, places[None], axis=2)


def read_source(decoder: MusicDecoder, states: Array, mask: Array) -> Cache:
    """Keys and values of the given states, of each layer: [batch, heads, source, head_dim]."""
    if decoder.projection is not None:
        states = states @ decoder.projection + decoder.projection_bias
    states = states * mask[..., None]
    heads = decoder.config.heads
    return [
        (_split(states @ layer["source_key"], heads), _split(states @ layer["source_value"], heads))
        for layer in decoder.layers
    ]


def init_cache(config: MusicConfig, rows: int, capacity: int) -> Cache:
    """Room for keys and values of so many places."""
    empty = jnp.zeros((rows, config.heads, capacity, config.dim // config.heads))
    return [(empty, empty)] * config.depth


def step(
    decoder: MusicDecoder,
    codes: Int[Array, "batch codebooks length"],
    start: Int[Array, ""],
    source: Cache,
    mask: Bool[Array, "batch source"],
    cache: Cache,
) -> tuple[Float[Array, "batch codebooks length codes"], Cache]:
    """Logits after each of `codes`, the first of which stands at the place `start`, and the cache with them in it."""
    places = start + jnp.arange(codes.shape[2])
    x = jax.vmap(lambda table, ids: table[ids], in_axes=(0, 1))(decoder.embedding, codes).sum(0)
    x = x + sinusoids(places, decoder.config.dim)
    seen = jnp.arange(cache[0][0].shape[2]) <= places[:, None]
    after = []
    for layer, own, given in zip(decoder.layers, cache, source, strict=True):
        x, own = block(decoder.config, layer, x, start, own, seen, given, mask)
        after.append(own)
    x = layer_norm(x, decoder.norm, decoder.norm_bias, _EPSILON)
    return jnp.einsum("bld,kdv->bklv", x, decoder.heads), after


def block(
    config: MusicConfig,
    weights: Layer,
    x: Float[Array, "batch length dim"],
    start: Int[Array, ""],
    cache: tuple[Array, Array],
    seen: Bool[Array, "length capacity"],
    source: tuple[Array, Array],
    mask: Bool[Array, "batch source"],
) -> tuple[Float[Array, "batch length dim"], tuple[Array, Array]]:
    """Attention to what came before, attention to the given states, and two layers with GELU between them; each after a
    norm, and added to the stream."""
    h = layer_norm(x, weights["norm"], weights["norm_bias"], _EPSILON)
    query, key, value = (_split(h @ weights[name], config.heads) for name in ("query", "key", "value"))
    cache = tuple(
        jax.lax.dynamic_update_slice_in_dim(stored, new, start, axis=2)
        for stored, new in zip(cache, (key, value), strict=True)
    )
    x = x + attend(query, *cache, seen[None, None]) @ weights["output"]
    h = layer_norm(x, weights["source_norm"], weights["source_norm_bias"], _EPSILON)
    query = _split(h @ weights["source_query"], config.heads)
    x = x + attend(query, *source, mask[:, None, None]) @ weights["source_output"]
    h = layer_norm(x, weights["mlp_norm"], weights["mlp_norm_bias"], _EPSILON)
    return x + jax.nn.gelu(h @ weights["up"], approximate=False) @ weights["down"], cache


def attend(
    query: Float[Array, "batch heads length head_dim"],
    key: Float[Array, "batch heads places head_dim"],
    value: Float[Array, "batch heads places head_dim"],
    shown: Bool[Array, "#batch 1 #length places"],
) -> Float[Array, "batch length dim"]:
    """What each query reads of the places that it is shown, heads side by side."""
    scores = jnp.einsum("bhqd,bhkd->bhqk", query, key) * query.shape[-1] ** -0.5
    read = jnp.einsum("bhqk,bhkd->bqhd", jax.nn.softmax(jnp.where(shown, scores, _HIDDEN)), value)
    return read.reshape(*read.shape[:2], -1)


def _split(x: Float[Array, "batch length dim"], heads: int) -> Float[Array, "batch heads length head_dim"]:
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def sinusoids(places: Int[Array, " length"], dim: int) -> Float[Array, "length dim"]:
    """Positions as cosines and sines, cosines first (tensor2tensor's form of Vaswani et al. 2017, section 3.5)."""
    half = dim // 2
    angles = places[:, None] * jnp.exp(jnp.arange(half) * (-math.log(10_000) / (half - 1)))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
