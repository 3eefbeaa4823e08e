"""A decoder-only transformer: stacked parameters, and one block as a function of one layer's weights."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from omni.model import experts
from omni.model.attention import Heads, KeyValueHeads, attend
from omni.model.code_nets import CodeHead, CodeNets
from omni.model.config import TransformerConfig
from omni.model.norms import layer_norm, rms_norm
from omni.model.positions import Rotation, rotate, rotation
from omni.model.vision import Vision
from omni.sharding import constrain

Stream = Float[Array, "batch length dim"]
Weights = dict[str, Array]
# (query, key, value) -> what the queries read, and what there is besides: the cache after it, or the largest scores.
Attend = Callable[[Heads, KeyValueHeads, KeyValueHeads], tuple[Heads, Any]]

INPUTS = {"query": 1, "key": 1, "value": 1, "output": 2, "gate": 1, "up": 1, "down": 1}
"""Matrices of a block, and how many of their axes, the first ones, are inputs: those over which products sum."""
ADAPTER = "_lora_"
"""What follows a matrix's name in those of its adapter's sides, `a` and `b`; see `omni.model.lora`."""


@partial(jax.tree_util.register_dataclass, data_fields=["stream", "routers", "norms", "largest_logits"], meta_fields=[])
@dataclass(frozen=True)
class Features:
    """What the transformer makes of tokens before its output head, and what its routers did on the way."""

    stream: Stream
    """The residual stream after the last block and the final norm."""
    routers: dict[str, Float[Array, ""]]
    """Mean over blocks of each term of `experts.router_terms`; empty without experts."""
    norms: Float[Array, "batch length"]
    """Length of each token's residual stream before the final norm."""
    largest_logits: Float[Array, "batch length"] | None
    """The largest attention logit of each token, of all blocks and heads; None where the kernel keeps none."""


