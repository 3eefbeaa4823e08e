"""The mesh, the sharding rules, and that splitting the model changes neither losses nor gradients."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from host_devices import host_devices
from jax.sharding import AxisType, PartitionSpec

from omni.model import Transformer, TransformerConfig
from omni.sharding import MeshConfig, ShardingRules, make_mesh, named_sharding, sharding_tree
from omni_tokenizers.errors import UsageError

EIGHT_DEVICES = """
    import json, sys
    import jax, jax.numpy as jnp, optax
    import numpy as np
    from flax import nnx
    from omni.model import Transformer, TransformerConfig
    from omni.model.lora import Lora, attach
    from omni.sharding import MeshConfig, ShardingRules, activations_on, batch_sharding, make_mesh, sharding_tree

    config = TransformerConfig(
        vocabulary_size=256, depth=2, dim=64, heads=4, key_value_heads=2, head_dim=16, mlp_dim=160, remat="dots"
    )
    optimizer, rules = optax.adamw(1e-3), ShardingRules()

    def adapted():
        model = Transformer(config, rngs=nnx.Rngs(0))
        attach(model, Lora(rank=3), nnx.Rngs(1))
        for number, (name, value) in enumerate(sorted(vars(model.blocks).items())):
            if name.endswith("_lora_b"):
                value[...] = 0.1 * jax.random.normal(jax.random.key(number), value.shape)
        return model

    def create():
        params = nnx.state(adapted(), nnx.Param)
        return params, optimizer.init(params)

    def loss(params, ids, positions, segments):
        model = adapted()
        nnx.update(model, params)
        logits = model(ids, positions, segments)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    def first_step(mesh):
        shardings = sharding_tree(jax.eval_shape(create), rules, mesh)
        state = jax.jit(create, out_shardings=shardings)()
        random = np.random.default_rng(0)
        batch = (
            random.integers(0, 256, (8, 12), dtype=np.int32),
            np.broadcast_to(np.arange(12, dtype=np.int32)[None, :, None], (8, 12, 3)),
            np.repeat(np.array([[1, 1, 2, 0]], np.int32), 3, axis=1).repeat(8, axis=0),
        )
        batch = jax.device_put(batch, batch_sharding(rules, mesh))
        with activations_on(mesh, rules):
            step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings[0]))
            step = step.lower(state[0], *batch).compile()
        value, gradients = step(state[0], *batch)
        return state, float(value), jax.device_get(jax.tree.leaves(gradients)), step.as_text()

    _, loss_one, gradients_one, _ = first_step(make_mesh(MeshConfig(), jax.devices()[:1]))
    state, loss_eight, gradients_eight, program = first_step(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    leaves = jax.tree.leaves(state)
    per_device = [
        sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards if shard.device == device)
        for device in jax.devices()
    ]
    json.dump({
        "losses": [loss_one, loss_eight],
        "gradients": [max(float(np.abs(a - b).max()) for a, b in zip(gradients_one, gradients_eight)),
                      max(float(np.abs(a).max()) for a in gradients_one)],
        "rows": [f"f32[{rows},12," in program for rows in (2, 4, 8)],
        "stream": [f"f32[2,2,{length},64]" in program for length in (6, 12)],
        "share": max(per_device) / sum(leaf.nbytes for leaf in leaves),
    }, sys.stdout)
