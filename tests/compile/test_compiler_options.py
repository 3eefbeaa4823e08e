"""What XLA is told for each accelerator, and that a training tells it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from omni.accelerators import ACCELERATORS
from omni.compile.topologies import topology_devices
from omni.compiler_options import COMPILER_OPTIONS, compiler_options
from omni.model.config import TransformerConfig
from omni.sharding import activations_on
from omni.train.language import TransformerTask
from omni.train.loop import TrainConfig
from omni.train.program import Program


def test_by_accelerator():
    """Those of three dimensions go to chips on such a torus alone, and a CPU has none; each has one reason."""
    torus = {"xla_enable_all_gather_3d_emitter": "true", "xla_tpu_prefer_async_allgather_to_allreduce": "true"}
    assert torus.items() <= compiler_options("TPU v5p").items()
    assert not torus.keys() & compiler_options("TPU v5 lite").keys()
    assert compiler_options("cpu") == {}
    assert len({each.name for each in COMPILER_OPTIONS}) == len(COMPILER_OPTIONS)
    assert all(each.reason and set(each.accelerators) <= set(ACCELERATORS) for each in COMPILER_OPTIONS)


def test_a_training_passes_them_on(tmp_path, monkeypatch):
    """The compiler hears of them: here of one that it does not know."""
    monkeypatch.setattr("omni.train.program.compiler_options", lambda kind: {"xla_no_such_option": kind})
    model = TransformerConfig(vocabulary_size=256, depth=1, dim=32, heads=2, key_value_heads=2, mlp_dim=32)
    program = Program(TrainConfig(str(tmp_path), TransformerTask("random", model, row_length=32), 10, batch_size=8))
    with activations_on(program.mesh, program.rules):
        lowered = program.train_step().lower(*program.step_shapes())
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        lowered.compile()


@pytest.mark.aot
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_libtpu_knows_them(topology):
    """Every option of every TPU is one of this libtpu's."""
    device = topology_devices(topology, 1)[0]
    one = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
    options = compiler_options(device.device_kind)
    assert options
    jax.jit(jnp.sin).lower(one).compile(compiler_options=options)


@pytest.mark.aot
def test_a_product_with_a_gathered_weight_is_one():
    """A large batch times a weight that is split where they meet: the weight is gathered, and nothing loops over its
    pieces, which without the options it does."""
    devices = topology_devices("v5p:2x2x4", 1)
    mesh = Mesh(np.array(devices), "fsdp")
    x, weight = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
        for shape in ((64, 4096, 2048), (2048, 5504))
    )
    lowered = jax.jit(jnp.matmul).lower(x, weight)
    assert "while(" in lowered.compile().as_text()
    assert "while(" not in lowered.compile(compiler_options=compiler_options(devices[0].device_kind)).as_text()
