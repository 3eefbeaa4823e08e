"""The step that trains is the step that is compiled, for chips that are not there."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from host_devices import host_devices

from omni.accelerators import ACCELERATORS
from omni.compile import compiling
from omni.compile.compiling import compile_generation, compile_training, refusal
from omni.compile.topologies import GPUS, slice_numbers, topology_devices
from omni.model.config import TransformerConfig
from omni.model.lora import Lora
from omni.model.presets import active_parameter_count, parameter_count
from omni.sharding import MeshConfig, make_mesh
from omni.train.language import TransformerTask
from omni.train.loop import TrainConfig
from omni_tokenizers.errors import OmniError, UsageError

SMALL = TransformerConfig(
    vocabulary_size=2048,
    depth=4,
    dim=512,
    heads=4,
    key_value_heads=4,
    head_dim=128,
    mlp_dim=1024,
    compute_dtype="bfloat16",
    remat="blocks",
)


def skip_without_compiler(topology: str) -> None:
    """Skips a test of GPUs where jax's plugin for them is missing; libtpu is what `aot` needs anyway."""
    if topology.partition(":")[0] in GPUS:
        pytest.importorskip("jax_cuda13_plugin", reason="needs jax's plugin: pip install 'omni-any-to-any[aot-gpu]'")


def small(tmp_path, **changes) -> TrainConfig:
    model = dataclasses.replace(SMALL, **changes)
    return TrainConfig(str(tmp_path / "run"), TransformerTask("random", model, row_length=512), 10, batch_size=16)


def test_unknown_topology(tmp_path):
    """It is refused with those that there are."""
    with pytest.raises(UsageError, match=r"topology 'v9:2x2': choose one of v4, v5e, v5p"):
        compile_training(small(tmp_path), "v9:2x2")


@pytest.mark.parametrize("topology", ["h100:2x4", "h100", "a100:0"])
def test_gpus_are_counted(topology):
    with pytest.raises(UsageError, match=r"GPUs are counted by machine, as in [ah]100:8"):
        topology_devices(topology, 1)


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: ... Used 21.07G of 15.75G hbm. Exceeded hbm capacity by 5.32G.\\n\\nTotal ...",
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (21.07G) exceeds "
        "available HBM (15.75G).",
    ],
)
def test_what_does_not_fit_says_by_how_much(message):
    """The compiler's complaint becomes a line that names settings which free that much."""
    said = refusal(message, "v5e:4x4", lambda missing: [f"{missing / 2**30:.2f} this", "that"])
    needs = "v5e:4x4: it needs 21.07G of a device's 15.75G, 5.32G too much; "
    assert said == needs + "5.32 this, or that would fit it"
    assert refusal(message, "v5e:4x4", lambda missing: []) == needs + "no single setting frees as much"
    refused = refusal("INTERNAL: oh\nmore", "v5e:4x4", lambda missing: [])
    assert refused == "v5e:4x4: the compiler refuses the program (INTERNAL: oh)"


