"""How each accelerator is used: mesh, recomputation, attention kernel and its blocks, by preset, with the reason.

An experiment that says `recipe=True` names none of these, and runs on whatever machine it finds.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from omni.accelerators import ACCELERATORS, accelerator_of
from omni.model.config import TransformerConfig
from omni.model.presets import PRESETS, parameter_count
from omni.sharding import MeshConfig
from omni_tokenizers.errors import UsageError

NEVER, COMPILED = "never compiled or run", "compiled ahead of time, never run"


@dataclass(frozen=True)
class Recipe:
    """One way to train models up to the size of a preset."""

    accelerators: tuple[str, ...]
    """Names in `omni.accelerators.ACCELERATORS`."""
    preset: str
    """The largest model that it is for."""
    fewest: int
    """Devices below which state and activations of a row of 4,096 tokens a device are not expected to fit."""
    fsdp: int
    """Most devices along `fsdp`; those of a slice beyond it are along `data`. 1: all of them are."""
    remat: Literal["none", "blocks"]
    saved: tuple[str, ...]
    """Tensors of a block that are kept."""
    attention: Literal["xla", "splash"]
    attention_blocks: tuple[int, int]
    why: str
    """The reason, in a line."""
    seen: str = NEVER
    """What has been tried of it; no entry has been timed."""


_TPUS = ("v4", "v5e", "v5p", "v6e")
_LARGE = ("v4", "v5p")
_SMALL = ("v5e", "v6e")
_GPUS = ("a100", "h100", "h200")
_NVIDIA = "no fused kernel for packed rows on GPUs here, so scores of 512 queries at once; "
RECIPES = (
    Recipe(
        _TPUS, "0.1b", 1, 1, "none", (), "splash", (1024, 1024), "1.2 GB of state fits every chip: nothing to split"
    ),
    Recipe(_LARGE, "1b", 1, 1, "blocks", ("attention",), "splash", (1024, 1024), "14 GB of state fit 32 GB and more"),
    Recipe(
        *(_SMALL, "1b", 4, 256, "blocks", ("attention",), "splash"),
        (1024, 2048),
        "14 GB of state do not fit 16 GB; keys in blocks of 2,048, as public recipes for v6e have them",
    ),
    Recipe(
        *(("v5p",), "7b", 4, 256, "blocks", ("attention",), "splash", (1024, 1024)),
        "attention is the dearest to compute anew and small to keep; 1.3 GB of state a chip on 64",
        COMPILED,
    ),
    Recipe(
        *(("v4", "v6e"), "7b", 8, 256, "blocks", ("attention",), "splash", (1024, 1024)),
        "as on v5p, with 32 GB a chip: a quarter of it or less for the state from 16 chips",
    ),
    Recipe(
        *(("v5e",), "7b", 16, 256, "blocks", (), "splash", (1024, 1024)),
        "16 GB a chip leave no room for kept tensors on 16 chips",
    ),
    Recipe(
        *(_LARGE, "34b", 32, 256, "blocks", ("attention",), "splash", (1024, 1024)),
        "13 GB of state a chip on 32; wider models hide what fsdp gathers, so heads stay whole",
    ),
    Recipe(
        *(_SMALL, "34b", 64, 256, "blocks", (), "splash", (1024, 1024)),
        "6.4 GB of state a chip on 64, and no room for kept tensors",
    ),
    Recipe(
        *(_GPUS, "0.1b", 1, 1, "none", (), "xla", (512, 512)),
        _NVIDIA + "1.2 GB of state need no splitting",
    ),
    Recipe(
        *(_GPUS, "1b", 1, 1, "blocks", ("attention",), "xla", (512, 512)),
        _NVIDIA + "14 GB of state fit 80 GB whole",
    ),
    Recipe(
        *(_GPUS, "7b", 4, 64, "blocks", ("attention",), "xla", (512, 512)),
        _NVIDIA + "84 GB of state need 4 devices; fsdp stays within 8 machines of 8, whose network is slow",
    ),
    Recipe(
        *(_GPUS, "34b", 16, 64, "blocks", (), "xla", (512, 512)),
        _NVIDIA + "26 GB of state a device on 16",
    ),
)
"""From small models to large ones; the first that fits is taken."""


def recipe_for(device_kind: str, model: TransformerConfig) -> Recipe:
    """The recipe for a model on devices that jax calls so.

    Raises:
      UsageError: the table does not know the devices, or no model so large on them.
    """
    accelerator = accelerator_of(device_kind)
    name = next((name for name, each in ACCELERATORS.items() if each is accelerator), None)
    fitting = [recipe for recipe in RECIPES if name in recipe.accelerators]
    if not fitting:
        known = ", ".join(sorted({name for recipe in RECIPES for name in recipe.accelerators}))
        raise UsageError(f"recipe: there is none for {device_kind} (but for {known}); set mesh and task.model yourself")
    for recipe in fitting:
        if parameter_count(model) <= 1.2 * parameter_count(PRESETS[recipe.preset]):
            return recipe
    raise UsageError(
        f"recipe: a model of {parameter_count(model) / 1e9:.0f} billion parameters is larger than those that the table "
        "has; set mesh and task.model yourself"
    )


def mesh_of(recipe: Recipe, devices: int, slices: int = 1) -> MeshConfig:
    """The mesh of a recipe for so many devices, in slices that are joined by a network.

    Raises:
      UsageError: they are too few, or do not divide into the recipe's groups.
    """
    own = devices // slices
    if devices < recipe.fewest:
        raise UsageError(
            f"recipe: {devices} devices are too few for models up to {recipe.preset} on "
            f"{'/'.join(recipe.accelerators)}, which take {recipe.fewest}; set mesh and task.model yourself"
        )
    fsdp = min(own, recipe.fsdp)
    if own % fsdp or (own & (own - 1) and recipe.fsdp > 1):
        raise UsageError(f"recipe: {own} devices of a slice are no power of two; set mesh and task.model yourself")
    return MeshConfig(slice=slices, data=own // fsdp, fsdp=fsdp)


def applied(recipe: Recipe, model: TransformerConfig) -> TransformerConfig:
    """The model, computed as a recipe says; its parameters stay what they are."""
    return dataclasses.replace(
        model,
        remat=recipe.remat,
        saved=recipe.saved,
        offloaded=(),
        attention=recipe.attention,
        attention_blocks=recipe.attention_blocks,
    )
