"""Tensors of a public checkpoint into a transformer's parameters, one at a time, and back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from jaxtyping import Array, Float, Int

from omni.interop.family import LAYER, Family, Place
from omni.model import Transformer, TransformerConfig
from omni.model.transformer import INPUTS
from omni.sharding import ShardingRules, named_sharding, placed
from omni_tokenizers import weights
from omni_tokenizers.errors import OmniError


class NamedTensors(Protocol):
    """Float32 tensors by name, each made when it is asked for."""

    source: str

    def __getitem__(self, name: str) -> np.ndarray: ...

    def __iter__(self) -> Iterator[str]: ...

    def __contains__(self, name: object) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]: ...


_VOCABULARY = ("embedding", "head")
_CONSTANTS = ("rotary_emb.inv_freq",)
"""Ends of names in older files of what follows from the configuration."""


def places_in(tensors: NamedTensors, config: TransformerConfig, family: Family) -> list[Place]:
    """Which tensor is which, under the prefix that the files use.

    Raises:
      OmniError: a tensor is missing, or belongs to no part of the model.
    """
    prefixes = (family.prefix, *family.other_prefixes)
    prefix = next((each for each in prefixes if f"{each}norm.weight" in tensors), family.prefix)
    last = f"{prefix}layers.{config.depth - 1}.{LAYER['attention_norm']}"
    if last not in tensors:
        raise OmniError(f"{tensors.source}: tensor {last!r} is missing; config.json has {config.depth} layers")
    count = sum(name.startswith(f"{prefix}layers.") for name in tensors)
    if count < config.depth:  # before as many names are made as a config.json may ask for
        raise OmniError(f"{tensors.source}: {count} tensors of layers; config.json has {config.depth} layers")
    embedding = f"{prefix}embed_tokens.weight"
    if embedding in tensors and tensors.shape(embedding)[:1] != (config.embedded,):
        rows = f"the shape {list(tensors.shape(embedding))}, config.json needs {config.embedded} rows"
        raise OmniError(f"{tensors.source}: tensor {embedding!r} has {rows}")
    most = 2 * sum(1 for _ in tensors)  # with so many places some lack a tensor, however many a config.json asks for
    places = list(itertools.islice(family.places(config, prefix), most))
    wanted = {place.theirs for place in places}
    known = [name for name in tensors if not name.startswith(family.others) and not name.endswith(_CONSTANTS)]
    tied = {name for name in known if config.tied_embeddings and name.endswith("lm_head.weight")} - wanted
    weights.require_names(set(known) - tied, wanted, tensors.source)
    for name in tied:  # some files hold the embedding twice; transformers takes a head of its own, whatever is said
        if not np.array_equal(tensors[name], tensors[f"{prefix}embed_tokens.weight"]):
            differs = f"tensor {name!r} is not the embedding, to which config.json ties it"
            raise OmniError(f"{tensors.source}: {differs}; set tie_word_embeddings to false")
    return places


def read_transformer(
    config: TransformerConfig, tensors: NamedTensors, places: Iterable[Place], published: int, mesh: Mesh | None
) -> Transformer:
    """A transformer filled tensor by tensor: besides devices, about one tensor is held at a time.

    Matrices are kept in the type of `config.compute_dtype`, norms in float32.

    Args:
      published: rows of the embedding and the head in the checkpoint; those behind them become the mean of these.
      mesh: the devices over which parameters are laid out by `ShardingRules`; None for one.

    Raises:
      OmniError: a tensor of another shape, or one that is not finite.
    """
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    groups: dict[str, list[Place]] = {}
    for place in places:
        groups.setdefault(place.ours, []).append(place)
    flat = {".".join(path): (path, variable) for path, variable in nnx.to_flat_state(state)}
    for name, (_, variable) in flat.items():  # all shapes before anything is made of them
        shape = variable.get_value().shape
        for place in groups[name]:
            rows = published if name in _VOCABULARY else shape[0]
            _require_shape(tensors, place, (rows, *shape[1:]) if place.layer is None else shape[1:])
    filled = []
    for name, (path, variable) in flat.items():
        shape, axes = variable.get_value().shape, variable.get_metadata()["axes"]
        dtype = jnp.float32 if "norm" in name else jnp.dtype(config.compute_dtype)
        if groups[name][0].layer is None:
            array = _whole(_finite(tensors, groups[name][0]), shape, dtype, _sharding(mesh, axes, shape))
        else:
            array = _stacked(tensors, groups[name], shape, dtype, mesh, axes)
        filled.append((path, variable.replace(array)))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _sharding(mesh: Mesh | None, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> Sharding:
    if mesh is None:
        return SingleDeviceSharding(jax.devices()[0])
    return named_sharding(axes, ShardingRules(), mesh, shape)


def _whole(value: np.ndarray, shape: tuple[int, ...], dtype: jnp.dtype, sharding: Sharding) -> Array:
    """A parameter from its first rows; each device is given its part, in which the rows behind them are their mean."""
    grown = value.shape[0] < shape[0]
    mean = value.mean(0, dtype=np.float64).astype(np.float32) if grown else None

    def part(index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(shape[0])
        known = value[start : min(stop, len(value))][(slice(None), *index[1:])]
        if len(known) == stop - start:
            return known.astype(dtype, copy=False)
        rows = np.empty((stop - start, *known.shape[1:]), dtype)  # the one copy that there is
        rows[: len(known)] = known
        rows[len(known) :] = mean[index[1:]]
        return rows

    return jax.make_array_from_callback(shape, sharding, part)


def _stacked(
    tensors: NamedTensors,
    places: Iterable[Place],
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    mesh: Mesh | None,
    axes: tuple[str | None, ...],
) -> Array:
    """A parameter of all layers, into which each layer's tensor is written where it lies."""
    sharding, own = _sharding(mesh, axes, shape), _sharding(mesh, axes[1:], shape[1:])
    stack = jnp.zeros(shape, dtype, device=sharding)
    write = jax.jit(_write_layer, donate_argnums=0, out_shardings=sharding)
    for place in places:
        value = to_ours(place.ours, _finite(tensors, place), shape[1:])
        stack = write(stack, placed(value.astype(dtype, copy=False), own), place.layer)
    return stack