class Blocks(nnx.Module):
    """The parameters of all blocks, each stacked over layers: [depth, ...]."""

    adapter_scale = 1.0
    """Of what adapters add."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        dim, heads, groups, head_dim = config.dim, config.heads, config.key_value_heads, config.head_dim

        def matrix(axes: str, *shape: int, deviation: float) -> nnx.Param:
            value = jax.nn.initializers.truncated_normal(deviation)(rngs.params(), (config.depth, *shape))
            return nnx.Param(value, axes=("layers", *axes.split()))

        def vector(fill: float, axes: str, *shape: int) -> nnx.Param:
            return nnx.Param(jnp.full((config.depth, *shape), fill, jnp.float32), axes=("layers", *axes.split()))

        def head_vector(fill: float, axis: str, number: int) -> nnx.Param:
            own = (f"{axis} head_dim", number, head_dim) if config.qk_norm_per_head else ("head_dim", head_dim)
            return vector(fill, *own)

        # The depth of the sum that ends in the residual stream: two branches a block (GPT-2's scaled initialisation).
        shrink = 1 / math.sqrt(2 * config.depth)
        self.attention_norm = vector(1.0, "embed", dim)
        self.query = matrix("embed heads head_dim", dim, heads, head_dim, deviation=dim**-0.5)
        self.key = matrix("embed key_value_heads head_dim", dim, groups, head_dim, deviation=dim**-0.5)
        self.value = matrix("embed key_value_heads head_dim", dim, groups, head_dim, deviation=dim**-0.5)
        self.output = matrix(
            "heads head_dim embed", heads, head_dim, dim, deviation=shrink * (heads * head_dim) ** -0.5
        )
        if config.qk_norm != "none":
            self.query_norm = head_vector(1.0, "heads", heads)
            self.key_norm = head_vector(1.0, "key_value_heads", groups)
        if config.qk_norm == "layer":
            self.query_norm_bias = head_vector(0.0, "heads", heads)
            self.key_norm_bias = head_vector(0.0, "key_value_heads", groups)
        self.mlp_norm = vector(1.0, "embed", dim)
        each, of = ("experts ", (config.experts,)) if config.experts else ("", ())
        if config.experts:
            self.router = matrix("embed experts", dim, config.experts, deviation=dim**-0.5)
        self.gate = matrix(each + "embed mlp", *of, dim, config.mlp_dim, deviation=dim**-0.5)
        self.up = matrix(each + "embed mlp", *of, dim, config.mlp_dim, deviation=dim**-0.5)
        self.down = matrix(each + "mlp embed", *of, config.mlp_dim, dim, deviation=shrink * config.mlp_dim**-0.5)

    def weights(self) -> Weights:
        """The arrays by name, every one [depth, ...]; of an adapter the second has the scale of both."""
        arrays = {name: value[...] for name, value in vars(self).items() if isinstance(value, nnx.Param)}
        return {name: x * self.adapter_scale if name.endswith(ADAPTER + "b") else x for name, x in arrays.items()}


class Transformer(nnx.Module):
    """Tokens to logits; blocks are scanned over stacked parameters (Llama-shaped: Touvron et al. 2023).

    Every parameter is a float32 nnx.Param whose metadata `axes` names its logical axes, for the sharding rules.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        draw = jax.nn.initializers.truncated_normal(config.dim**-0.5)
        shape = (config.embedded, config.dim)
        self.embedding = nnx.Param(draw(rngs.params(), shape), axes=("vocabulary", "embed"))
        self.blocks = Blocks(config, rngs=rngs)
        self.norm = nnx.Param(jnp.ones(config.dim), axes=("embed",))
        if not config.tied_embeddings:
            self.head = nnx.Param(draw(rngs.params(), shape), axes=("vocabulary", "embed"))
        if config.code_nets:
            self.codes = CodeNets(config, rngs=rngs)
        if config.vision:
            self.vision = Vision(config, rngs=rngs)

    def __call__(
        self,
        ids: Int[Array, "batch length"],
        positions: Int[Array, "batch length 3"],
        segments: Int[Array, "batch length"] | None,
        *,
        dropout_key: PRNGKeyArray | None = None,
        given: Stream | None = None,
    ) -> Float[Array, "batch length vocabulary"]:
        """Logits, float32, for the token after each; each sees its own segment up to itself (0 is padding).

        Without `dropout_key` nothing is dropped. Where ids are negative, what is `given` stands in the place of
        embeddings.
        """
        stream = self.features(ids, positions, segments, dropout_key=dropout_key, given=given).stream
        return project(stream, self.output_weights(), self.code_head())

    def features(
        self,
        ids: Int[Array, "batch length"],
        positions: Int[Array, "batch length 3"],
        segments: Int[Array, "batch length"] | None,
        *,
        dropout_key: PRNGKeyArray | None = None,
        order: Int[np.ndarray, " length"] | None = None,
        given: Stream | None = None,
    ) -> Features:
        """All of `__call__` but the output head; tokens may stand in another `order` (see `attend`)."""
        config = self.config
        embedded = ids if given is None else jnp.maximum(ids, 0)
        by, tokens = rotation(config, positions), experts.routing(config, embedded, segments)
        segments = jnp.ones_like(ids) if segments is None else segments
        keys = None
        if config.dropout and dropout_key is not None:
            embedding_key, *keys = jax.random.split(dropout_key, 1 + config.depth)
        x = self._start(embedded) if given is None else with_features(self._start(embedded), ids, given)

        def attend_all(query: Heads, key: KeyValueHeads, value: KeyValueHeads) -> tuple[Heads, Array | None]:
            read, largest = attend(config, query, key, value, segments, order)
            return read, None if largest is None else jnp.max(largest, axis=-1)

        def step(x: Stream, layer: tuple[Weights, PRNGKeyArray | None]) -> tuple[Stream, tuple]:
            weights, key = layer
            x, largest, routers = block(config, weights, x, by, attend_all, key, tokens)
            return x, (routers, largest)

        if keys is not None:
            x = dropout(x, config.dropout, embedding_key)
            keys = jnp.stack(keys)
        if config.remat != "none":
            # A scan's body is compiled once, so common subexpressions cannot undo the recomputation.
            step = jax.checkpoint(step, policy=remat_policy(config), prevent_cse=False)
        x, (routers, largest) = jax.lax.scan(step, x, (self.blocks.weights(), keys))
        return Features(
            rms_norm(x, self.norm[...], config.norm_epsilon),
            jax.tree.map(jnp.mean, routers),
            jnp.linalg.norm(jax.lax.stop_gradient(x).astype(jnp.float32), axis=-1),
            None if largest is None else jnp.max(largest, axis=0),
        )

    def _start(self, ids: Int[Array, "batch length"]) -> Stream:
        if not self.config.code_nets:
            return embed(self.config, self.embedding[...], ids)
        embedded = self.config.embedded
        x = embed(self.config, self.embedding[...], jnp.minimum(ids, embedded - 1))
        rows = constrain(self.codes.rows(jnp.maximum(ids - embedded, 0)), "batch", "stream", None)
        return jnp.where((ids < embedded)[..., None], x, rows)

    def input_weights(self) -> Float[Array, "vocabulary dim"]:
        """What each id is in the stream: the embedding, and behind it what nets make of codes."""
        if not self.config.code_nets:
            return self.embedding[...]
        rows = self.codes.rows(jnp.arange(self.config.code_nets.codes))
        return jnp.concatenate([self.embedding[...], rows.astype(self.embedding.dtype)])

    def output_weights(self) -> Float[Array, "embedded dim"]:
        """The output head of ids that are embedded: the embedding where tied."""
        return self.embedding[...] if self.config.tied_embeddings else self.head[...]

    def code_head(self) -> CodeHead | None:
        """The output head of all other ids, where there are such."""
        return self.codes.code_head() if self.config.code_nets else None


