"""Cross-entropy in chunks is cross-entropy, and the logits of a whole batch never exist."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni.model.code_nets import CodeHead
from omni.model.transformer import project
from omni.train.cross_entropy import token_losses

BATCH, LENGTH, DIM, VOCABULARY = 3, 26, 16, 97


def example():
    random = np.random.default_rng(0)
    features = random.normal(size=(BATCH, LENGTH, DIM)).astype(np.float32)
    head = random.normal(size=(VOCABULARY, DIM)).astype(np.float32)
    ids = random.integers(0, VOCABULARY, (BATCH, LENGTH)).astype(np.int32)
    return features, head, ids, random.uniform(size=(BATCH, LENGTH)).astype(np.float32)


def plain(features, head, ids, weights):
    """All logits at once."""
    logits = jnp.einsum("bld,vd->blv", features, head)
    log_denominator = jax.nn.logsumexp(logits, -1)
    entropy = log_denominator - jnp.take_along_axis(logits, ids[..., None], -1)[..., 0]
    return jnp.mean(weights * entropy + 1e-2 * log_denominator**2)


def chunked(chunk):
    def loss(features, head, ids, weights):
        found = token_losses(features, head, ids, chunk=chunk)
        return jnp.mean(weights * found.cross_entropy + 1e-2 * found.log_denominator**2)

    return loss


@pytest.mark.parametrize("chunk", [1, 4, 13, 25, 26, 1000])
def test_equals_plain_cross_entropy(chunk):
    """Value and both gradients, with weights and z-loss, within 1e-6."""
    arguments = example()
    expected = jax.value_and_grad(plain, (0, 1))(*arguments)
    found = jax.jit(jax.value_and_grad(chunked(chunk), (0, 1)))(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


@pytest.mark.parametrize("chunk", [4, 1000])
def test_codes_with_a_head_of_their_own_stand_behind_the_others(chunk):
    """Value and all gradients are those of the logits of both heads, side by side."""
    features, head, _, weights = example()
    random = np.random.default_rng(1)
    codes = CodeHead(*(np.float32(random.normal(size=shape)) for shape in ((DIM, DIM), (DIM,), (40, DIM), (40,))))
    ids = random.integers(0, VOCABULARY + 40, (BATCH, LENGTH)).astype(np.int32)

    def whole(features, head, codes):
        logits = project(features, head, codes)
        assert logits.shape[-1] == VOCABULARY + 40
        log_denominator = jax.nn.logsumexp(logits, -1)
        entropy = log_denominator - jnp.take_along_axis(logits, ids[..., None], -1)[..., 0]
        return jnp.mean(weights * entropy + 1e-2 * log_denominator**2)

    def in_chunks(features, head, codes):
        found = token_losses(features, head, ids, codes, chunk=chunk)
        return jnp.mean(weights * found.cross_entropy + 1e-2 * found.log_denominator**2)

    expected, found = (jax.value_and_grad(each, (0, 1, 2))(features, head, codes) for each in (whole, in_chunks))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)
    likeliest = np.argmax(project(features, head, codes), -1)
    np.testing.assert_array_equal(token_losses(features, head, ids, codes, chunk=chunk).correct, ids == likeliest)
    assert token_losses(features, head, likeliest, codes, chunk=chunk).correct.all()


def test_which_are_correct():
    """Those whose id has the largest logit."""
    features, head, ids, _ = example()
    likeliest = np.argmax(features @ head.T, -1)
    ids[:, ::2] = likeliest[:, ::2]
    np.testing.assert_array_equal(token_losses(features, head, ids, chunk=5).correct, ids == likeliest)


def test_no_array_holds_all_logits():
    """Forward and backward, no more than a chunk's logits exist at once in the compiled program."""
    text = jax.jit(jax.grad(chunked(4), (0, 1))).lower(*example()).compile().as_text()
    sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"f32\[([\d,]+)\]", text)]
    assert BATCH * 4 * VOCABULARY in sizes
    assert max(sizes) < BATCH * LENGTH * VOCABULARY / 2
