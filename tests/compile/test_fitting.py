"""What is too large says which setting would fit it: bytes counted by hand."""

import dataclasses
import re

import jax
import pytest

from omni.compile.fitting import generation_remedies, tensor_bytes, training_remedies
from omni.model.config import TransformerConfig
from omni.model.lora import Lora
from omni.sharding import MeshConfig, make_mesh
from omni.train.language import TransformerTask
from omni.train.loop import TrainConfig
from omni.train.optimizer import OptimizerConfig

GIB = 2.0**30
MODEL = TransformerConfig(
    vocabulary_size=128, depth=2, dim=1024, heads=8, key_value_heads=4, head_dim=128, mlp_dim=4096, remat="blocks"
)


def config(saved=("query", "key", "gate", "up"), **changes) -> TrainConfig:
    """One device is given 64 x 4,096 tokens: "gate" takes 2 x 262,144 x 4,096 values of 4 bytes, which are 8 GiB."""
    model = dataclasses.replace(MODEL, saved=saved, **changes)
    return TrainConfig("runs/none", TransformerTask("random", model, row_length=4096), 10, batch_size=64)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def test_bytes_of_tensors():
    """Width times tokens times blocks; heads and hidden widths are split, and tokens of what is added to the stream."""
    found = tensor_bytes(MODEL, tokens=100, tensor=4)
    assert found["query"] == 100 * 2 * 1024 * 4 / 4 and found["key"] == found["value"] == 100 * 2 * 512 * 4 / 4
    assert found["up"] == 100 * 2 * 4096 * 4 / 4 and found["mlp_output"] == 100 * 2 * 1024 * 4 / 4
    half = tensor_bytes(dataclasses.replace(MODEL, compute_dtype="bfloat16"), tokens=100)
    assert half["gate"] == 100 * 2 * 4096 * 2


def test_the_largest_are_computed_anew(mesh):
    """5 GiB too much: one of the two of 8 GiB goes, the others stay. 12 GiB: both. More than all: that is no remedy."""
    (least, *_), (both, *_) = (training_remedies(config(), mesh, size * GIB) for size in (5, 12))
    assert least == "--task.model.saved query key up (8.00G less; gate computed anew)"
    assert both == "--task.model.saved query key (16.00G less; gate, up computed anew)"
    assert not any("saved" in each for each in training_remedies(config(), mesh, 20 * GIB))


def test_without_recomputation_it_is_turned_on(mesh):
    assert training_remedies(config((), remat="none"), mesh, GIB)[0].startswith(
        "--task.model.remat blocks --task.model.saved query key value attention attention_output up mlp_output (8.00G"
    )


def test_microbatches_and_devices(mesh):
    """Of 21 GiB kept (8 + 8 + 2 + 1, and inputs of 2) two microbatches free half; sums of gradients take little."""
    remedies = training_remedies(config(), mesh, 9 * GIB)
    assert remedies[1].startswith("--optimizer.accumulation 2 (10.3")
    assert remedies[2].startswith("2 times as many devices along fsdp (10.6")
    assert "--optimizer.accumulation 8 " in training_remedies(config(), mesh, 16 * GIB)[1]
    odd = dataclasses.replace(config(), batch_size=1)
    assert not any("accumulation" in each or "devices" in each for each in training_remedies(odd, mesh, 0.1 * GIB))


def test_what_is_frozen_has_neither_gradients_nor_moments(mesh):
    """Frozen or beside adapters, the 31.5 million parameters of both blocks cost microbatches no sum of gradients, and
    more devices share no moments of them."""
    blocks = 2 * (2 * 1024 * 12 * 128 + 3 * 1024 * 4096 + 2 * 1024) / GIB
    frozen = dataclasses.replace(config(), optimizer=OptimizerConfig(frozen=("blocks.*",)))
    lora = dataclasses.replace(
        config().task, lora=Lora(rank=1, matrices=("key",), trained=("embedding", "norm", "head"))
    )
    adapters = dataclasses.replace(config(), task=lora, start_from="a/model")
    moves, stays, adapted = (
        [float(re.search(r"\(([\d.]+)G less", each).group(1)) for each in training_remedies(each, mesh, 9 * GIB)[1:]]
        for each in (config(), frozen, adapters)
    )
    expected = [moves[0] + 4 * blocks, moves[1] - 8 * blocks / 2]
    assert stays == pytest.approx(expected, abs=0.011) and adapted == pytest.approx(expected, abs=0.011)


def test_generation(mesh):
    """A cache of 2 x 2 x 64 x 4 x 8,192 x 128 values of 4 bytes, 4 GiB, of which 1.1 have to go; in int8 it has 1 GiB
    and a scale of 4 bytes for each 128, of which half a GiB have to."""
    assert generation_remedies(MODEL, mesh, requests=64, capacity=8192, missing=GIB) == [
        *("--cache-dtype int8 (2.97G less)", "--requests 46", "--capacity 5939"),
        "2 times as many devices along tensor",
    ]
    assert generation_remedies(MODEL, mesh, 64, 8192, GIB / 2.2, cache_dtype="int8") == [
        *("--requests 32", "--capacity 4220", "2 times as many devices along tensor")
    ]
    assert generation_remedies(MODEL, mesh, requests=64, capacity=8192, missing=100 * GIB) == []