def embed(
    config: TransformerConfig, embedding: Float[Array, "vocabulary dim"], ids: Int[Array, "batch length"]
) -> Stream:
    """The residual stream's start, in the compute type."""
    rows = constrain(embedding, "vocabulary", None)[ids]
    return constrain(rows.astype(config.compute_dtype), "batch", "stream", None)


def with_features(x: Stream, ids: Int[Array, "batch length"], features: Stream) -> Stream:
    """The stream's start with features where ids are negative."""
    return constrain(jnp.where((ids < 0)[..., None], features.astype(x.dtype), x), "batch", "stream", None)


def remat_policy(config: TransformerConfig) -> Callable:
    """Which tensors of a block the backward pass need not compute anew."""
    if config.remat == "dots":
        return jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    if config.offloaded:
        return jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=config.saved,
            names_which_can_be_offloaded=config.offloaded,
            offload_src="device",
            offload_dst="pinned_host",
        )
    return jax.checkpoint_policies.save_only_these_names(*config.saved)


def project(
    x: Stream, head: Float[Array, "embedded dim"], codes: CodeHead | None = None
) -> Float[Array, "batch length vocabulary"]:
    """Logits of the stream after its final norm, those of `codes` behind the others; float32."""
    logits = jnp.einsum("bld,vd->blv", x, head.astype(x.dtype), preferred_element_type=jnp.float32)
    if codes is not None:
        logits = jnp.concatenate([logits, codes.logits(x)], axis=-1)
    return constrain(logits, "batch", "length", "vocabulary")


