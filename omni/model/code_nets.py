"""Nets of their own between one block of codes and the stream, as Janus has them (Wu et al. 2024, arXiv:2410.13848).

A code enters the stream as what a perceptron makes of a short vector, and a hidden layer stands between the stream and
the logits of codes. All other ids have rows of the embedding and of the head, as ever.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from omni.model.aligner import Aligner, affine, gelu, random_matrix, zeros
from omni.model.config import TransformerConfig
from omni.model.quantized import Held, dequantized


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CodeHead:
    """What makes logits of codes: a hidden layer with GELU, then a row and a bias for each code."""

    hidden: Held
    """[dim, dim], outputs first."""
    hidden_bias: Float[Array, " dim"]
    rows: Held
    """[codes, dim]"""
    bias: Float[Array, " codes"]

    def logits(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch codes"]:
        """Logits of the stream after its final norm; float32."""
        x = gelu(affine(x, dequantized(self.hidden), self.hidden_bias))
        rows = dequantized(self.rows).astype(x.dtype)
        logits = jnp.einsum("...d,vd->...v", x, rows, preferred_element_type=jnp.float32)
        return logits + self.bias.astype(jnp.float32)


class CodeNets(nnx.Module):
    """The parameters of both nets; matrices are [outputs, inputs]."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        nets, dim = config.code_nets, config.dim
        self.vectors = random_matrix(rngs, ("vocabulary", None), nets.codes, nets.width)
        self.aligner = Aligner(nets.width, dim, nets.depth, rngs=rngs)
        self.hidden, self.hidden_bias = random_matrix(rngs, (None, "embed"), dim, dim), zeros((None,), dim)
        self.head = random_matrix(rngs, ("vocabulary", "embed"), nets.codes, dim)
        self.head_bias = zeros(("vocabulary",), nets.codes)
        self.config = config

    def rows(self, codes: Int[Array, "*batch"]) -> Float[Array, "*batch dim"]:
        """What codes are in the stream, in the compute type."""
        return self.aligner(self.vectors[...][codes].astype(self.config.compute_dtype))

    def code_head(self) -> CodeHead:
        """What makes logits of codes."""
        return CodeHead(self.hidden[...], self.hidden_bias[...], self.head[...], self.head_bias[...])
