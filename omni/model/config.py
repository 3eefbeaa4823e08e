"""Configuration of the transformer."""

from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin

from omni_tokenizers.errors import UsageError


@dataclass(frozen=True)
class TransformerConfig:
    """Shape and variants of a decoder-only transformer."""

    vocabulary_size: int = 1280
    """Number of ids, rows of the embedding."""
    depth: int = 4
    """Number of blocks."""
    dim: int = 192
    """Width of the residual stream."""
    heads: int = 6
    """Query heads."""
    key_value_heads: int = 3
    """Key and value heads; each serves heads / key_value_heads query heads (grouped-query attention)."""
    head_dim: int = 32
    """Width of a head, even."""
    mlp_dim: int = 512
    """Hidden width of the SwiGLU."""
    norm_order: Literal["pre", "swin"] = "pre"
    """pre: x + f(norm(x)); swin: x + norm(f(x))."""
    norm_epsilon: float = 1e-5
    """Added to the mean square (or variance) in every norm."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rope: Literal["time", "time_row_column"] = "time"
    """Which of the three position coordinates rotate queries and keys."""
    qk_norm: Literal["none", "rms", "layer"] = "rms"
    """Norm of queries and keys over head_dim, before the rotation; layer has a bias."""
    dropout: float = 0.0
    """Rate of dropout on the embedding and on what each branch adds to the residual stream, in training."""
    tied_embeddings: bool = True
    """Whether the output head is the transposed embedding."""
    remat: Literal["none", "full", "dots", "attention"] = "none"
    """What the backward pass recomputes.

    none; full: all but the inputs of blocks; dots: all but matrix products; attention: full, but attention's outputs.
    """
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and of parameters at use; parameters, norms, softmax and logits are float32."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if get_origin(field.type) is Literal and value not in get_args(field.type):
                choices = ", ".join(get_args(field.type))
                raise UsageError(f"transformer {field.name} is {value!r}; choose one of {choices}")
            if field.type is int and value < 1:
                raise UsageError(f"transformer {field.name} is {value}; it must be at least 1")
        if self.heads % self.key_value_heads:
            raise UsageError(f"transformer heads {self.heads} is no multiple of key_value_heads {self.key_value_heads}")
        if self.head_dim % 2:
            raise UsageError(f"transformer head_dim {self.head_dim} is odd; rotary positions rotate pairs")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"transformer dropout is {self.dropout}; it must be at least 0 and below 1")
