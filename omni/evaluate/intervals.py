"""How sure a measure is: 95 % intervals of shares and of means."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

Outcomes = Bool[np.ndarray, " n"] | Float[np.ndarray, " n"]
"""Whether each is right, or the share to which it is."""


def wilson_interval(right: float, count: float) -> list[float]:
    """95 % interval of a share (Wilson 1927): it stays inside [0, 1] and is no point at 0 % or 100 %."""
    z = 1.959964
    share, scale = right / count, 1 + z * z / count
    middle = (share + z * z / (2 * count)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return [max(0.0, middle - half), min(1.0, middle + half)]


def cluster_interval(
    right: Float[np.ndarray, " n"] | Bool[np.ndarray, " n"], clusters: Sequence[Hashable]
) -> list[float]:
    """95 % interval of the share of `right` where outcomes of one cluster depend on one another.

    Wilson's interval for as many independent outcomes as these are worth (`effective_count`).
    """
    count = effective_count(right, clusters)
    return wilson_interval(float(np.mean(right)) * count, count)


def effective_count(right: Outcomes, clusters: Sequence[Hashable]) -> float:
    """How many independent outcomes give the variance that the clusters' sums show (Kish 1965).

    At most n. At least what is left where every cluster is of one mind, which is also taken where all outcomes are the
    same: nothing can be seen of the dependence there.
    """
    own = _numbered(clusters)
    sizes, sums = np.bincount(own), np.bincount(own, weights=right)
    n, share = len(own), float(np.mean(right))
    of_one_mind = n * n / float((sizes**2).sum())
    if len(sizes) == 1 or share in (0.0, 1.0):
        return of_one_mind
    variance = len(sizes) / (len(sizes) - 1) * float(((sums - share * sizes) ** 2).sum()) / (n * n)
    return float(np.clip(share * (1 - share) / max(variance, 1e-12), of_one_mind, n))


def bootstrap_interval(
    totals: Float[np.ndarray, " n"],
    weights: Float[np.ndarray, " n"],
    clusters: Sequence[Hashable],
    seed: int,
    resamples: int = 2000,
) -> list[float]:
    """95 % interval of sum(totals) / sum(weights): percentiles over clusters drawn with replacement (Efron 1979)."""
    own, rng = _numbered(clusters), np.random.default_rng(seed)
    totals, weights = np.bincount(own, weights=totals), np.bincount(own, weights=weights)
    ratios = []
    for _ in range(resamples):
        drawn = rng.integers(0, len(totals), len(totals))
        ratios.append(totals[drawn].sum() / weights[drawn].sum())
    return np.percentile(ratios, [2.5, 97.5]).tolist()


def _numbered(clusters: Sequence[Hashable]) -> Int[np.ndarray, " n"]:
    """The cluster of each outcome as a number from 0."""
    places = {cluster: place for place, cluster in enumerate(dict.fromkeys(clusters))}
    return np.array([places[cluster] for cluster in clusters])
