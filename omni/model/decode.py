"""Cached decoding over unstacked weights.

A scan over stacked weights copies each layer's slice for every token; here each layer's weights stand alone.
"""

from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, DTypeLike, Float, Int

from omni.model import experts
from omni.model.attention import HEAD, Cache, Heads, KeyValueHeads, Stored, attend_slots, write_cache
from omni.model.code_nets import CodeHead
from omni.model.config import TransformerConfig
from omni.model.norms import rms_norm
from omni.model.positions import rotation
from omni.model.quantized import Held, dequantized, quantized
from omni.model.transformer import Stream, Transformer, block, embed, project, with_features
from omni.sharding import ShardingRules, constrain, named_sharding

CACHE_AXES = ("batch", "key_value_heads", None, "head_dim")
"""Logical axes of keys and values in a cache."""
SUMMED = {
    **dict.fromkeys(("query", "key", "value"), (-3,)),
    "output": (-3, -2),
    **dict.fromkeys(("gate", "up", "down"), (-2,)),
    "head": (-1,),
}
"""Axes of each matrix over which its product sums; in int8, each place of the others, an output, has a scale."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Decoder:
    """A transformer's weights for decoding: a pytree of arrays, with its configuration as static data.

    Matrices of layers and the head may be held in int8 (`omni.model.quantized`)."""

    config: TransformerConfig = field(metadata={"static": True})
    embedding: Float[Array, "vocabulary dim"]
    layers: list[dict[str, Held]]
    norm: Float[Array, " dim"]
    head: Held
    codes: CodeHead | None = None
    """The head of codes, whose ids follow those of `head`; None where it has all ids."""


def make_decoder(model: Transformer, dtype: str | None = None) -> Decoder:
    """Unstack the weights, cast once to `dtype`, which is the compute type unless given; norms and routers stay
    float32.

    In "int8" each output of a matrix has a scale, and the embedding stays in the compute type; a tied head is then an
    array of its own.
    """
    config = model.config
    if dtype == "int8":
        return _int8_decoder(model)
    dtype = dtype or config.compute_dtype
    head = model.output_weights().astype(dtype)
    shared = config.tied_embeddings and not config.code_nets
    embedding = head if shared else model.input_weights().astype(dtype)
    stacked = {
        name: weight if "norm" in name or name == "router" else weight.astype(dtype)
        for name, weight in model.blocks.weights().items()
    }
    layers = [{name: weight[layer] for name, weight in stacked.items()} for layer in range(config.depth)]
    codes = jax.tree.map(lambda x: x.astype(dtype), model.code_head())
    return Decoder(config, embedding, layers, model.norm[...], head, codes)


def _int8_decoder(model: Transformer) -> Decoder:
    """Matrix by matrix, so that no more than one is there as floats besides the model's own."""
    config, stacked = model.config, model.blocks.weights()

    def held(name: str, weight: Array) -> Held:
        return _int8_matrix(weight, SUMMED[name]) if name in SUMMED else weight

    layers = [{name: held(name, weight[layer]) for name, weight in stacked.items()} for layer in range(config.depth)]
    embedding, codes = model.input_weights().astype(config.compute_dtype), model.code_head()
    if codes is not None:
        codes = replace(codes, hidden=held("head", codes.hidden), rows=held("head", codes.rows))
    return Decoder(config, embedding, layers, model.norm[...], held("head", model.output_weights()), codes)


_int8_matrix = jax.jit(quantized, static_argnums=1)


def decoder_on(mesh: Mesh, rules: ShardingRules, model: Transformer, dtype: str | None = None) -> Decoder:
    """`make_decoder` with each weight laid out on a mesh by its logical axes; scales lie with their outputs.

    Of shapes in place of arrays it makes shapes, with their shardings.
    """
    graphdef, state = nnx.split(model)

    def unstack(state: nnx.State) -> Decoder:
        return make_decoder(nnx.merge(graphdef, state), dtype)

    def place(axes: _Axes, held: Held) -> Held:
        return jax.tree.map(lambda x: named_sharding(axes.names, rules, mesh, x.shape), held)

    shapes = jax.eval_shape(unstack, state)
    shardings = jax.tree.map(place, _decoder_axes(model), shapes)
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
    table, codes = _Axes(axes(model.embedding)), None
    if model.config.code_nets:
        nets = model.codes
        codes = CodeHead(*(_Axes(axes(each)) for each in (nets.hidden, nets.hidden_bias, nets.head, nets.head_bias)))
    return Decoder(model.config, table, [layer] * model.config.depth, _Axes(axes(model.norm)), table, codes)


