"""Which differences of codes are ties: those that float32 decides by chance, in their own net and on their own latents.

A code is the nearest of a codebook. Where two are about equally near, rounding decides, and two correct programs may
differ. How near "about" is depends on how much rounding a net adds up before it comes to the codebook, so it is
measured: the other side's net runs in float32 and in float64, and for every latent the differences of the squared
distances of its nearest codes are taken in both. The largest change, `rounding`, is what float32 may do to such a
difference. Two codes are a near-tie where their squared distances in float64 differ by no more. Nothing of ours is in
this bound, so an error of ours excuses nothing.
"""

from collections.abc import Callable, Iterator

import torch

_TOGETHER = 1 << 25  # distances in memory
_NEAREST = 16
"""Codes of a latent whose distances are compared; with two, a clip of few frames says little about the largest."""


def squared_distances(latents: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """[n, codes], as codecs compute them: by the sums of the binomial."""
    return latents.square().sum(1, keepdim=True) - 2 * latents @ vectors.T + vectors.square().sum(1)


def squared_by_cdist(latents: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """[n, codes], as Mimi computes them: the root is taken, and rounded."""
    return torch.cdist(latents[None], vectors[None])[0].square()


def parts(rows: int, codes: int) -> Iterator[slice]:
    """Rows of which all distances fit into memory."""
    step = max(1, _TOGETHER // codes)
    return (slice(start, start + step) for start in range(0, rows, step))


def rounding(
    exact: torch.Tensor,
    vectors: torch.Tensor,
    rounded: torch.Tensor,
    rounded_vectors: torch.Tensor,
    distances: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = squared_distances,
) -> float:
    """The largest change of the difference between the smallest squared distance of a latent and one of the next.

    Args:
        exact, vectors: latents [n, dim] and codes [codes, dim] of the net in float64.
        rounded, rounded_vectors: those of the same net in float32.
        distances: squared ones [n, codes], as that net computes them in float32.
    """
    largest = 0.0
    for part in parts(len(exact), len(vectors)):
        values, nearest = squared_distances(exact[part], vectors).topk(_NEAREST, largest=False)
        again = distances(rounded[part], rounded_vectors).gather(1, nearest).double()
        largest = max(largest, ((again - again[:, :1]) - (values - values[:, :1])).abs().max().item())
    return largest
