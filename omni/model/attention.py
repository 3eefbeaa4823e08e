"""Attention over whole sequences, split over a mesh, and over a cache."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from omni.model import splash
from omni.model.config import TransformerConfig
from omni.model.quantized import Held, dequantized, quantized
from omni.sharding import active_mesh, mesh_axes, named_sharding, spread
from omni_tokenizers.errors import UsageError

Heads = Float[Array, "batch length heads head_dim"]
KeyValueHeads = Float[Array, "batch length key_value_heads head_dim"]
Segments = Int[Array, "batch length"]
Largest = Float[Array, "batch length heads"]
Mask = Bool[Array, "#batch 1 length slots"]
Stored = Held  # [rows, key_value_heads, slots, head_dim]
Cache = tuple[Stored, Stored]
HEAD = (-1,)
"""The axis of keys and values whose numbers share a scale in a cache in int8."""
QUERIES = 256
"""Queries of a piece of a prompt that read the same part of the cache."""


def row_order(length: int) -> Int[np.ndarray, " length"] | None:
    """The order in which tokens of a row should stand on the active mesh; None: as they come.

    It is balanced where the mesh splits the length and twice its devices divide it. Else the last device has up to
    twice the mean to look back at, and the others wait for it.
    """
    active = active_mesh()
    if active is None:
        return None
    mesh, rules = active
    count = spread(mesh, named_sharding(("length",), rules, mesh, (length,)).spec[0])
    return None if count == 1 or length % (2 * count) else balanced_order(length, count)


def balanced_order(length: int, count: int) -> Int[np.ndarray, " length"]:
    """Each of `count` devices has the i-th and the i-th but last of twice as many stretches, so that all have as much
    to look back at (context parallelism of Llama 3, arXiv:2407.21783, section 3.3.2)."""
    early, late = np.arange(length, dtype=np.int32).reshape(2, count, -1)
    return np.stack([early, late[::-1]], axis=1).reshape(length)


def gathered(
    x: Shaped[Array, "batch stretch ..."], axes: tuple[str, ...], *, balanced: bool
) -> Shaped[Array, "batch length ..."]:
    """The tokens of whole rows, in their order, of which each device along `axes` has a stretch, or two if `balanced`.

    Inside `jax.shard_map`. What travels back is summed where it belongs.
    """
    if not axes:
        return x
    if not balanced:
        return jax.lax.all_gather(x, axes, axis=1, tiled=True)
    halves = jax.lax.all_gather(x.reshape(x.shape[0], 2, -1, *x.shape[2:]), axes, axis=2)
    return jnp.stack([halves[:, 0], halves[:, 1, ::-1]], axis=1).reshape(x.shape[0], -1, *x.shape[2:])


def attend(
    config: TransformerConfig,
    query: Heads,
    key: KeyValueHeads,
    value: KeyValueHeads,
    segments: Segments,
    order: Int[np.ndarray, " length"] | None = None,
) -> tuple[Heads, Largest | None]:
    """Grouped-query attention by the kernel of `config`: softmax(query key / sqrt(head_dim)) value, softmax in float32.

    Each token sees itself and earlier tokens of its own segment. Padding is segment 0: other tokens never see it, and
    it sees only padding, itself at least, so no row is empty.

    On a mesh every device computes the queries of its own rows, heads and stretch of the length; along the mesh axis
    `context` the keys and values of the whole length are gathered first. The result is that of one device.

    Args:
      order: which token of its row each is, where they stand in the order of `row_order`; None: as they come.

    Returns:
      What the queries read, and the largest score of each; None from "splash", which keeps no scores and has no maximum
      of them to give away.

    Raises:
      UsageError: the kernel cannot run on these devices, or with this shape.
    """
    check_kernel(config)
    places = np.arange(query.shape[1], dtype=np.int32) if order is None else order
    active = active_mesh()
    if active is None:
        return _kernel(config, *_splash(config, query, places))(query, key, value, segments, segments, places)
    mesh, rules = active
    queries = named_sharding(("batch", "length", "heads", None), rules, mesh, query.shape).spec
    if mesh_axes(queries[2]) and key.shape[2] % spread(mesh, queries[2]):
        key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    lengths = mesh_axes(queries[1])

    def local(query, key, value, own, places, *kernel_state):
        key, value, segments = (gathered(x, lengths, balanced=order is not None) for x in (key, value, own))
        return _kernel(config, *kernel_state)(query, key, value, own, segments, places)

    state = _splash(config, query, places, spread(mesh, queries[2]), spread(mesh, queries[1]))
    state_specs = [splash.specs(kernel, mesh, queries[2], queries[1]) for kernel in state]
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(queries, queries, queries, PartitionSpec(*queries[:2]), PartitionSpec(queries[1]), *state_specs),
        out_specs=(queries, None if state else PartitionSpec(*queries[:3])),
        check_vma=config.attention != "splash",  # the kernel does not say how its outputs vary
    )(query, key, value, segments, places, *state)


def check_kernel(config: TransformerConfig) -> None:
    """Raises `UsageError` where the kernel of `config` cannot run: nothing else is taken in its place."""
    if config.attention != "splash":
        return
    active = active_mesh()
    platform = active[0].devices.flat[0].platform if active else jax.default_backend()
    if platform != "tpu":
        raise UsageError(f'attention "splash" runs on TPUs, these devices are {platform}; set model.attention to "xla"')
    if config.head_dim % splash.LANES:
        raise UsageError(
            f'attention "splash" needs a head_dim that is a multiple of {splash.LANES}, not {config.head_dim}; '
            'set model.attention to "xla"'
        )


def _splash(
    config: TransformerConfig,
    query: Heads,
    places: Int[np.ndarray, " length"],
    head_shards: int = 1,
    length_shards: int = 1,
) -> list[splash.Kernel]:
    """The kernel "splash", if it is the one, as arrays that are split over the mesh as queries are."""
    if config.attention != "splash":
        return []
    return [splash.make(query.shape[2], places, config.attention_blocks, head_shards, length_shards)]


def _kernel(config: TransformerConfig, *state: splash.Kernel):
    if state:
        return lambda *arguments: (splash.attend(*state, *arguments), None)
    return partial(attend_in_blocks, block=config.attention_blocks[0])


def attend_in_blocks(
    query: Heads,
    key: KeyValueHeads,
    value: KeyValueHeads,
    own: Segments,
    segments: Segments,
    places: Int[Array, " queries"],
    *,
    block: int,
) -> tuple[Heads, Largest]:
    """Attention of a stretch of queries to the keys of the whole length, at most `block` queries at a time.

    Scores [batch, heads, block, length] of one block exist at once, in the backward pass too, which computes them anew.

    Args:
      own: segments of the queries.
      segments: those of all keys, in order.
      places: which of the keys each query's own is.
    """
    length = query.shape[1]
    count = -(-length // block)
    if count == 1:
        return attend_at_once(query, key, value, segment_mask(own, segments, places))
    size = -(-length // count)
    places = jnp.broadcast_to(places, own.shape)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, count * size - length), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(x.shape[0], count, size, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def one(queries):
        query, own, places = queries
        return attend_at_once(query, key, value, segment_mask(own, segments, places[0]))

    found = jax.lax.map(one, (split(query), split(own), split(places)))
    return tuple(x.swapaxes(0, 1).reshape(x.shape[1], count * size, *x.shape[3:])[:, :length] for x in found)


def attend_at_once(
    query: Float[Array, "batch queries heads head_dim"],
    key: KeyValueHeads,
    value: KeyValueHeads,
    mask: Bool[Array, "batch 1 queries length"],
) -> tuple[Float[Array, "batch queries heads head_dim"], Float[Array, "batch queries heads"]]:
    """What queries read of the keys that they see, and the largest score of each, which the softmax needs anyway.

    Scores are float32, as are the sums of products of bfloat16, forward and backward.
    """
    batch, length, heads, head_dim = query.shape
    precision = jax.lax.DotAlgorithmPreset.BF16_BF16_F32 if query.dtype == jnp.bfloat16 else None
    groups = query.reshape(batch, length, key.shape[2], -1, head_dim)
    product = partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    scores = product("btkgh,bskh->bkgts", groups, key) * head_dim**-0.5
    scores = jnp.where(
        mask[:, None], scores, jnp.finfo(scores.dtype).min / 2
    )  # no infinity: a block's end sees nothing
    largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1))
    shares = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    read = jnp.einsum("bkgts,bskh->btkgh", shares, value).reshape(query.shape)
    return read, largest.transpose(0, 3, 1, 2).reshape(batch, length, heads)


def segment_mask(
    own: Int[Array, "batch queries"], segments: Int[Array, "batch length"], places: Int[Array, " queries"]
) -> Bool[Array, "batch 1 queries length"]:
    """Which key (last axis) each query sees, whose own ones stand at `places`."""
    earlier = jnp.arange(segments.shape[1]) <= places[:, None]
    return (earlier & (own[:, :, None] == segments[:, None, :]))[:, None]


def write_cache(
    cache: Cache,
    key: KeyValueHeads,
    value: KeyValueHeads,
    slots: Int[Array, "rows length"],
    rows: Int[Array, " rows"] | None = None,
) -> Cache:
    """Put token i of each row in its slot of the cache's rows (by default all, in order); rows that do not exist and
    slots beyond the capacity are dropped, never wrapped or clamped."""
    rows = jnp.arange(slots.shape[0]) if rows is None else rows
    if slots.size == 1:  # XLA makes a scatter of one index an update, and copies the whole cache for it
        rows, slots, key, value = (jnp.repeat(x, 2, axis=0) for x in (rows, slots, key, value))

    def put(old: Array, new: Array) -> Array:
        return old.at[rows[:, None], :, slots].set(new.astype(old.dtype), mode="drop")

    def written(old: Stored, new: KeyValueHeads) -> Stored:
        return put(old, new) if isinstance(old, jax.Array) else jax.tree.map(put, old, quantized(new, HEAD))

    return tuple(written(old, new) for old, new in zip(cache, (key, value), strict=True))


def slot_mask(slots: Int[Array, "rows length"], capacity: int) -> Mask:
    """Which cache slot (last axis) each query sees: its own and those before."""
    return (jnp.arange(capacity) <= slots[:, :, None])[:, None]


def attend_slots(
    query: Heads, prefix: Callable[[int], Cache], slots: Int[Array, "rows length"], capacity: int
) -> Heads:
    """`attend` over a cache in which the keys and values of these queries stand already, in consecutive `slots`.

    A piece of a prompt reads little more of the cache than it sees, wherever it begins, in one program: of prefixes,
    each twice as long as the one before, the shortest in which it ends. A single token reads the whole cache, where it
    lies.

    Args:
      prefix: so many of the cache's first slots, of the rows of these queries.
    """
    length = query.shape[1]
    sizes = [length << i for i in range(capacity.bit_length()) if length > 1 and length << i < capacity]

    def read(size: int) -> Heads:
        own = tuple(dequantized(stored).astype(query.dtype) for stored in prefix(size))
        # All end within a prefix, so that its last slots are hidden from all but the last queries; but what goes beyond
        # the capacity ends nowhere.
        ahead = size - length if size < capacity else size
        found = []
        for start in range(0, length, QUERIES):
            some, seen = slice(start, start + QUERIES), ahead + start + QUERIES
            own_slots = tuple(stored[:, :, :seen] for stored in own)
            found.append(_attend_prefix(query[:, some], *own_slots, slots[:, some]))
        return jnp.concatenate(found, axis=1)

    smaller = jnp.max(slots[:, 0]) + length > jnp.array(sizes, jnp.int32)
    return jax.lax.switch(jnp.sum(smaller), [partial(read, size) for size in (*sizes, capacity)])


def _attend_prefix(query: Heads, keys: Array, values: Array, slots: Int[Array, "rows length"]) -> Heads:
    """Queries of the tokens in `slots`, over keys and values [rows, key_value_heads, slots, head_dim].

    This layout makes the queries of a group rows of one matrix product, and keys and values are read where they lie:
    through `dot_product_attention` a cache is transposed for every token, which on a CPU takes longer than the rest of
    the step.
    """
    rows, length, heads, head_dim = query.shape
    groups = keys.shape[1]
    query = query.reshape(rows, length, groups, -1, head_dim).transpose(0, 2, 3, 1, 4)
    share = query.shape[2]
    scores = jnp.einsum(
        "rgqd,rgsd->rgqs", query.reshape(rows, groups, -1, head_dim), keys, preferred_element_type=jnp.float32
    )
    mask = slot_mask(slots, keys.shape[2])
    scores = jnp.where(jnp.tile(mask, (1, 1, share, 1)), scores * head_dim**-0.5, -jnp.inf)
    read = jax.nn.softmax(scores, axis=-1).astype(values.dtype) @ values
    return read.reshape(rows, groups, share, length, head_dim).transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, -1)