def init_cache(config: TransformerConfig, rows: int, capacity: int, dtype: DTypeLike | None = None) -> list[Cache]:
    """An empty cache: per layer, keys and values of zeros [rows, key_value_heads, capacity, head_dim].

    `dtype` is the compute type unless given; "int8": each head of each slot has a scale.
    """
    shape = (rows, config.key_value_heads, capacity, config.head_dim)
    held = jax.ShapeDtypeStruct(shape, jnp.float32 if dtype == "int8" else dtype or config.compute_dtype)
    held = jax.eval_shape(partial(quantized, shared=HEAD), held) if dtype == "int8" else held

    def empty() -> Stored:
        return jax.tree.map(lambda x: _laid_out(jnp.zeros(x.shape, x.dtype)), held)

    return [(empty(), empty()) for _ in range(config.depth)]


def _laid_out(stored: Array) -> Array:
    """Numbers or scales of a cache, by their logical axes."""
    return constrain(stored, *CACHE_AXES)


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
    return project(x, dequantized(decoder.head), decoder.codes), cache


def decoder_stream(
    decoder: Decoder,
    ids: Int[Array, "rows length"],
    positions: Int[Array, "rows length 3"],
    slots: Int[Array, " rows"],
    cache: list[Cache],
    last: Int[Array, " rows"] | None = None,
    cache_rows: Int[Array, " rows"] | None = None,
    features: Float[Array, "rows length dim"] | None = None,
) -> tuple[Stream, list[Cache]]:
    """The stream after its final norm, whose products with the head are logits, and the cache with these tokens in it.

    Token i of row r goes to slot slots[r] + i and sees slots 0 .. slots[r] + i. A right-padded prompt is a call with
    slots 0: what padding leaves in the cache lies in later slots, which later tokens overwrite before they see them.
    With `last`, the stream of token last[r] of each row alone: [rows, 1, dim]. With `cache_rows`, row r is that row of
    the cache, of which the others stay as they are; one that does not exist leaves nothing. Where ids are negative,
    `features` stand in the place of embeddings.
    """
    config = decoder.config
    # XLA deems cosines cheap and computes them anew in each loop that they fuse into, for every head of every layer.
    # One array that comes through a barrier is kept; two would be fused again once the barrier is taken away.
    by = tuple(jax.lax.optimization_barrier(jnp.stack(rotation(config, positions))))
    slots = slots[:, None] + jnp.arange(ids.shape[1])
    embedded = ids if features is None else jnp.maximum(ids, 0)
    x, tokens = embed(config, decoder.embedding, embedded), experts.routing(config, embedded)
    if features is not None:
        x = with_features(x, ids, features)
    new_cache = []
    for weights, layer_cache in zip(decoder.layers, cache, strict=True):
        attend = partial(attend_cache, layer_cache, slots, cache_rows)
        weights = {name: dequantized(weight) for name, weight in weights.items()}
        x, layer_cache, _ = block(config, weights, x, by, attend, tokens=tokens)
        new_cache.append(layer_cache)
    if last is not None:
        x = jnp.take_along_axis(x, last[:, None, None], axis=1)
    return rms_norm(x, decoder.norm, config.norm_epsilon), new_cache


def attend_cache(
    cache: Cache,
    slots: Int[Array, "rows length"],
    rows: Int[Array, " rows"] | None,
    query: Heads,
    key: KeyValueHeads,
    value: KeyValueHeads,
) -> tuple[Heads, Cache]:
    """Write keys and values into their slots, then attend to these and all before them."""
    cache = jax.tree.map(_laid_out, write_cache(cache, key, value, slots, rows))

    def prefix(size: int) -> Cache:
        own = slice(None) if rows is None else rows
        return jax.tree.map(lambda stored: _laid_out(stored[:, :, :size][own]), cache)

    return attend_slots(query, prefix, slots, cache[0].shape[2]), cache
