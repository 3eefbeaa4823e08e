"""One process of a small run: mesh_worker.py OUTPUT STEPS MESH [COORDINATOR PROCESSES PROCESS], MESH as data=2,fsdp=2.

Writes, from process 0, the first step's gradient and the bytes that one device holds beside the whole to OUTPUT.npz.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

import jax
import numpy as np
from flax import nnx
from training_cases import language

from omni.data.loader import batches
from omni.sharding import MeshConfig, ShardingRules, activations_on, batch_sharding, make_mesh, sharding_tree
from omni.train.distributed import initialize
from omni.train.loop import local_rows, on_host, place, train
from omni.train.step import accumulate, make_state

output, steps, mesh, *others = sys.argv[1:]
if others:
    initialize(others[0], int(others[1]), int(others[2]))
sizes = {axis: int(size) for axis, size in (pair.split("=") for pair in mesh.split(",") if pair)}
config = language(output, dim=64, steps=int(steps), mesh=MeshConfig(**sizes))
mesh, rules = make_mesh(config.mesh), ShardingRules()
rows = batch_sharding(rules, mesh)


def start():
    return make_state(config.task, config.optimizer, config.steps, config.seed)


graphdef, abstract = jax.eval_shape(start)
state = jax.jit(lambda: start()[1], out_shardings=sharding_tree(abstract, rules, mesh))()
data = iter(batches(config.task.dataset(config.seed), config.batch_size, local_rows(rows, config.batch_size)))
batch = place(next(data), rows, config.batch_size)
with activations_on(mesh, rules):  # as in training
    gradient = jax.jit(lambda s, b: accumulate(graphdef, config.task, 1, s, b, jax.random.key(0))[0])(state, batch)
gradient = {".".join(map(str, path)): value for path, value in nnx.to_flat_state(on_host(gradient))}
held = jax.tree.leaves((state.params, state.optimizer))
device = jax.local_devices()[0]
here = sum(shard.data.nbytes for x in held for shard in x.addressable_shards if shard.device == device)
train(config)
if jax.process_index() == 0:
    arrays = {f"gradient.{name}": np.asarray(value.get_value()) for name, value in gradient.items()}
    np.savez(f"{output}.npz", bytes_here=here, bytes_whole=sum(x.nbytes for x in held), **arrays)
