"""The tower of pictures that are seen, not drawn: SigLIP's (Zhai et al. 2023, arXiv:2303.15343) without its pooling
head, and the aligner behind it, as Janus has them (Wu et al. 2024, arXiv:2410.13848)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from omni.model.aligner import Aligner, affine, gelu, random_matrix, zeros
from omni.model.config import TransformerConfig, VisionConfig
from omni.model.norms import layer_norm

Tokens = Float[Array, "batch tokens width"]


class Vision(nnx.Module):
    """Pictures to features that stand in the stream in the place of embeddings, one for each patch, row by row.

    Matrices are [outputs, inputs]; of layers each parameter is a stack.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        vision = config.vision
        self.patch = nnx.Param(
            jax.nn.initializers.truncated_normal((3 * vision.patch**2) ** -0.5)(
                rngs.params(), (vision.dim, 3, vision.patch, vision.patch)
            ),
            axes=("embed", None, None, None),
        )
        self.patch_bias = zeros(("embed",), vision.dim)
        self.position = random_matrix(rngs, (None, "embed"), vision.tokens, vision.dim)
        self.layers = VisionLayers(vision, rngs=rngs)
        self.norm, self.norm_bias = ones(("embed",), vision.dim), zeros(("embed",), vision.dim)
        self.aligner = Aligner(vision.dim, config.dim, vision.aligner_depth, rngs=rngs)
        self.config, self.compute_dtype = vision, config.compute_dtype

    def __call__(self, values: Float[Array, "batch side side 3"]) -> Float[Array, "batch tokens dim"]:
        """Features, in the compute type, of pictures as the image processor scales them."""
        side, patch = self.config.image_size // self.config.patch, self.config.patch
        pieces = values.astype(self.compute_dtype).reshape(len(values), side, patch, side, patch, 3)
        kernel = self.patch[...].astype(self.compute_dtype)
        x = jnp.einsum("brpcqi,oipq->brco", pieces, kernel).reshape(len(values), self.config.tokens, -1)
        x += (self.patch_bias[...] + self.position[...]).astype(x.dtype)
        x, _ = jax.lax.scan(lambda x, layer: (self._layer(layer, x), None), x, self.layers.weights())
        return self.aligner(layer_norm(x, self.norm[...], self.norm_bias[...], self.config.norm_epsilon))

    def _layer(self, weights: dict[str, Array], x: Tokens) -> Tokens:
        """Attention of all patches to all, then a perceptron, each behind a norm and added to the stream."""

        def normed(name: str) -> Tokens:
            return layer_norm(x, weights[f"{name}_norm"], weights[f"{name}_norm_bias"], self.config.norm_epsilon)

        def linear(name: str, x: Tokens) -> Tokens:
            return affine(x, weights[name], weights[f"{name}_bias"])

        def heads(name: str, x: Tokens) -> Float[Array, "batch tokens heads head_dim"]:
            return linear(name, x).reshape(*x.shape[:2], self.config.heads, -1)

        before = normed("attention")
        read = jax.nn.dot_product_attention(*(heads(name, before) for name in ("query", "key", "value")))
        x += linear("output", read.reshape(x.shape))
        return x + linear("down", gelu(linear("up", normed("mlp"))))


class VisionLayers(nnx.Module):
    """The parameters of all layers, each stacked: [depth, ...]."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        depth, dim = config.depth, config.dim
        for name in ("query", "key", "value", "output", "up", "down"):
            outputs, inputs = (config.mlp_dim if name == side else dim for side in ("up", "down"))
            axes = ("embed", "mlp") if name in ("output", "down") else ("mlp", "embed")
            setattr(self, name, random_matrix(rngs, ("layers", *axes), depth, outputs, inputs))
            setattr(self, f"{name}_bias", zeros(("layers", axes[0]), depth, outputs))
        for name in ("attention_norm", "mlp_norm"):
            setattr(self, name, ones(("layers", "embed"), depth, dim))
            setattr(self, f"{name}_bias", zeros(("layers", "embed"), depth, dim))

    def weights(self) -> dict[str, Array]:
        """The arrays by name."""
        return {name: value[...] for name, value in vars(self).items() if isinstance(value, nnx.Param)}


def ones(axes: tuple[str | None, ...], *shape: int) -> nnx.Param:
    """A norm's scale or a stack of such."""
    return nnx.Param(jnp.ones(shape), axes=axes)