def _write_layer(stack: Array, value: Array, layer: Int[Array, ""]) -> Array:
    """A stack [depth, ...] with `value` [...] in place of one of its layers."""
    return jax.lax.dynamic_update_index_in_dim(stack, value, layer, 0)


def _require_shape(tensors: NamedTensors, place: Place, shape: tuple[int, ...]) -> None:
    """An OmniError if a tensor, which is not read, has another shape than our parameter (or its layer) asks for."""
    found, needed = tensors.shape(place.theirs), their_shape(place.ours, shape)
    if found != needed:
        shapes = f"{list(found)}, config.json needs {list(needed)}"
        raise OmniError(f"{tensors.source}: tensor {place.theirs!r} has the shape {shapes}")


def _finite(tensors: NamedTensors, place: Place) -> Float[np.ndarray, "*shape"]:
    """A tensor of the checkpoint, float32; OmniError if it is damaged."""
    value = tensors[place.theirs]
    if not np.isfinite(value).all():
        source, name = tensors.source, place.theirs
        raise OmniError(f"{source}: tensor {name!r} holds values that are not finite; the file is damaged")
    return value


# Layouts


def their_shape(ours: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in the checkpoint of one layer (or the whole) of a parameter."""
    inputs = INPUTS.get(ours.removeprefix("blocks."))
    return shape if inputs is None else (math.prod(shape[inputs:]), math.prod(shape[:inputs]))


def to_ours(ours: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of the checkpoint, outputs first, in our layout: inputs first, heads apart."""
    return value.T.reshape(shape) if ours.removeprefix("blocks.") in INPUTS else value


def to_theirs(ours: str, value: np.ndarray) -> np.ndarray:
    """The inverse of `to_ours`."""
    if ours.removeprefix("blocks.") not in INPUTS:
        return value
    outputs, inputs = their_shape(ours, value.shape)
    return value.reshape(inputs, outputs).T


def their_shapes(transformer: Transformer, places: Collection[Place]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a checkpoint, in the order of `places`."""
    shapes = weights.shapes(nnx.state(transformer, nnx.Param))
    own = {place: shapes[place.ours][0 if place.layer is None else 1 :] for place in places}
    return {place.theirs: their_shape(place.ours, shape) for place, shape in own.items()}


def their_tensors(transformer: Transformer, places: Iterable[Place]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a checkpoint, float32, one fetched from the devices at a time."""
    parameters: Mapping[str, nnx.Variable] = {
        ".".join(path): variable for path, variable in nnx.to_flat_state(nnx.state(transformer, nnx.Param))
    }
    for place in places:
        value = parameters[place.ours][...] if place.layer is None else parameters[place.ours][place.layer]
        yield place.theirs, to_theirs(place.ours, np.asarray(value).astype(np.float32))
