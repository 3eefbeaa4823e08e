"""Masked attention over whole sequences and over a cache."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Heads = Float[Array, "batch length heads head_dim"]
KeyValueHeads = Float[Array, "batch length key_value_heads head_dim"]
Mask = Bool[Array, "#batch 1 length slots"]
Stored = Float[Array, "rows key_value_heads slots head_dim"]
Cache = tuple[Stored, Stored]


def segment_mask(length: int, segments: Int[Array, "batch length"] | None) -> Mask:
    """Which key (last axis) each query sees: itself and earlier tokens of its own segment.

    Padding is segment 0: other tokens never see it and it sees only padding, itself at least, so no row is empty.
    """
    mask = jnp.tril(jnp.ones((length, length), bool))[None, None]
    if segments is None:
        return mask
    return mask & (segments[:, None, :, None] == segments[:, None, None, :])


def attend(query: Heads, key: KeyValueHeads, value: KeyValueHeads, mask: Mask) -> Heads:
    """Grouped-query attention: softmax(query key / sqrt(head_dim)) value, softmax in float32."""
    return jax.nn.dot_product_attention(query, key, value, mask=mask)


def write_cache(cache: Cache, key: KeyValueHeads, value: KeyValueHeads, slots: Int[Array, "rows length"]) -> Cache:
    """Put token i of each row in its slot; slots beyond the capacity are dropped, never wrapped or clamped."""
    rows = jnp.arange(slots.shape[0])[:, None]
    return tuple(
        old.at[rows, :, slots].set(new.astype(old.dtype), mode="drop")
        for old, new in zip(cache, (key, value), strict=True)
    )


def slot_mask(slots: Int[Array, "rows length"], capacity: int) -> Mask:
    """Which cache slot (last axis) each query sees: its own and those before."""
    return (jnp.arange(capacity) <= slots[:, :, None])[:, None]


def attend_slots(query: Heads, cache: Cache, mask: Mask) -> Heads:
    """`attend` over a cache, whose layout makes the queries of a group rows of one matrix product.

    The cache is read where it lies: through `dot_product_attention` it is transposed for every token, which on a CPU
    takes longer than the rest of the step.
    """
    keys, values = (stored.astype(query.dtype) for stored in cache)
    rows, length, heads, head_dim = query.shape
    groups = keys.shape[1]
    query = query.reshape(rows, length, groups, -1, head_dim).transpose(0, 2, 3, 1, 4)
    share = query.shape[2]
    scores = jnp.einsum(
        "rgqd,rgsd->rgqs", query.reshape(rows, groups, -1, head_dim), keys, preferred_element_type=jnp.float32
    )
    scores = jnp.where(jnp.tile(mask, (1, 1, share, 1)), scores * head_dim**-0.5, -jnp.inf)
    read = jax.nn.softmax(scores, axis=-1).astype(values.dtype) @ values
    return read.reshape(rows, groups, share, length, head_dim).transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, -1)
