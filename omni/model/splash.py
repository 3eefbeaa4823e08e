"""Splash attention (jax's Pallas kernel for TPUs): block-sparse flash attention with a causal mask and segments."""

import jax
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

Kernel = kernels.SplashAttentionKernel

LANES = 128
"""What block sizes and the width of a head must be multiples of."""


def make(
    heads: int,
    places: Int[np.ndarray, " length"],
    blocks: tuple[int, int],
    head_shards: int,
    length_shards: int,
    *,
    interpret: bool = False,
) -> Kernel:
    """The causal kernel of whole sequences, its blocks of the mask to be split by `specs`.

    Args:
      places: which of the keys each query's own is.
      blocks: queries and keys of a block, at most; they shrink to what divides a device's stretch of the length.
      head_shards, length_shards: devices over which query heads and queries are split.
      interpret: computes the kernel without a TPU, slowly.
    """
    length = len(places)
    queries = _block(length // length_shards, blocks[0])
    keys = _block(length, blocks[1])
    sizes = kernels.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_kv_compute=_block(keys, 512),
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_kv_dkv_compute=_block(keys, 512),
        use_fused_bwd_kernel=True,
    )
    causal = masks.CausalMask((length, length), shard_count=length_shards)
    causal.q_sequence = places
    return kernels.make_splash_mha(
        masks.MultiHeadMask([causal] * heads),
        block_sizes=sizes,
        head_shards=head_shards,
        q_seq_shards=length_shards,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )


def specs(kernel: Kernel, mesh: Mesh, heads, length) -> Kernel:
    """How the kernel's own arrays are split, where these mesh axes split heads and queries."""
    return kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(heads, length)))


def attend(
    kernel: Kernel,
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch length key_value_heads head_dim"],
    value: Float[Array, "batch length key_value_heads head_dim"],
    own: Int[Array, "batch queries"],
    segments: Int[Array, "batch length"],
    places: Int[Array, " queries"],
) -> Float[Array, "batch queries heads head_dim"]:
    """As `attention.attend_in_blocks`; the kernel itself knows where its queries stand."""
    del places
    query, key, value = (x.swapaxes(1, 2) for x in (query * query.shape[-1] ** -0.5, key, value))
    read = jax.vmap(kernel)(query, key, value, kernels.SegmentIds(own, segments))
    return read.swapaxes(1, 2).astype(value.dtype)


def _block(length: int, most: int) -> int:
    """The largest multiple of `LANES` up to `most` that divides `length`; `length` itself where there is none."""
    fitting = [size for size in range(LANES, min(most, length) + 1, LANES) if length % size == 0]
    return fitting[-1] if fitting else length
