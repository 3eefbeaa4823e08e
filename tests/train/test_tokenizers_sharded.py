"""Tokenizers and a critic on several devices: what one device computes, and parameters that are really split."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from flax import nnx
from host_devices import host_devices
from jax.sharding import AbstractMesh
from tokenizer_cases import TASKS

from omni.sharding import MeshConfig, ShardingRules, sharding_tree

SMALL = ("image_vq", "video", "audio_spectral")
WITH_A_CRITIC = """
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
TRAININGS = """
    import dataclasses, json, sys
    import jax
    from tokenizer_cases import TASKS, tokenizer_run
    from omni.data.loader import stack
    from omni.sharding import MeshConfig, activations_on
    from omni.train.program import Program

    def losses(name, mesh, devices):
        config = dataclasses.replace(tokenizer_run("unused", TASKS[name]), mesh=mesh)
        program, examples, found = Program(config, devices), config.task.dataset(0), []
        state = program.start()
        with activations_on(program.mesh, program.rules):
            for step in range(6):
                batch = stack([examples[8 * step + index] for index in range(8)])
                state, metrics = program.train_step()(state, jax.device_put(batch, program.rows))
                total, weight = metrics["loss"]
                found.append(float(total / weight))
        return found

    json.dump({
        name: [losses(name, MeshConfig(), jax.devices()[:1]), losses(name, MeshConfig(data=2, fsdp=4), jax.devices())]
        for name in sys.argv[1:]
    }, sys.stdout)
"""


def on_eight_devices(script: str, *arguments: str) -> dict:
    """What a script prints, as JSON, in a process with eight devices."""
    environment = host_devices(8)
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_eight_devices_compute_what_one_does():
    """On (data 2, fsdp 4): gradients of net and critic, the adaptive weight and all metrics within 1e-3; kernels and
    their moments lie in quarters."""
    result = on_eight_devices(WITH_A_CRITIC)
    assert result["apart"] < 1e-3
    assert result["split"] == [0.25, 0.25] and result["moments"] == 8


@pytest.mark.slow
def test_small_nets_train_on_eight_devices_as_on_one():
    """On (data 2, fsdp 4) the losses of six steps, through codebooks that move and restart, are one device's."""
    for name, (one, eight) in on_eight_devices(TRAININGS, *SMALL).items():
        assert eight == pytest.approx(one, rel=1e-4), name
        assert abs(one[-1] - one[0]) > 0.01 * one[0], name


@pytest.mark.parametrize("name", TASKS)
def test_every_kernel_is_split(name):
    """Along fsdp, two devices have halves of every kernel with an even number of outputs, of every net that can be
    trained. An LSTM's, which each of its steps reads, are whole."""
    params = nnx.state(nnx.eval_shape(lambda: TASKS[name].build(nnx.Rngs(0))), nnx.Param)
    mesh = AbstractMesh((1, 1, 2, 1, 1, 1), tuple(field.name for field in dataclasses.fields(MeshConfig)))
    placed = dict(nnx.to_flat_state(sharding_tree(params, ShardingRules(), mesh)))
    kernels = {
        path: (variable.get_value().shape, placed[path].get_value().spec)
        for path, variable in nnx.to_flat_state(params)
        if path[-1] == "kernel" and "quantizer" not in path
    }
    assert kernels
    for path, (shape, spec) in kernels.items():
        assert spec[-1:] == ("fsdp",) or shape[-1] % 2, path
