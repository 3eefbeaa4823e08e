"""Generation: requests, the grammar's rules as masks, sampling, and the batched engine."""

from omni.generate.engine import Engine
from omni.generate.requests import (
    Generated,
    PreparedRequest,
    Shadow,
    guidance_shadows,
    is_whole,
    per_modality,
    unconditional_shadow,
    wanted_modalities,
)
from omni.generate.slots import Progress, Slots

__all__ = [
    "Engine",
    "Generated",
    "PreparedRequest",
    "Progress",
    "Shadow",
    "Slots",
    "guidance_shadows",
    "is_whole",
    "per_modality",
    "unconditional_shadow",
    "wanted_modalities",
]
