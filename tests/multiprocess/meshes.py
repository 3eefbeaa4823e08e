"""The same run on several meshes: meshes.py OUTPUT STEPS EXPERTS MESH ..., a MESH as data=2,fsdp=4 or one.

Writes each mesh's losses and gradient of the first step to OUTPUT/MESH.npz; the gradient is the one that the step has
used, as its moments have kept it. What it trains is cut into pieces where a long run would be: a few queries and logits
at a time.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

import jax
import numpy as np
from flax import nnx
from training_cases import language

from omni.data.loader import batches
from omni.sharding import (
    MeshConfig,
    ShardingRules,
    activations_on,
    batch_sharding,
    make_mesh,
    replicated,
    sharding_tree,
)
from omni.train.loop import place
from omni.train.optimizer import OptimizerConfig
from omni.train.step import Metrics, TrainState, make_state, make_train_step

output, steps, experts, *meshes = sys.argv[1:]
config = language(Path(output) / "run", dim=64, steps=int(steps), batch_size=8)
shape = dataclasses.replace(
    config.task.model, heads=8, experts=int(experts), attention_blocks=(5, 1024), remat="blocks", saved=("attention",)
)
task = dataclasses.replace(config.task, model=shape, logits_chunk=5)
optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=10)


def run(mesh: str) -> dict[str, np.ndarray]:
    """Losses and the first gradient."""
    sizes = {axis: int(size) for axis, size in (pair.split("=") for pair in mesh.split(",") if mesh != "one")}
    devices = jax.devices()[:1] if mesh == "one" else jax.devices()
    mesh, rules = make_mesh(MeshConfig(**sizes), devices), ShardingRules()
    rows = batch_sharding(rules, mesh)

    def start():
        return make_state(task, optimizer, int(steps), 0)

    graphdef, abstract = jax.eval_shape(start)
    shardings = sharding_tree(abstract, rules, mesh)
    state = jax.jit(lambda: start()[1], out_shardings=shardings)()
    step = jax.jit(
        make_train_step(graphdef, task, optimizer, int(steps), 0),
        in_shardings=(shardings, rows),
        out_shardings=(shardings, replicated(mesh)),
    )
    data, losses = iter(batches(task.dataset(0), 8)), []
    with activations_on(mesh, rules):
        for number in range(int(steps)):
            state, metrics = step(state, place(next(data), rows, 8))
            losses.append(metrics["loss"])
            if number == 0:
                gradient = first_gradient(*jax.device_get((state, metrics)))
    totals = np.array(jax.device_get(losses))
    return {"losses": totals[:, 0] / totals[:, 1], **gradient}


def first_gradient(state: TrainState, metrics: Metrics) -> dict[str, np.ndarray]:
    """The gradient of the first step, from the running mean that began with it, before clipping."""
    norm = metrics["gradient_norm"][0]
    scale = max(1, norm / optimizer.clip_norm) / (1 - optimizer.beta1)
    means = nnx.to_flat_state(state.optimizer[0].mu)
    return {f"gradient.{'.'.join(map(str, path))}": scale * np.asarray(mean.get_value()) for path, mean in means}


for name in meshes:
    np.savez(Path(output) / f"{name}.npz", **run(name))
