"""Weights and caches in int8 beside whole numbers and scales by hand."""

import dataclasses
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from transformer_cases import TINY, VARIANTS, noisy_model

from omni.model import apply_decoder, init_cache, make_decoder
from omni.model.decode import attend_cache
from omni.model.quantized import check_dtype, dequantized, quantized
from omni_tokenizers.errors import OmniError, UsageError

apply = jax.jit(apply_decoder)
CONFIGS = VARIANTS | {"experts": dataclasses.replace(TINY, experts=3, experts_per_token=2)}
AXES = {
    **dict.fromkeys(("query", "key", "value"), (1, 2)),
    **dict.fromkeys(("gate", "up", "down"), (1, 1)),
    "output": (2, 1),
}
"""How many axes each matrix sums over, and how many its outputs have."""


def by_hand(weight: np.ndarray, inputs: int, outputs: int) -> np.ndarray:
    """A matrix after its whole numbers, one output after another: `inputs` axes, then `outputs` axes, at its end."""
    flat = np.array(weight, np.float32).reshape(-1, *weight.shape[weight.ndim - inputs - outputs :])
    for matrix in flat:
        columns = matrix.reshape(int(np.prod(matrix.shape[:inputs])), -1)
        for output in range(columns.shape[1]):
            scale = np.abs(columns[:, output]).max() / np.float32(127)
            columns[:, output] = np.clip(np.round(columns[:, output] / scale), -127, 127) * scale
    return flat.reshape(weight.shape)


@pytest.mark.parametrize("name", CONFIGS)
def test_int8_weights_compute_with_whole_numbers_times_scales(name):
    """Logits are those of a float decoder whose matrices were rounded by hand, and not those of the unrounded ones."""
    config = CONFIGS[name]
    model = noisy_model(config)
    rounded = nnx.clone(model)
    for weight, axes in AXES.items():
        parameter = getattr(rounded.blocks, weight)
        parameter[...] = by_hand(parameter[...], *axes)
    expected = make_decoder(rounded)
    expected = dataclasses.replace(expected, head=by_hand(np.asarray(model.output_weights()).T, 1, 1).T)
    decoder = make_decoder(model, "int8")
    random = np.random.default_rng(0)
    ids, positions = random.integers(0, 64, (3, 9), np.int32), random.integers(0, 40, (3, 9, 3), np.int32)

    def logits(decoder):
        return np.asarray(apply(decoder, ids, positions, np.zeros(3, np.int32), init_cache(config, 3, 12))[0])

    found, wanted, plain = logits(decoder), logits(expected), logits(make_decoder(model))
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
    assert np.abs(found - plain).max() > 1e-3 * np.abs(plain).max()


def test_bytes_of_int8():
    """Matrices of layers and the head take a byte a number, and four an output; norms, routers and the embedding stay
    float32; a cache takes a byte a number, and four a head and slot."""
    config = CONFIGS["experts"]
    decoder, plain = make_decoder(noisy_model(config), "int8"), make_decoder(noisy_model(config))
    for name, weight in plain.layers[0].items():
        held = decoder.layers[0][name]
        if "norm" in name or name == "router":
            assert held.dtype == "float32" and held.nbytes == weight.nbytes
            continue
        inputs = {"query": 24, "key": 24, "value": 24, "output": 48, "gate": 24, "up": 24, "down": 32}[name]
        assert sum(x.nbytes for x in jax.tree.leaves(held)) == weight.size + 4 * weight.size // inputs
    assert decoder.embedding.dtype == "float32" and decoder.norm.dtype == "float32"
    assert sum(x.nbytes for x in jax.tree.leaves(decoder.head)) == plain.head.size + 4 * config.vocabulary_size
    numbers = 2 * config.depth * 5 * config.key_value_heads * 7
    held = sum(x.nbytes for x in jax.tree.leaves(init_cache(config, 5, 7, "int8")))
    assert held == numbers * (config.head_dim + 4)


