"""Cached decoding equals the plain forward."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformer_cases import TINY, VARIANTS, apply_model, noisy_model

from omni.model import apply_decoder, init_cache, make_decoder

CAPACITY, PROMPT = 12, 7
MODELS = {name: noisy_model(config) for name, config in VARIANTS.items()}
DECODERS = {name: make_decoder(model) for name, model in MODELS.items()}
apply = jax.jit(apply_decoder)


@settings(max_examples=25)
@given(
    name=st.sampled_from(sorted(VARIANTS)),
    lengths=st.lists(st.integers(1, PROMPT), min_size=3, max_size=3),
    seed=st.integers(0, 2**16),
)
def test_prefill_and_steps_equal_forward(name, lengths, seed):
    """Right-padded prompts of different lengths, then steps: each row gives its own forward's logits."""
    model, random, lengths = MODELS[name], np.random.default_rng(seed), np.array(lengths, np.int32)
    rows = np.arange(3)
    ids = random.integers(0, TINY.vocabulary_size, (3, CAPACITY), dtype=np.int32)
    positions = random.integers(0, 40, (3, CAPACITY, 3), dtype=np.int32)
    expected = np.asarray(apply_model(model, ids, positions, None))

    padding = np.arange(PROMPT) >= lengths[:, None]
    prompt = np.where(padding, random.integers(0, TINY.vocabulary_size, (3, PROMPT)), ids[:, :PROMPT])
    places = np.where(padding[..., None], 10_000, positions[:, :PROMPT])
    decoder = DECODERS[name]
    dirty = jax.tree.map(lambda x: x + 100.0, init_cache(model.config, 3, CAPACITY))
    logits, cache = apply(decoder, prompt, places, np.zeros(3, np.int32), dirty)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logits[row, :length], expected[row, :length], atol=1e-5 * np.abs(expected).max())
    for step in range(CAPACITY - PROMPT):
        slots = lengths + step
        logits, cache = apply(decoder, ids[rows, slots][:, None], positions[rows, slots][:, None], slots, cache)
        np.testing.assert_allclose(logits[:, 0], expected[rows, slots], atol=1e-5 * np.abs(expected).max())


def test_prefill_in_pieces():
    """Several tokens at once, from a row's own slot, see all slots before them; those past the capacity are dropped."""
    model, random = MODELS["pre rms"], np.random.default_rng(0)
    ids = random.integers(0, TINY.vocabulary_size, (2, CAPACITY), dtype=np.int32)
    positions = random.integers(0, 40, (2, CAPACITY, 3), dtype=np.int32)
    expected = np.asarray(apply_model(model, ids, positions, None))
    decoder, cache = DECODERS["pre rms"], init_cache(model.config, 2, CAPACITY)
    _, cache = apply(decoder, ids[:, :8], positions[:, :8], np.zeros(2, np.int32), cache)
    slots = np.array([8, 5], np.int32)
    take = slots[:, None] + np.arange(6)
    inside = take % CAPACITY  # beyond the capacity: other tokens
    rows = np.arange(2)[:, None]
    logits, cache = apply(decoder, ids[rows, inside], positions[rows, inside], slots, cache)
    valid = take < CAPACITY
    np.testing.assert_allclose(logits[valid], expected[rows, inside][valid], atol=1e-5 * np.abs(expected).max())
    again, _ = apply(decoder, ids[:, -1:], positions[:, -1:], np.full(2, CAPACITY - 1, np.int32), cache)
    np.testing.assert_allclose(again[0, 0], expected[0, -1], atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("sizes", [(32,), (8, 8, 8, 8), (2, 16, 1, 13), (20, 4, 4, 4)])
def test_pieces_are_the_whole_and_read_what_is_there(sizes, monkeypatch):
    """However a prompt is cut, its logits are those of the whole, in rows that begin apart and beside padding that the
    cache has no room for. What lies beyond twice the tokens read, not even a number, is never touched by a piece."""
    monkeypatch.setattr("omni.model.attention.QUERIES", 4)
    model, random, late = MODELS["pre rms"], np.random.default_rng(0), 3
    length = sum(sizes)
    ids = random.integers(0, TINY.vocabulary_size, (2, length), dtype=np.int32)
    positions = random.integers(0, 40, (2, length, 3), dtype=np.int32)
    expected = np.asarray(apply_model(model, ids, positions, None))
    decoder, step = DECODERS["pre rms"], jax.jit(lambda *arguments: apply_decoder(*arguments))  # no trace of `apply`
    cache = init_cache(model.config, 2, length + 1)
    _, cache = step(decoder, ids[:, :late], positions[:, :late], np.zeros(2, np.int32), cache)
    starts = np.array([0, late], np.int32)  # the second row goes on after what both have read, the first begins anew
    for size in sizes:
        take = np.minimum(starts[:, None] + np.arange(size), length - 1)  # the second row's end is padding
        rows, ends = np.arange(2)[:, None], starts + size
        beyond = 2 * ends.max() if size > 1 else length + 1
        cache = jax.tree.map(lambda x, beyond=beyond: x.at[:, :, beyond:].set(jnp.nan), cache)
        logits, cache = step(decoder, ids[rows, take], positions[rows, take], starts, cache)
        cache = jax.tree.map(jnp.nan_to_num, cache)
        inside = starts[:, None] + np.arange(size) < length
        wanted = expected[rows, take][inside]
        np.testing.assert_allclose(logits[inside], wanted, atol=1e-5 * np.abs(expected).max())
        starts = ends


@pytest.mark.parametrize("length", [1, 8])
@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_positions_are_turned_into_angles_once(name, length):
    """Cosines and sines are computed once in a program, of a token or a prompt, and not in every layer."""
    ids, positions = np.zeros((2, length), np.int32), np.zeros((2, length, 3), np.int32)
    cache = init_cache(MODELS[name].config, 2, 16)
    text = apply.lower(DECODERS[name], ids, positions, np.zeros(2, np.int32), cache).compile().as_text()
    assert text.count(" cosine(") == text.count(" sine(") == 1


def test_last_selects_one_position():
    """`last` gives the same logits as picking them afterwards."""
    model, random = MODELS["swin layer"], np.random.default_rng(0)
    ids = random.integers(0, TINY.vocabulary_size, (3, 6), dtype=np.int32)
    positions = random.integers(0, 40, (3, 6, 3), dtype=np.int32)
    last = np.array([5, 0, 3], np.int32)
    arguments = DECODERS["swin layer"], ids, positions, np.zeros(3, np.int32), init_cache(model.config, 3, 8)
    picked = apply(*arguments)[0][np.arange(3), last]
    np.testing.assert_allclose(apply(*arguments, last)[0][:, 0], picked, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_decoder_holds_the_compute_type(tied):
    """Matrices and the cache are held in the compute type, norms in float32."""
    config = dataclasses.replace(TINY, compute_dtype="bfloat16", tied_embeddings=tied)
    decoder = make_decoder(noisy_model(config))
    assert decoder.embedding.dtype == decoder.head.dtype == decoder.layers[0]["query"].dtype == "bfloat16"
    assert decoder.norm.dtype == decoder.layers[0]["query_norm"].dtype == "float32"
    assert init_cache(config, 1, 4)[0][0].dtype == "bfloat16"
    assert len(decoder.layers) == config.depth
