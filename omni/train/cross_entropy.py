"""Cross-entropy without the logits of the whole batch: of a few tokens at a time, the vocabulary split over a mesh."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from omni.model.code_nets import CodeHead
from omni.sharding import active_mesh, mesh_axes, named_sharding


@partial(jax.tree_util.register_dataclass, data_fields=["cross_entropy", "log_denominator", "correct"], meta_fields=[])
@dataclass(frozen=True)
class TokenLosses:
    """What the output head finds for each token."""

    cross_entropy: Float[Array, "batch length"]
    """In nats."""
    log_denominator: Float[Array, "batch length"]
    """Log of the softmax's denominator."""
    correct: Bool[Array, "batch length"]
    """Whether no other id is likelier."""


def token_losses(
    features: Float[Array, "batch length dim"],
    head: Float[Array, "embedded dim"],
    ids: Int[Array, "batch length"],
    codes: CodeHead | None = None,
    *,
    chunk: int,
) -> TokenLosses:
    """The losses of predicting `ids` from the transformer's features.

    Logits [batch, chunk, vocabulary] exist for `chunk` tokens of each row at once, on each device for its own stretch
    of rows, length and vocabulary; the backward pass computes them anew. The head is gathered once, and its gradient
    is summed over devices once. Of `codes`, the head of the ids behind those of `head`, each device has all.
    """
    active = active_mesh()
    if active is None:
        return TokenLosses(*_in_chunks(features, head, ids, codes, chunk, ()))
    mesh, rules = active
    axes = (("batch", "length", None), ("vocabulary", None), ("batch", "length"))
    shapes = (features.shape, head.shape, ids.shape)
    specs = [named_sharding(names, rules, mesh, shape).spec for names, shape in zip(axes, shapes, strict=True)]
    local = partial(_in_chunks, chunk=chunk, vocabulary=mesh_axes(specs[1][0]))
    whole = jax.tree.map(lambda x: PartitionSpec(), codes)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(*specs, whole), out_specs=(specs[2],) * 3)
    return TokenLosses(*mapped(features, head, ids, codes))


def _in_chunks(
    features: Array, head: Array, ids: Array, codes: CodeHead | None, chunk: int, vocabulary: tuple[str, ...]
):
    """`_losses` of `chunk` tokens of each row after another."""
    batch, length = ids.shape
    count = -(-length // chunk)
    head = head.astype(features.dtype)
    if count == 1:
        return _losses(features, head, ids, codes, vocabulary)
    size = -(-length // count)

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, count * size - length), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(batch, count, size, *x.shape[2:]).swapaxes(0, 1)

    one = jax.checkpoint(lambda chunk: _losses(chunk[0], head, chunk[1], codes, vocabulary))
    found = jax.lax.map(one, (split(features), split(ids)))
    return tuple(x.swapaxes(0, 1).reshape(batch, -1)[:, :length] for x in found)


def _losses(features: Array, head: Array, ids: Array, codes: CodeHead | None, vocabulary: tuple[str, ...]):
    """Cross-entropy, log of the denominator and whether the id is the likeliest, from a device's part of the head."""
    logits = jnp.einsum("bld,vd->blv", features, head, preferred_element_type=jnp.float32)
    first, largest = 0, jnp.max(jax.lax.stop_gradient(logits), axis=-1)
    if vocabulary:
        first = jax.lax.axis_index(vocabulary) * len(head)
        largest = jax.lax.pmax(largest, vocabulary)
    denominator = jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1)
    here = jnp.arange(len(head)) == (ids - first)[..., None]
    chosen = jnp.sum(jnp.where(here, logits, 0), axis=-1)
    if vocabulary:
        denominator, chosen = jax.lax.psum((denominator, chosen), vocabulary)
    if codes is not None:
        embedded = len(head) * (jax.lax.axis_size(vocabulary) if vocabulary else 1)
        more = codes.logits(features)
        before, largest = largest, jnp.maximum(largest, jnp.max(jax.lax.stop_gradient(more), axis=-1))
        denominator = denominator * jnp.exp(before - largest) + jnp.sum(jnp.exp(more - largest[..., None]), axis=-1)
        here = jnp.arange(more.shape[-1]) == (ids - embedded)[..., None]
        chosen += jnp.sum(jnp.where(here, more, 0), axis=-1)
    log_denominator = jnp.log(denominator) + largest
    return log_denominator - chosen, log_denominator, chosen >= largest
