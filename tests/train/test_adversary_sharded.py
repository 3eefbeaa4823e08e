"""A tokenizer and its critic on several devices: the gradients of one device, and parameters that are really split."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

EIGHT_DEVICES = """
    import dataclasses, json, sys
    import jax, numpy as np
    from test_adversary import PATCH, started
    from tokenizer_cases import TASKS
    from omni.sharding import MeshConfig, ShardingRules, activations_on, batch_sharding, make_mesh, sharding_tree
    from omni.train.step import accumulate_both
    from omni.train.tokenizers import ImageAdversary

    task = dataclasses.replace(TASKS["vqgan"], adversary=ImageAdversary(features=0.3, discriminator=PATCH))
    _, structures, state, batch = started(task)
    rules = ShardingRules()

    def gradients(mesh):
        shardings, rows = sharding_tree(state, rules, mesh), batch_sharding(rules, mesh)
        placed = jax.device_put(state, shardings), jax.device_put(batch, rows)
        with activations_on(mesh, rules):
            step = jax.jit(lambda s, b: accumulate_both(*structures, task, 1, s, b, jax.random.key(0)))
            gradient, _, critic_gradient, _, metrics = step(*placed)
        return placed[0], jax.device_get((gradient, critic_gradient, metrics))

    _, one = gradients(make_mesh(MeshConfig(), jax.devices()[:1]))
    state, eight = gradients(make_mesh(MeshConfig(data=2, fsdp=4)))
    pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True))
    kernels = [state.params["decoder"]["enter"]["kernel"], state.critic.params["layers"][0]["kernel"]]
    json.dump({
        "apart": max(float(np.abs(a - b).max() / (1e-3 + np.abs(a).max())) for a, b in pairs),
        "split": [kernel[...].addressable_shards[0].data.shape[-1] / kernel[...].shape[-1] for kernel in kernels],
        "moments": state.optimizer[0].mu["decoder"]["enter"]["kernel"][...].addressable_shards[0].data.shape[-1],
    }, sys.stdout)
"""


@pytest.mark.slow
def test_eight_devices_compute_what_one_does():
    """On (data 2, fsdp 4): gradients of net and critic, the adaptive weight and all metrics within 1e-3; kernels and
    their moments lie in quarters."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    command = [sys.executable, "-c", textwrap.dedent(EIGHT_DEVICES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["apart"] < 1e-3
    assert result["split"] == [0.25, 0.25] and result["moments"] == 8
