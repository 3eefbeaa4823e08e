"""Adapters of blocks' matrices: what they compute beside an obvious reference, where they begin, and their merging."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from transformer_cases import TINY, VARIANTS, apply_model, batch, noisy_model
from transformer_reference import forward

from omni.model import Transformer
from omni.model.lora import Lora, attach, merged
from omni.model.transformer import INPUTS
from omni_tokenizers.errors import UsageError

PAIRS = {  # the two sides of an adapter, multiplied
    "query": "ler,lrhk->lehk",
    "key": "ler,lrhk->lehk",
    "value": "ler,lrhk->lehk",
    "output": "lhkr,lre->lhke",
    "gate": "ler,lrm->lem",
    "up": "ler,lrm->lem",
    "down": "lmr,lre->lme",
}


def adapted(config, lora: Lora, *, noise: bool) -> Transformer:
    """The noisy model with adapters; `noise` fills their second sides, too."""
    model = nnx.merge(*nnx.split(noisy_model(config)), copy=True)
    attach(model, lora, nnx.Rngs(0))
    random = np.random.default_rng(1)
    for name in lora.matrices if noise else ():
        second = getattr(model.blocks, f"{name}_lora_b")
        second[...] = 0.25 * random.standard_normal(second.shape)
    return model


@pytest.mark.parametrize("name", ["pre rms", "swin layer"])
def test_adapters_are_added_to_their_matrices(name):
    """Logits are those of the obvious float64 transformer with W + (alpha / rank) A B in the place of each W, and those
    of the merged model, which has no adapters."""
    config, (ids, positions, segments) = VARIANTS[name], batch()
    model = adapted(config, Lora(rank=3, alpha=6.0), noise=True)
    logits = apply_model(model, ids, positions, segments)
    parameters = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    blocks = parameters["blocks"]
    for matrix, pair in PAIRS.items():
        a, b = (blocks.pop(f"{matrix}_lora_{side}") for side in "ab")
        change = 2 * np.einsum(pair, a, b)
        assert np.abs(change).max() > 0.1
        blocks[matrix] = blocks[matrix] + change
    expected = np.stack([forward(config, parameters, *row) for row in zip(ids, positions, segments, strict=True)])
    bound = 1e-5 * max(1, np.abs(expected).max())
    np.testing.assert_allclose(logits, expected, atol=bound)

    whole = merged(model)
    assert nnx.to_pure_dict(nnx.state(whole)).keys() == nnx.to_pure_dict(nnx.state(noisy_model(config))).keys()
    np.testing.assert_allclose(apply_model(whole, ids, positions, segments), logits, atol=bound)
    assert "query_lora_a" in vars(model.blocks)  # and the adapted one is what it was
    np.testing.assert_array_equal(apply_model(model, ids, positions, segments), logits)
    for one, other in zip(*(jax.tree.leaves(nnx.state(each)) for each in (whole, merged(model))), strict=True):
        np.testing.assert_array_equal(one, other)


def test_they_begin_with_the_model_itself():
    """Fresh adapters change no bit, and only the chosen matrices have some."""
    ids, positions, segments = batch()
    model = adapted(TINY, Lora(rank=4, matrices=("query", "down")), noise=False)
    before = apply_model(noisy_model(TINY), ids, positions, segments)
    np.testing.assert_array_equal(apply_model(model, ids, positions, segments), before)
    added = {name for name in vars(model.blocks) if "_lora_" in name}
    assert added == {"query_lora_a", "query_lora_b", "down_lora_a", "down_lora_b"}
    assert all(np.abs(getattr(model.blocks, f"{name}_lora_a")[...]).max() > 0.1 for name in ("query", "down"))


def test_what_cannot_be_adapted():
    """It is said by name, with what to choose."""
    with pytest.raises(UsageError, match=r"lora matrices name 'head'; choose among query, key"):
        Lora(matrices=("head",))
    with pytest.raises(UsageError, match="lora has rank 0"):
        Lora(rank=0)
    with pytest.raises(UsageError, match="lora matrices are none"):
        Lora(matrices=())
    model = Transformer(dataclasses.replace(TINY, experts=2), rngs=nnx.Rngs(0))
    with pytest.raises(UsageError, match="'down', of which each expert has its own"):
        attach(model, Lora(), nnx.Rngs(0))
    attach(model, Lora(matrices=tuple(INPUTS)[:4]), nnx.Rngs(0))