def compare_steps(tmp_path, *topology) -> str:
    """What `step_jaxprs.py` says on eight devices that are none."""
    script = Path(__file__).with_name("step_jaxprs.py")
    command = [sys.executable, str(script), str(tmp_path / "run"), *topology]
    done = subprocess.run(command, env=host_devices(8), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_compiles_what_trains(tmp_path):
    """`omni compile` lowers, equation for equation, the step that `omni train` calls."""
    assert "the same" in compare_steps(tmp_path)


@pytest.mark.aot
def test_compiles_what_trains_for_chips(tmp_path):
    """So it does for eight chips that are not there, beside eight devices that are."""
    assert "the same" in compare_steps(tmp_path, "v5e:2x4")


@pytest.mark.aot
@pytest.mark.parametrize(
    ("topology", "slices", "attention"),
    [("v5e:4x4", 1, "splash"), ("v5e:2x2", 2, "splash"), ("h100:8", 1, "xla"), ("a100:4", 2, "xla")],
)
def test_a_step_is_measured(tmp_path, topology, slices, attention):
    """Forward and backward: memory, arithmetic and traffic are there, and what is sent between slices, or machines of
    GPUs, if there are two."""
    skip_without_compiler(topology)
    mesh = MeshConfig(slice=slices, data=1, fsdp=-1)
    config = dataclasses.replace(small(tmp_path, attention=attention), mesh=mesh)
    found = compile_training(config, topology, slices)
    assert set(found) == {
        *("topology", "slices", "devices", "memory", "flops", "bytes", "seconds", "binds", "overlap", "mfu"),
    }
    assert json.loads(json.dumps(found)) == found
    assert 0 < found["memory"]["arguments"] < found["memory"]["total"] < found["memory"]["hbm"]
    gradients = 2 * parameter_count(SMALL) / (found["devices"] / slices)  # at least, in bfloat16
    assert found["bytes"]["dcn"] > gradients if slices > 1 else found["bytes"]["dcn"] == 0
    assert 0 < found["mfu"][0] <= found["mfu"][1] < 1


def test_operations_of_adapters(tmp_path, monkeypatch):
    """Those that training counts for its own speed: matrices beside adapters have no gradient."""
    program = SimpleNamespace(as_text=lambda: "ENTRY %main () -> () {\n}\n")
    monkeypatch.setattr(compiling, "topology_devices", lambda *_: jax.devices()[:1])
    monkeypatch.setattr(compiling, "_compiled", lambda *_: (program, {}))
    config = small(tmp_path)
    task = dataclasses.replace(config.task, lora=Lora(matrices=("query",)))
    adapters = dataclasses.replace(config, task=task, start_from="a/model")
    whole, fewer = (compile_training(each, "v5e:1x1")["flops"]["model"] for each in (config, adapters))
    assert whole - fewer == 16 * 512 * 2 * active_parameter_count(SMALL)
    assert fewer == 16 * 512 * task.work().flops_per_token


@pytest.mark.aot
@pytest.mark.parametrize(("topology", "memory"), [("v5e:2x2", "15.75G"), ("h100:4", "74.51G")])
def test_too_large_for_a_chip(tmp_path, topology, memory):
    """A step that does not fit is an error that says by how much."""
    skip_without_compiler(topology)
    config = dataclasses.replace(small(tmp_path, dim=8192, mlp_dim=32768, depth=48), mesh=MeshConfig(data=-1))
    with pytest.raises(OmniError, match=rf"needs [\d.]+G of a device's {memory}, [\d.]+G too much"):
        compile_training(config, topology)


@pytest.mark.aot
def test_generation_is_measured(tmp_path):
    """Each of four chips holds a quarter of weights and cache, and touches at least that for a token of each."""
    config = dataclasses.replace(small(tmp_path), mesh=MeshConfig(data=1, tensor=4))
    found = compile_generation(config, "v5e:2x2", requests=8, capacity=4096)
    weights = 2 * parameter_count(SMALL) / 4
    cache = 2 * 2 * SMALL.depth * 8 * 4096 * SMALL.key_value_heads * SMALL.head_dim / 4
    assert found["memory"]["arguments"] == pytest.approx(weights + cache, rel=0.1)
    assert weights + cache < found["bytes"]["hbm"] < 4 * (weights + cache)
    assert found["bytes"]["ici"] > 0 and found["binds"] in ("memory", "interconnect")
    low, high = found["tokens_per_second"]
    assert 0 < low <= high < 8 * ACCELERATORS["v5e"].memory_rate / (weights + cache)
    assert json.loads(json.dumps(found)) == found


@pytest.mark.aot
def test_generation_in_int8_is_measured(tmp_path):
    """Weights and cache take half the memory of bfloat16's and a scale for each output, head and slot."""
    shapes = {"requests": 8, "capacity": 4096}
    held = {"weights_dtype": "int8", "cache_dtype": "int8"}
    config = dataclasses.replace(small(tmp_path, tied_embeddings=False), mesh=MeshConfig(data=1, tensor=4))
    plain, found = (compile_generation(config, "v5e:2x2", **shapes, **each)["memory"] for each in ({}, held))
    embedding = 2 * SMALL.vocabulary_size * SMALL.dim / 4
    half = (plain["arguments"] - embedding) / 2 + embedding
    assert half < found["arguments"] < 1.1 * half
    assert found["total"] < plain["total"]


def test_generation_of_nothing_is_refused(tmp_path):
    """Usage errors: no requests, or no transformer."""
    with pytest.raises(UsageError, match="at least 1, got 0 and 512"):
        compile_generation(small(tmp_path), "v5e:2x2", requests=0)


@pytest.mark.aot
def test_slices_are_an_axis():
    """On several slices the mesh's first axis is theirs, and one that would cross them otherwise is refused."""
    devices = topology_devices("v5e:4x4", 2)
    mesh = make_mesh(MeshConfig(slice=2, data=1, fsdp=-1), devices)
    assert slice_numbers(mesh) == [0] * 16 + [1] * 16
    with pytest.raises(UsageError, match=r"mesh.slice is 1, but the devices are in 2 slices; set it to 2"):
        make_mesh(MeshConfig(data=1, fsdp=-1), devices)


@pytest.mark.aot
@pytest.mark.parametrize("shape", [{"fsdp": 64}, {"fsdp": 8, "expert": 8}, {"data": 2, "fsdp": 8, "tensor": 4}])
def test_any_mesh_on_a_torus(shape):
    """Axes that are products of the torus's own are laid along those, others over parts of them."""
    mesh = make_mesh(MeshConfig(**{"data": 1} | shape), topology_devices("v5p:4x4x4", 1))
    assert len({device.id for device in mesh.devices.flat}) == 64
    assert {name: mesh.shape[name] for name in shape} == shape
