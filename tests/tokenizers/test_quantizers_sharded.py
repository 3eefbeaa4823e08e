"""Quantisers on several devices: what they count is summed, and what they draw is the same everywhere."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
from host_devices import host_devices

FOUR_DEVICES = """
    import json, sys
    import jax, numpy as np, optax
    from flax import nnx
    from jax.sharding import NamedSharding, PartitionSpec
    from omni.sharding import MeshConfig, make_mesh
    from omni_tokenizers.quantizers import (
        LearnedQuantizerConfig, ResidualQuantizerConfig, VectorQuantizerConfig, make_quantizer
    )

    # A threshold above 1 restarts about half of the codes at every step.
    moving = VectorQuantizerConfig(codebook_size=16, dim=4, decay=0.5, restart_threshold=1.2)
    configs = {
        "ema": moving,
        "learned": LearnedQuantizerConfig(codebook_size=16, dim=4, code_dim=3, normalize="search"),
        "dropout": ResidualQuantizerConfig(3, moving, dropout=0.5),
    }
    optimizer = optax.sgd(1.0)

    def run(config, devices):
        mesh = make_mesh(MeshConfig(data=devices), jax.devices()[:devices])
        graphdef, params, rest = nnx.split(make_quantizer(config, rngs=nnx.Rngs(0)), nnx.Param, ...)

        @jax.jit
        def step(params, rest, z, weights, key):
            def loss(params):
                net = nnx.merge(graphdef, params, rest, copy=True)
                result = net(z, key, training=True, weights=weights)
                total = ((result.quantized - z) ** 2).mean() + result.commitment + result.auxiliary
                return total, (result, nnx.state(net, nnx.Not(nnx.Param)))

            (_, (result, rest)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
            return optax.apply_updates(params, jax.tree.map(lambda g: -g, gradients)), rest, result

        split = NamedSharding(mesh, PartitionSpec("data"))
        whole = NamedSharding(mesh, PartitionSpec())
        params, rest = jax.device_put((params, rest), whole)
        results = []
        for index in range(4):
            generator = np.random.default_rng(index)
            z = generator.normal(size=(8, 12, 4)).astype(np.float32)
            weights = (generator.random((8, 12)) < 0.8).astype(np.float32)
            z, weights = jax.device_put((z, weights), split)
            params, rest, result = step(params, rest, z, weights, jax.device_put(jax.random.key(index), whole))
            assert len(z.sharding.device_set) == devices
            results.append(result)
        states = [
            {tuple(map(str, path)): [np.asarray(shard.data) for shard in leaf[...].addressable_shards]
             for path, leaf in nnx.to_flat_state(state)}
            for state in (params, rest)
        ]
        return results, states

    found = {}
    for name, config in configs.items():
        (one, one_state), (four, four_state) = run(config, 1), run(config, 4)
        apart = lambda a, b: float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max())
        found[name] = {
            "codes": all((np.asarray(a.codes) == np.asarray(b.codes)).all() for a, b in zip(one, four)),
            "results": max(apart(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four))),
            "state": max(
                apart(a[path][0], shard) for a, b in zip(one_state, four_state) for path in a for shard in b[path]
            ),
            "shards": [len(shards) for state in four_state for shards in state.values()],
            "moved": apart(*(np.asarray(result.quantized) for result in (one[0], one[3]))),
        }
    json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def found():
    environment = host_devices(4)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-c", textwrap.dedent(FOUR_DEVICES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["ema", "learned", "dropout"])
def test_four_devices_compute_what_one_does(found, name):
    """Four steps with the batch split over four devices: the same codes, figures and state, on every device.

    The start by k-means, restarts of half of the codes, dropped levels, masks and gradients take part.
    """
    result = found[name]
    assert result["codes"]
    assert result["results"] < 1e-4 and result["state"] < 1e-4
    assert set(result["shards"]) == {4} and result["moved"] > 0.1