"""


def mesh_of_one(**sizes):
    return make_mesh(MeshConfig(**sizes), jax.devices()[:1])


def abstract_mesh(**sizes):
    """A mesh of more devices than there are, for questions of shape alone."""
    sizes = dataclasses.asdict(MeshConfig(data=1)) | sizes
    return jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def test_eight_devices_compute_what_one_does():
    """On (data 2, fsdp 2, tensor 2): loss and gradients within 1e-5, at most 27.5 % of the state on any device; with an
    adapter of every matrix, so that these are among the gradients.

    Each device computes its 2 rows of 8 and holds activations of no more; what the scan over both layers keeps of the
    residual stream is further split along the length.
    """
    environment = host_devices(8)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-c", textwrap.dedent(EIGHT_DEVICES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["losses"][0] == pytest.approx(result["losses"][1], abs=1e-5)
    difference, largest = result["gradients"]
    assert difference < 1e-5 < largest
    assert result["rows"] == [True, False, False]
    assert result["stream"] == [True, False]
    assert result["share"] <= 0.25 * 1.1


def test_mesh_has_every_axis():
    """One device is a mesh too, with all axes, none of them explicit."""
    mesh = mesh_of_one()
    assert mesh.axis_names == ("slice", "data", "fsdp", "context", "expert", "tensor")
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"data": 3}, r"mesh \(data 3\) does not fit 1 device"),
        ({"tensor": 2}, r"mesh \(data -1, tensor 2\) does not fit 1 device"),
        ({"tensor": -1}, "at most one of them -1"),
        ({"fsdp": 0}, "at least 1"),
    ],
)
def test_mesh_that_does_not_fit(sizes, said):
    """A mesh that does not fit the devices is refused in one line that names its sizes."""
    with pytest.raises(UsageError, match=said):
        mesh_of_one(**sizes)


def test_rules_place_axes():
    """Logical axes go where the rules say; an unknown one names its nearest; a mesh axis used twice is an error."""
    rules = ShardingRules()
    assert rules.spec(("layers", "embed", "heads", "head_dim")) == PartitionSpec(None, "fsdp", "tensor", None)
    assert rules.spec(("batch", "length", None)) == PartitionSpec(("slice", "data", "fsdp", "expert"), "context", None)
    with pytest.raises(UsageError, match=r"'hads'.*'heads'"):
        rules.spec(("hads",))
    with pytest.raises(UsageError, match="'tensor' on two dimensions"):
        rules.spec(("heads", "mlp"))
    with pytest.raises(UsageError, match="'fsdp' on two dimensions"):
        dataclasses.replace(rules, mlp=("tensor", "fsdp")).spec(("embed", "mlp"))


def test_indivisible_dimension_is_replicated(caplog):
    """A dimension that does not divide is replicated, its neighbours are not, and the log says so once."""
    mesh = abstract_mesh(fsdp=2, tensor=4)
    with caplog.at_level(logging.WARNING):
        specs = [named_sharding(("embed", "key_value_heads"), ShardingRules(), mesh, (8, 6)).spec for _ in range(2)]
    assert specs == [PartitionSpec("fsdp", None)] * 2
    assert [record.message for record in caplog.records] == [
        "axis key_value_heads of size 6 is not divisible by its 4 mesh devices: it is replicated"
    ]


def test_indivisible_dimension_is_split_as_far_as_it_goes(caplog):
    """The leading mesh axes that divide a dimension still split it; a single token is no matter for the log."""
    mesh = abstract_mesh(context=2, tensor=4)
    with caplog.at_level(logging.WARNING):
        specs = [named_sharding(("stream",), ShardingRules(), mesh, (size,)).spec for size in (16, 10, 1)]
    assert specs == [PartitionSpec(("context", "tensor")), PartitionSpec(("context",)), PartitionSpec(None)]
    assert [record.message for record in caplog.records] == [
        "axis stream of size 10 is not divisible by its 8 mesh devices: it is split over 2"
    ]


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adamw(1e-3, mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params)),
        optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)), 2).gradient_transformation(),
        optax.adafactor(1e-3, min_dim_size_to_factor=8),
    ],
    ids=["adamw", "accumulation", "adafactor"],
)
def test_optimizer_state_follows_parameters(optimizer):
    """Whatever mirrors a parameter is split like it; counters and reduced statistics are replicated."""
    config = TransformerConfig(vocabulary_size=64, depth=2, dim=16, heads=2, key_value_heads=2, head_dim=8, mlp_dim=32)
    params = nnx.state(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))), nnx.Param)
    state = jax.eval_shape(optimizer.init, params)
    placed = sharding_tree((params, state), ShardingRules(), abstract_mesh(fsdp=2, tensor=2))
    assert jax.tree.structure(placed) == jax.tree.structure((params, state))
    split = PartitionSpec(None, "fsdp", "tensor", None)
    found = [
        (leaf.shape, sharding.spec)
        for leaf, sharding in zip(jax.tree.leaves((params, state)), jax.tree.leaves(placed), strict=True)
    ]
    query = (2, 16, 2, 8)
    assert found.count((query, split)) == sum(shape == query for shape, _ in found) > 0
    assert all(spec == PartitionSpec() for shape, spec in found if shape == ())


def test_rules_leave_other_arrays_whole():
    """Variables without axes and plain arrays are replicated."""
    tree = {"statistics": nnx.BatchStat(jnp.zeros(4)), "plain": jnp.zeros(4)}
    placed = sharding_tree(tree, ShardingRules(), mesh_of_one())
    assert [leaf.spec for leaf in jax.tree.leaves(placed)] == [PartitionSpec()] * 2
