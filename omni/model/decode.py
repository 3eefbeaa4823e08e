"""Cached decoding over unstacked weights.

A scan over stacked weights copies each layer's slice for every token; here each layer's weights stand alone.
"""

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, DTypeLike, Float, Int

from omni.model import experts
from omni.model.attention import Cache, Heads, KeyValueHeads, Mask, attend_slots, slot_mask, write_cache
from omni.model.config import TransformerConfig
from omni.model.positions import rotation
from omni.model.transformer import Stream, Transformer, Weights, block, embed, project, rms_norm
from omni.sharding import ShardingRules, constrain, named_sharding

CACHE_AXES = ("batch", "key_value_heads", None, "head_dim")
"""Logical axes of keys and values in a cache."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Decoder:
    """A transformer's weights for decoding: a pytree of arrays, with its configuration as static data."""

    config: TransformerConfig = field(metadata={"static": True})
    embedding: Float[Array, "vocabulary dim"]
    layers: list[Weights]
    norm: Float[Array, " dim"]
    head: Float[Array, "vocabulary dim"]


def make_decoder(model: Transformer) -> Decoder:
    """Unstack the weights, cast to the compute type once; norms and routers stay float32."""
    config = model.config
    head = model.output_weights().astype(config.compute_dtype)
    embedding = head if config.tied_embeddings else model.embedding[...].astype(config.compute_dtype)
    stacked = {
        name: weight if "norm" in name or name == "router" else weight.astype(config.compute_dtype)
        for name, weight in model.blocks.weights().items()
    }
    layers = [{name: weight[layer] for name, weight in stacked.items()} for layer in range(config.depth)]
    return Decoder(config, embedding, layers, model.norm[...], head)


def decoder_on(mesh: Mesh, rules: ShardingRules, model: Transformer) -> Decoder:
    """`make_decoder` with each weight laid out on a mesh by its logical axes.

    Of shapes in place of arrays it makes shapes, with their shardings.
    """
    graphdef, state = nnx.split(model)

    def unstack(state: nnx.State) -> Decoder:
        return make_decoder(nnx.merge(graphdef, state))

    shapes = jax.eval_shape(unstack, state)
    shardings = jax.tree.map(
        lambda x, axes: named_sharding(axes.names, rules, mesh, x.shape), shapes, _decoder_axes(model)
    )
    if isinstance(jax.tree.leaves(state)[0], jax.ShapeDtypeStruct):
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return jax.jit(unstack, out_shardings=shardings)(state)


@dataclass(frozen=True)
class _Axes:
    """A leaf: the logical axes of an array."""

    names: tuple[str | None, ...]


def _decoder_axes(model: Transformer) -> Decoder:
    """The logical axes in the place of each array of a decoder."""

    def axes(parameter: nnx.Param) -> tuple[str | None, ...]:
        return parameter.get_metadata()["axes"]

    blocks = {name: value for name, value in vars(model.blocks).items() if isinstance(value, nnx.Param)}
    layer = {name: _Axes(axes(parameter)[1:]) for name, parameter in blocks.items()}
    table = _Axes(axes(model.embedding))
    return Decoder(model.config, table, [layer] * model.config.depth, _Axes(axes(model.norm)), table)


def init_cache(config: TransformerConfig, rows: int, capacity: int, dtype: DTypeLike | None = None) -> list[Cache]:
    """An empty cache: per layer, keys and values of zeros [rows, key_value_heads, capacity, head_dim].

    `dtype` is the compute type unless given.
    """
    shape = (rows, config.key_value_heads, capacity, config.head_dim)

    def empty() -> Array:
        return constrain(jnp.zeros(shape, dtype or config.compute_dtype), *CACHE_AXES)

    return [(empty(), empty()) for _ in range(config.depth)]


def apply_decoder(
    decoder: Decoder,
    ids: Int[Array, "rows length"],
    positions: Int[Array, "rows length 3"],
    slots: Int[Array, " rows"],
    cache: list[Cache],
    last: Int[Array, " rows"] | None = None,
) -> tuple[Float[Array, "rows length_or_1 vocabulary"], list[Cache]]:
    """Logits, float32, for the token after each of `ids`, and the cache with these tokens in it.

    Arguments as of `decoder_stream`; with `last`, logits [rows, 1, vocabulary].
    """
    x, cache = decoder_stream(decoder, ids, positions, slots, cache, last)
    return project(x, decoder.head), cache


def decoder_stream(
    decoder: Decoder,
    ids: Int[Array, "rows length"],
    positions: Int[Array, "rows length 3"],
    slots: Int[Array, " rows"],
    cache: list[Cache],
    last: Int[Array, " rows"] | None = None,
    cache_rows: Int[Array, " rows"] | None = None,
) -> tuple[Stream, list[Cache]]:
    """The stream after its final norm, whose products with the head are logits, and the cache with these tokens in it.

    Token i of row r goes to slot slots[r] + i and sees slots 0 .. slots[r] + i. A right-padded prompt is a call with
    slots 0: what padding leaves in the cache lies in later slots, which later tokens overwrite before they see them.
    With `last`, the stream of token last[r] of each row alone: [rows, 1, dim]. With `cache_rows`, row r is that row of
    the cache, of which the others stay as they are; one that does not exist leaves nothing.
    """
    config = decoder.config
    by = rotation(config, positions)
    slots = slots[:, None] + jnp.arange(ids.shape[1])
    mask = slot_mask(slots, cache[0][0].shape[2])
    x, tokens = embed(config, decoder.embedding, ids), experts.routing(config, ids)
    new_cache = []
    for weights, layer_cache in zip(decoder.layers, cache, strict=True):
        attend = partial(attend_cache, layer_cache, slots, mask, cache_rows)
        x, layer_cache, _ = block(config, weights, x, by, attend, tokens=tokens)
        new_cache.append(layer_cache)
    if last is not None:
        x = jnp.take_along_axis(x, last[:, None, None], axis=1)
    return rms_norm(x, decoder.norm, config.norm_epsilon), new_cache


def attend_cache(
    cache: Cache,
    slots: Int[Array, "rows length"],
    mask: Mask,
    rows: Int[Array, " rows"] | None,
    query: Heads,
    key: KeyValueHeads,
    value: KeyValueHeads,
) -> tuple[Heads, Cache]:
    """Write keys and values into their slots, then attend to all slots that the mask shows."""
    cache = tuple(constrain(stored, *CACHE_AXES) for stored in write_cache(cache, key, value, slots, rows))
    own = cache if rows is None else tuple(constrain(stored[rows], *CACHE_AXES) for stored in cache)
    return attend_slots(query, own, mask), cache
