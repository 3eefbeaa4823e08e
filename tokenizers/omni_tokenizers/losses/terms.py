"""What the losses of pictures and of sounds have in common."""

from __future__ import annotations

from jaxtyping import Array, Float

from omni_tokenizers.quantizers.base import Quantized

Sum = tuple[Float[Array, ""], Float[Array, ""]]
"""A total and the weight to divide it by, so that sums over microbatches and devices stay exact."""


def quantizer_metrics(quantized: Quantized, weight: Float[Array, ""]) -> dict[str, Sum]:
    """What a quantiser tells of a batch of `weight` examples."""
    names = ("commitment", "auxiliary", "perplexity", "usage")
    return {name: (weight * getattr(quantized, name), weight) for name in names}
