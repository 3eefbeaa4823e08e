"""Attention in pieces and by other kernels is attention."""

import dataclasses
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from host_devices import host_devices
from transformer_cases import TINY

from omni.model import splash
from omni.model.attention import attend, balanced_order
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
    kernel = splash.make(2, np.arange(256, dtype=np.int32), (128, 128), 1, 1, interpret=True)

    def read(query, key, value):
        return splash.attend(kernel, query, key, value, segments, segments, None)

    def blocks(query, key, value):
        return attend(TINY, query, key, value, segments)[0]

    np.testing.assert_allclose(read(query, key, value), dense(query, key, value, segments), atol=1e-5)
    gradients = [
        jax.grad(lambda *qkv, f=f: jnp.sum(jnp.sin(f(*qkv))), (0, 1, 2))(query, key, value) for f in (read, blocks)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *gradients)


@pytest.mark.parametrize(("length", "count"), [(8, 2), (48, 8), (40, 5)])
def test_the_balanced_order_is_fair(length, count):
    """Every token stands in it once, and all devices have equally many tokens before theirs."""
    order = balanced_order(length, count)
    assert sorted(order) == list(range(length))
    assert len({stretch.sum() for stretch in order.reshape(count, -1)}) == 1


SPLIT = """
    import dataclasses, functools, jax, numpy as np
    from test_attention import TINY, example
    from omni.model import attention, splash
    from omni.sharding import MeshConfig, ShardingRules, activations_on, make_mesh

    splash.make = functools.partial(splash.make, interpret=True)
    attention.check_kernel = lambda config: None
    query, key, value, segments = example(1024, heads=4, groups=2, head_dim=128, batch=1)

    def sines(config, order, *parts):
        read = attention.attend(config, *parts, order)[0]
        return jax.numpy.sin(read).sum(), read

    def both(config, order, *parts):
        whole = jax.value_and_grad(functools.partial(sines, config, order), (0, 1, 2), has_aux=True)
        (_, read), gradients = jax.jit(whole)(*parts)
        return read, *gradients

    expected = both(TINY, None, query, key, value, segments)
    for kernel in ("splash", "xla"):
        config = dataclasses.replace(TINY, attention=kernel, attention_blocks=(128, 128))
        with activations_on(make_mesh(MeshConfig(data=1, context=2, tensor=2)), ShardingRules()):
            order = attention.row_order(1024)
            assert order is not None
            for order in (order, None):
                how = np.arange(1024) if order is None else order
                parts = [x[:, how] for x in (query, key, value, segments)]
                for found, one in zip(both(config, order, *parts), expected, strict=True):
                    np.testing.assert_allclose(found, one[:, how], rtol=1e-5, atol=1e-5)
"""


def test_split_over_devices_it_is_attention():
    """Queries split along length and heads over four devices, in the balanced order and as they come, by both kernels:
    values and gradients."""
    command = [sys.executable, "-c", textwrap.dedent(SPLIT)]
    environment = host_devices(4)
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_kernel_that_cannot_run_is_an_error():
    """It is never replaced by another one."""
    with pytest.raises(UsageError, match=r'"splash" runs on TPUs, these devices are cpu; set model.attention to "xla"'):
        attend(dataclasses.replace(TINY, attention="splash"), *example(8))
