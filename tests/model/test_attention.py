"""Attention in pieces and by other kernels is attention."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformer_cases import TINY

from omni.model import splash
from omni.model.attention import attend
from omni_tokenizers.errors import UsageError


def example(length, heads=4, groups=2, head_dim=12, batch=2):
    random = np.random.default_rng(0)
    query, key, value = (
        random.normal(size=(batch, length, n, head_dim)).astype(np.float32) for n in (heads, groups, groups)
    )
    cuts = np.sort(random.integers(1, length, (batch, 3)))
    segments = (np.arange(length)[None] >= cuts[:, :, None]).sum(1) + 1
    segments[segments == 4] = 0  # padding at the end
    return query, key, value, segments.astype(np.int32)


def dense(query, key, value, segments):
    """Each row, head and query by itself, in float64."""
    read = np.zeros(query.shape)
    for row, own in enumerate(segments):
        for head in range(query.shape[2]):
            group = head * key.shape[2] // query.shape[2]
            for place in range(query.shape[1]):
                seen = np.flatnonzero((own == own[place]) & (np.arange(len(own)) <= place))
                scores = key[row, seen, group].astype(np.float64) @ query[row, place, head] / np.sqrt(query.shape[3])
                shares = np.exp(scores - scores.max())
                read[row, place, head] = shares / shares.sum() @ value[row, seen, group]
    return read


@pytest.mark.parametrize("block", [1, 7, 16, 40, 100])
def test_blocks_of_queries(block):
    """However many queries at once: the values of the obvious reference, and one block's gradients."""
    arguments = example(40)
    config = dataclasses.replace(TINY, attention_blocks=(block, 1))
    whole = dataclasses.replace(TINY, attention_blocks=(40, 1))
    np.testing.assert_allclose(attend(config, *arguments)[0], dense(*arguments), atol=1e-5)

    def loss(config):
        return lambda *qkv: jnp.sum(jnp.sin(attend(config, *qkv, arguments[3])[0]))

    gradients = [jax.jit(jax.grad(loss(each), (0, 1, 2)))(*arguments[:3]) for each in (config, whole)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *gradients)


def test_splash_is_attention():
    """The TPU kernel, interpreted: values of the reference, and gradients of the blocks'."""
    query, key, value, segments = example(256, heads=2, groups=1, head_dim=128, batch=1)
    kernel = splash.make(2, 256, (128, 128), 1, 1, interpret=True)

    def read(query, key, value):
        return splash.attend(kernel, query, key, value, segments, segments, 0)

    def blocks(query, key, value):
        return attend(TINY, query, key, value, segments)[0]

    np.testing.assert_allclose(read(query, key, value), dense(query, key, value, segments), atol=1e-5)
    gradients = [
        jax.grad(lambda *qkv, f=f: jnp.sum(jnp.sin(f(*qkv))), (0, 1, 2))(query, key, value) for f in (read, blocks)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *gradients)


def test_a_kernel_that_cannot_run_is_an_error():
    """It is never replaced by another one."""
    with pytest.raises(UsageError, match=r'"splash" runs on TPUs, these devices are cpu; set model.attention to "xla"'):
        attend(dataclasses.replace(TINY, attention="splash"), *example(8))
