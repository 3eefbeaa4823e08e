"""What causal layers carry from one step of a stream to the next.

A stream calls the very net that encodes and decodes whole clips, on the next few frames of several rows at a time.
`start_stream` gives each layer that reaches back a `Carried` variable. From then on a call finds in it what came before
the frames it is given, of which the first `lengths` of each row count, and leaves in it what the next call needs. A row
that is given none keeps what it has, and one whose carried arrays are zero begins.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int, Shaped


class Carried(nnx.Variable):
    """An array that a layer carries along, rows first: zeros where a row begins."""


class Carrier(abc.ABC):
    """A layer whose output depends on what came before its input."""

    @abc.abstractmethod
    def start_stream(self, rows: int) -> None:
        """Makes every later call a step of a stream of `rows` rows, all at their beginning."""


class Past(Carrier, nnx.Module):
    """Puts what came before in front of the frames: zeros before a clip, the latest frames in a stream."""

    def __init__(self, frames: int, *shape: int):
        self.frames, self.shape = frames, shape
        self.carried = nnx.data(None)

    def start_stream(self, rows: int) -> None:
        self.carried = Carried(jnp.zeros((rows, self.frames, *self.shape)))

    def __call__(
        self, x: Shaped[Array, "rows time *shape"], lengths: Int[Array, " rows"]
    ) -> Shaped[Array, "rows frames+time *shape"]:
        if self.carried is None:
            return jnp.pad(x, ((0, 0), (self.frames, 0)) + ((0, 0),) * (x.ndim - 2))
        whole = jnp.concatenate([self.carried[...], x], 1)
        self.carried[...] = latest(whole, lengths, self.frames)
        return whole


class Overlap(Carrier, nnx.Module):
    """In a stream, adds up sums that reach `size` beyond the frames they are of, into those of the next step."""

    def __init__(self, size: int, *shape: int):
        self.size, self.shape = size, shape
        self.carried = nnx.data(None)

    def start_stream(self, rows: int) -> None:
        self.carried = Carried(jnp.zeros((rows, self.size, *self.shape)))

    def __call__(
        self, sums: Shaped[Array, "rows time+size *shape"], lengths: Int[Array, " rows"]
    ) -> Shaped[Array, "rows time *shape"]:
        """`sums` with what the step before left over; theirs, which are 0 from lengths + size on, go to the next."""
        sums = sums.at[:, : self.size].add(self.carried[...])
        self.carried[...] = latest(sums, lengths, self.size)
        return sums[:, : sums.shape[1] - self.size]


def start_stream(modules: Iterable[nnx.Module], rows: int) -> None:
    """Makes every later call of these modules a step of a stream of `rows` rows, all at their beginning."""
    for root in modules:
        for _, module in nnx.iter_modules(root):
            if isinstance(module, Carrier):
                module.start_stream(rows)


def latest(
    whole: Shaped[Array, "rows time *shape"], lengths: Int[Array, " rows"], number: int
) -> Shaped[Array, "rows number *shape"]:
    """Of `number` frames that came before and new ones after them, the last `number` when `lengths` new ones count."""
    places = lengths[:, None] + jnp.arange(number)
    return jnp.take_along_axis(whole, places.reshape(*places.shape, *[1] * (whole.ndim - 2)), 1)