def block(
    config: TransformerConfig,
    weights: Weights,
    x: Stream,
    by: Rotation,
    attend: Attend,
    key: PRNGKeyArray | None = None,
    tokens: experts.Routing | None = None,
) -> tuple[Stream, Any, dict]:
    """The stream after one block, what its `attend` gave besides, and its router's terms: attention, then a SwiGLU,
    each added to the stream.

    Norm before the branch, or after it (Swin v2, Liu et al. 2021, arXiv:2111.09883; Chameleon 34B, arXiv:2405.09818).
    """
    keys = (None, None) if key is None else jax.random.split(key)

    def add(x: Stream, scale: Array, branch: Callable, key: PRNGKeyArray | None) -> tuple[Stream, Any]:
        norm = partial(rms_norm, scale=scale, epsilon=config.norm_epsilon)
        if config.norm_order == "pre":
            change, more = branch(norm(x))
        else:
            change, more = branch(x)
            change = norm(change)
        return constrain(x + dropout(change, config.dropout, key), "batch", "stream", None), more

    x, cache = add(x, weights["attention_norm"], partial(attention, config, weights, by=by, attend=attend), keys[0])

    def feed(x: Stream) -> tuple[Stream, dict]:
        return experts.mixture(config, weights, x, tokens) if config.experts else (mlp(weights, x), {})

    x, routers = add(x, weights["mlp_norm"], feed, keys[1])
    return x, cache, routers


def attention(
    config: TransformerConfig, weights: Weights, x: Stream, by: Rotation, attend: Attend
) -> tuple[Stream, Any]:
    """Project to heads, normalise queries and keys (arXiv:2010.04245), rotate, attend, project back."""
    query, key, value = (linear(weights, name, x) for name in ("query", "key", "value"))
    query = laid_out(rotate(head_norm(config, query, weights, "query_norm"), by), "query", "heads")
    key = laid_out(rotate(head_norm(config, key, weights, "key_norm"), by), "key", "key_value_heads")
    value = laid_out(value, "value", "key_value_heads")
    read, cache = attend(query, key, value)
    read = checkpoint_name(read, "attention")
    change = linear(weights, "output", read)
    return checkpoint_name(constrain(change, "batch", "stream", None), "attention_output"), cache


def laid_out(x: Heads, name: str, heads: str) -> Heads:
    """Heads by a name under which they can be saved, each device its own stretch of the length.

    Without this, the compiler may save keys and values as attention reads them, gathered along `context`.
    """
    axes = ("batch", "length", heads, None)
    return constrain(checkpoint_name(constrain(x, *axes), name), *axes)


def mlp(weights: Weights, x: Stream) -> Stream:
    """SwiGLU (Shazeer 2020, arXiv:2002.05202)."""
    gate = jax.nn.silu(checkpoint_name(linear(weights, "gate", x), "gate"))
    hidden = gate * checkpoint_name(linear(weights, "up", x), "up")
    return checkpoint_name(constrain(linear(weights, "down", hidden), "batch", "stream", None), "mlp_output")


def linear(weights: Weights, name: str, x: Float[Array, "batch length *inputs"]) -> Float[Array, "batch length *out"]:
    """The product with one of a block's matrices, and with its adapter where it has one: through the narrow middle, so
    that no gradient is computed for a matrix that is not trained."""

    def product(x: Array, name: str, summed: int) -> Array:
        return jnp.tensordot(x, weights[name].astype(x.dtype), summed)

    y = product(x, name, INPUTS[name])
    if name + ADAPTER + "a" in weights:
        y += product(product(x, name + ADAPTER + "a", INPUTS[name]), name + ADAPTER + "b", 1)
    return y


def head_norm(config: TransformerConfig, x: Heads, weights: Weights, name: str) -> Heads:
    """QK-norm over head_dim: none, RMS, or LayerNorm with bias (one epsilon for all norms); scales and biases are
    [head_dim], or [heads, head_dim]."""
    if config.qk_norm == "none":
        return x
    if config.qk_norm == "rms":
        return rms_norm(x, weights[name], config.norm_epsilon)
    return layer_norm(x, weights[name], weights[name + "_bias"], config.norm_epsilon)


def dropout(x: Stream, rate: float, key: PRNGKeyArray | None) -> Stream:
    """Zero a share `rate` of the features and scale the rest up; without a key, the input itself."""
    if key is None or not rate:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)
