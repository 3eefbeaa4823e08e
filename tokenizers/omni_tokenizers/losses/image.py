"""How far reconstructed pictures are from the originals, pixel by pixel."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from omni_tokenizers.losses.perceptual import PerceptualDistance
from omni_tokenizers.losses.terms import Sum, quantizer_metrics
from omni_tokenizers.quantizers.base import Quantized, check_weights


@dataclasses.dataclass(frozen=True)
class ImageLosses:
    """Weights of the differences between a picture and its reconstruction, pixels lying within [-1, 1]."""

    squared: float = 1.0
    """Weight of the squared error (L2), mean over pixels and colours."""
    absolute: float = 0.1
    """Weight of the absolute error (L1), mean over pixels and colours."""
    perceptual: float = 1.0
    """Weight of the perceptual distance, if there is one."""
    perceptual_weights: str | None = None
    """Safetensors file of the VGG16 that measures the perceptual distance, your own (`PerceptualDistance` says what is
    in it): none comes with this package. None: there is no perceptual loss."""

    def __post_init__(self) -> None:
        check_weights(squared=self.squared, absolute=self.absolute, perceptual=self.perceptual)

    def __call__(
        self,
        estimate: Float[Array, "batch height width 3"],
        image: Float[Array, "batch height width 3"],
        quantized: Quantized,
        distance: PerceptualDistance | None = None,
    ) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, Sum]]:
        """(total, weight, metrics): the loss summed over pictures, their number, and metrics name -> (total, weight).

        The quantiser's own losses count once a picture.

        Args:
            distance: the perceptual distance of `perceptual_weights`.
        """
        error = estimate - image
        squared = jnp.square(error).mean((1, 2, 3))
        weight = jnp.float32(len(image))
        reconstruction = (self.squared * squared + self.absolute * jnp.abs(error).mean((1, 2, 3))).sum()
        # Pixels span 2, so the peak signal is 2.
        psnr = (-10 * jnp.log10(jnp.maximum(squared / 4, 1e-10))).sum()
        values, total = {"reconstruction": reconstruction, "psnr": psnr}, reconstruction
        if distance is not None:
            values["perceptual"] = distance(estimate, image).sum()
            total += self.perceptual * values["perceptual"]
        metrics = {name: (value, weight) for name, value in values.items()} | quantizer_metrics(quantized, weight)
        return total + weight * (quantized.commitment + quantized.auxiliary), weight, metrics