def test_bfloat16_weights_compute_in_the_compute_type():
    """Held in bfloat16, they are float32 in products: logits are those of parameters that were rounded so before."""
    model = noisy_model(TINY)
    rounded = nnx.clone(model)
    nnx.update(rounded, jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), nnx.state(rounded, nnx.Param)))
    for name, parameter in vars(rounded.blocks).items():
        if "norm" in name:
            parameter[...] = getattr(model.blocks, name)[...]
    rounded.norm[...] = model.norm[...]
    ids, positions = np.arange(8, dtype=np.int32)[None], np.zeros((1, 8, 3), np.int32)

    def logits(decoder):
        return np.asarray(apply(decoder, ids, positions, np.zeros(1, np.int32), init_cache(TINY, 1, 8))[0])

    decoder, wanted = make_decoder(model, "bfloat16"), logits(make_decoder(rounded))
    assert decoder.layers[0]["query"].dtype == decoder.embedding.dtype == decoder.head.dtype == "bfloat16"
    np.testing.assert_allclose(logits(decoder), wanted, atol=1e-5 * np.abs(wanted).max())


def test_int8_cache_reads_what_it_wrote_rounded():
    """Two pieces of two rows, written into rows 2 and 0 of three: queries read float64 attention over keys and values
    that were rounded by hand, each head of each slot by itself; a row and slots that do not exist take nothing."""
    random = np.random.default_rng(0)
    rows = np.array([2, 0, 3], np.int32)
    query = random.normal(size=(3, 6, 4, 12)).astype(np.float32)
    sizes = np.array([1, 9], np.float32)[:, None]  # of the two heads
    key, value = (random.normal(size=(3, 6, 2, 12)).astype(np.float32) * sizes for _ in range(2))
    cache = init_cache(TINY, 3, 6, "int8")[0]
    found = []
    for piece in (slice(0, 4), slice(4, 6)):
        slots = np.broadcast_to(np.arange(6, dtype=np.int32)[piece], (3, len(range(*piece.indices(6)))))
        slots = np.where(rows[:, None] == 3, 6, slots)
        read, cache = attend_cache(cache, slots, rows, query[:, piece], key[:, piece], value[:, piece])
        found.append(np.asarray(read))
    found = np.concatenate(found, axis=1)
    held = [by_hand(x[..., None], 1, 1)[..., 0] for x in (key, value)]
    for row in (0, 1):
        for head in range(4):
            keys, values = (x[row, :, head // 2].astype(np.float64) for x in held)
            scores = query[row, :, head].astype(np.float64) @ keys.T / np.sqrt(12)
            scores = np.where(np.tri(6, dtype=bool), scores, -np.inf)
            shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
            wanted = shares / shares.sum(axis=-1, keepdims=True) @ values
            np.testing.assert_allclose(found[row, :, head], wanted, atol=1e-5 * np.abs(wanted).max())
    assert all(not np.asarray(x)[1].any() for x in jax.tree.leaves(cache)), "the row of nobody"


def test_no_number_moves_by_more_than_half_its_scale():
    """The largest and the smallest too; zeros stay zeros, whatever the size of their neighbours."""
    x = np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32) * np.logspace(-6, 6, 40)[:, None]
    x[3] = 0
    held = quantized(x.astype(np.float32), (-1,))
    assert held.qvalue.dtype == "int8" and held.scale.shape == (40, 1) and held.scale.dtype == "float32"
    moved = np.abs(np.asarray(dequantized(held)) - x)
    assert (moved <= 0.5001 * np.asarray(held.scale)).all() and not np.asarray(dequantized(held))[3].any()


def test_what_cannot_be_held_is_refused(monkeypatch):
    """Another type, by name; int8 where qwix is missing, with what to install."""
    check_dtype("cache_dtype", None)
    check_dtype("cache_dtype", "int8")
    with pytest.raises(UsageError, match="cache_dtype is 'int4'; choose one of float32, bfloat16, int8"):
        check_dtype("cache_dtype", "int4")
    monkeypatch.setitem(sys.modules, "qwix", None)
    check_dtype("cache_dtype", "bfloat16")
    with pytest.raises(OmniError, match=r"needs the package qwix: pip install 'omni-any-to-any\[int8\]'"):
        check_dtype("cache_dtype", "int8")
