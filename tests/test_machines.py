"""The table of recipes: every entry can be laid out, divides what it splits, and holds the state of its models."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
from flax import nnx

from omni.accelerators import ACCELERATORS
from omni.machines import RECIPES, applied, mesh_of, recipe_for
from omni.model import Transformer
from omni.model.presets import PRESETS, parameter_count
from omni.sharding import MeshConfig, ShardingRules, mesh_axes
from omni.train.language import TransformerTask
from omni.train.loop import TrainConfig
from omni.train.program import Program, by_recipe
from omni_tokenizers.errors import UsageError

KINDS = {name: each.kinds[0] for name, each in ACCELERATORS.items()}


@pytest.fixture(scope="module")
def parameters():
    """(axes, shape) of every parameter of each preset."""

    def of(config):
        abstract = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
        flat = nnx.to_flat_state(nnx.state(abstract, nnx.Param))
        return [(leaf.get_metadata()["axes"], leaf.get_value().shape) for _, leaf in flat]

    return {name: of(config) for name, config in PRESETS.items()}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.accelerators[0]}-{recipe.preset}")
def test_entries_can_be_laid_out(recipe, parameters):
    """The mesh has all devices, divides every axis of the preset that it splits, and three quarters of the memory hold
    the state; the reason is a line."""
    for devices, slices in ((recipe.fewest, 1), (2 * recipe.fewest, 1), (1024, 1), (256, 2)):
        sizes = dataclasses.asdict(mesh_of(recipe, devices, slices))
        assert math.prod(sizes.values()) == devices and sizes["slice"] == slices and min(sizes.values()) >= 1
        for axes, shape in parameters[recipe.preset]:
            for entry, size in zip(ShardingRules().spec(axes), shape, strict=True):
                assert size % math.prod(sizes[axis] for axis in mesh_axes(entry)) == 0, (axes, shape, sizes)
    state = 12 * parameter_count(PRESETS[recipe.preset]) / mesh_of(recipe, recipe.fewest).fsdp
    assert all(state < 0.75 * ACCELERATORS[name].memory for name in recipe.accelerators)
    assert recipe.why and "\n" not in recipe.why and recipe.seen
    assert PRESETS[recipe.preset].head_dim % 128 == 0 or recipe.attention != "splash"
    assert applied(recipe, PRESETS[recipe.preset]).attention == recipe.attention


def test_every_accelerator_has_every_preset():
    """By what jax calls it, and no recipe is for models larger than the next one's."""
    for name in ("v4", "v5e", "v5p", "v6e", "a100", "h100", "h200"):
        found = [recipe_for(KINDS[name], config) for config in PRESETS.values()]
        assert [recipe.preset for recipe in found] == list(PRESETS) and all(name in each.accelerators for each in found)


def test_what_the_table_does_not_know():
    """Devices, sizes and counts that it has no line for are said to be so."""
    with pytest.raises(UsageError, match=r"there is none for cpu \(but for a100"):
        recipe_for("cpu", PRESETS["1b"])
    with pytest.raises(UsageError, match="larger than those that the table has"):
        recipe_for("TPU v5", dataclasses.replace(PRESETS["34b"], depth=200))
    recipe = recipe_for("TPU v5p", PRESETS["7b"])
    with pytest.raises(UsageError, match="2 devices are too few for models up to 7b on v5p, which take 4"):
        mesh_of(recipe, 2)
    with pytest.raises(UsageError, match="96 devices of a slice are no power of two"):
        mesh_of(recipe, 96)


def test_a_run_takes_its_recipe(tmp_path):
    """Mesh, recomputation and attention come from the table, the model's shape and everything else from the run; on
    what the table does not know, and beside a mesh, it is refused."""
    task = TransformerTask("random", PRESETS["7b"], row_length=4096)
    config = TrainConfig(str(tmp_path / "run"), task, 10, batch_size=128, recipe=True)
    pod = [SimpleNamespace(device_kind="TPU v5p", slice_index=number // 64) for number in range(128)]
    found = by_recipe(config, pod)
    assert found.mesh == MeshConfig(slice=2, data=1, fsdp=64)
    assert (found.task.model.attention, found.task.model.remat) == ("splash", "blocks")
    shape = {"attention": "xla", "remat": "none", "saved": (), "attention_blocks": (1024, 1024)}
    assert dataclasses.replace(found.task.model, **shape) == PRESETS["7b"]
    assert dataclasses.replace(found, task=task, mesh=MeshConfig(), recipe=True) == config
    with pytest.raises(UsageError, match="there is none for cpu"):
        Program(config)
    with pytest.raises(UsageError, match="recipe is set and mesh, too"):
        dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=-1))
