"""A mixture of experts (Shazeer et al. 2017, arXiv:1701.06538) that drops no token, over the mesh axis `expert`."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from omni.model.config import TransformerConfig
from omni.sharding import active_mesh, mesh_axes, named_sharding

Stream = Float[Array, "batch length dim"]
Chosen = Int[Array, "batch length chosen"]
Shares = Float[Array, "batch length chosen"]


@partial(jax.tree_util.register_dataclass, data_fields=["there", "allowed"], meta_fields=[])
@dataclass(frozen=True)
class Routing:
    """What routers are told of tokens besides their streams."""

    there: Bool[Array, "batch length"]
    """False for padding, of which routers' terms take no notice."""
    allowed: Bool[Array, "batch length experts"] | None
    """The experts of each token's group; None where there are no groups."""


def routing(
    config: TransformerConfig, ids: Int[Array, "batch length"], segments: Int[Array, "batch length"] | None = None
) -> Routing | None:
    """What routers are told of `ids`; None without experts. Segment 0 is padding; without segments there is none."""
    if not config.experts:
        return None
    there = jnp.ones(ids.shape, bool) if segments is None else segments > 0
    if not config.expert_groups:
        return Routing(there, None)
    firsts, sizes = (jnp.array(numbers) for numbers in zip(*config.expert_groups, strict=True))
    group = jnp.searchsorted(firsts, ids, side="right") - 1
    group_of_expert = jnp.repeat(jnp.arange(len(sizes)), sizes, total_repeat_length=config.experts)
    return Routing(there, group[..., None] == group_of_expert)


def mixture(
    config: TransformerConfig, weights: dict[str, Array], x: Stream, tokens: Routing
) -> tuple[Stream, dict[str, Float[Array, ""]]]:
    """The sum of each token's likeliest experts, each a SwiGLU, weighted by the router's renormalised probabilities.

    With groups a token's experts and probabilities are those of its group alone.

    On a mesh a device computes its own experts for the rows of all devices along `expert`, whose rows are gathered
    before and summed and scattered after; no expert has a capacity, so none overflows.

    Returns:
      The stream's change, and the router's terms (see `router_terms`).
    """
    logits = jnp.einsum("bld,de->ble", x.astype(jnp.float32), weights["router"])
    if tokens.allowed is not None:
        logits = jnp.where(tokens.allowed, logits, -jnp.inf)
    probabilities = jax.nn.softmax(logits, axis=-1)
    shares, chosen = jax.lax.top_k(probabilities, config.experts_per_token)
    shares = shares / jnp.sum(shares, axis=-1, keepdims=True)
    kernels = [weights[name].astype(x.dtype) for name in ("gate", "up", "down")]
    return _spread(x, chosen, shares, *kernels), router_terms(config, logits, probabilities, chosen, tokens.there)


def router_terms(
    config: TransformerConfig,
    logits: Float[Array, "batch length experts"],
    probabilities: Float[Array, "batch length experts"],
    chosen: Chosen,
    there: Bool[Array, "batch length"],
) -> dict[str, Float[Array, ""]]:
    """`balance`: experts x sum over experts of (share of choices) x (mean probability), 1 where all are used evenly
    (Fedus et al. 2021, arXiv:2101.03961, equation 4); with groups that of each group, weighted by its share of the
    tokens. `router_z`: the mean squared log of the softmax's denominator (Zoph et al. 2022, arXiv:2202.08906, equation
    5). Means are over all tokens of the batch that are no padding, on all devices."""
    experts, tokens = logits.shape[-1], jnp.maximum(jnp.sum(there), 1)

    def mean(x: Float[Array, "batch length *rest"]) -> Float[Array, "*rest"]:
        return jnp.sum(jnp.where(there.reshape(*there.shape, *(1,) * (x.ndim - 2)), x, 0), axis=(0, 1)) / tokens

    used = mean(jnp.mean(jax.nn.one_hot(chosen, experts), axis=2))
    likely = mean(probabilities)
    sizes = [size for _, size in config.expert_groups or ((0, experts),)]
    groups = [slice(end - size, end) for size, end in zip(sizes, np.cumsum(sizes), strict=True)]
    none = 1 / (2 * there.size)  # less than the share of any group that has a token
    balance = sum(
        size * jnp.sum(used[group] * likely[group]) / jnp.maximum(jnp.sum(used[group]), none)
        for size, group in zip(sizes, groups, strict=True)
    )
    return {"balance": balance, "router_z": mean(jnp.square(jax.nn.logsumexp(logits, axis=-1)))}


def _spread(x: Stream, chosen: Chosen, shares: Shares, gate: Array, up: Array, down: Array) -> Stream:
    """`_own` on each device of the mesh."""
    active = active_mesh()
    if active is None:
        return _own(x, chosen, shares, gate, up, down, 0)
    mesh, rules = active
    rows = named_sharding(("batch", "length", None), rules, mesh, x.shape).spec
    wide = named_sharding(("experts", None, "mlp"), rules, mesh, gate.shape).spec
    narrow = PartitionSpec(wide[0], wide[2], None)
    expert, shared = mesh_axes(wide[0]), [axis for axis in mesh_axes(rows[0]) if axis in mesh_axes(wide[0])]

    def local(x, chosen, shares, gate, up, down):
        first = jax.lax.axis_index(expert) * gate.shape[0] if expert else 0
        for axis in shared:
            x, chosen, shares = (jax.lax.all_gather(y, axis, axis=0, tiled=True) for y in (x, chosen, shares))
        y = _own(x, chosen, shares, gate, up, down, first)
        y = jax.lax.psum(y, mesh_axes(wide[2])) if mesh_axes(wide[2]) else y
        for axis in reversed(shared):
            y = jax.lax.psum_scatter(y, axis, scatter_dimension=0, tiled=True)
        alone = [axis for axis in expert if axis not in shared]
        return jax.lax.psum(y, alone) if alone else y

    return jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, rows, wide, wide, narrow), out_specs=rows)(
        x, chosen, shares, gate, up, down
    )


def _own(
    x: Stream,
    chosen: Chosen,
    shares: Shares,
    gate: Float[Array, "own dim mlp"],
    up: Float[Array, "own dim mlp"],
    down: Float[Array, "own mlp dim"],
    first: Int[Array, ""] | int,
) -> Stream:
    """What experts `first`, first + 1, ... add to each token: pairs of token and expert, sorted by expert."""
    own, dim, per_token = len(gate), x.shape[-1], chosen.shape[-1]
    expert = chosen.reshape(-1) - first
    expert = jnp.where((expert >= 0) & (expert < own), expert, own)  # other devices' experts come last
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=own + 1)[:own].astype(jnp.int32)
    rows = x.reshape(-1, dim)[order // per_token]
    product = partial(jax.lax.ragged_dot, group_sizes=sizes)
    read = product(jax.nn.silu(product(rows, gate)) * product(rows, up), down)
    read = jnp.where((jnp.arange(len(order)) < sizes.sum())[:, None], read, 0)
    read = read[jnp.argsort(order)].reshape(*chosen.shape, dim)
    return jnp.einsum("blkd,blk->bld", read, shares.astype(x.dtype))
