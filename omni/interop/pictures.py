"""Which ids of a published vocabulary are codes of pictures, for families that say it by name in config.json."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from jaxtyping import Int

from omni_tokenizers.checkpoints.family import Settings
from omni_tokenizers.errors import OmniError

PLACEHOLDER = "<image>"
"""A token of transformers' own, in whose place its processors put pictures; no document holds it."""


def vocabulary_map(settings: Settings, published: int) -> dict[str, int]:
    """The ids by name.

    Raises:
      OmniError: there is none, or it has what is no id.
    """
    names = settings.values.get("vocabulary_map")
    if not isinstance(names, dict) or not names:
        raise OmniError(f"{settings.source}: no vocabulary_map, which says which ids are codes of pictures")
    for name, token in names.items():
        if type(token) is not int or not 0 <= token < published:
            raise OmniError(f"{settings.source}: vocabulary_map: {name!r} has {token!r}, no id below {published}")
    return names


def stages(pictures: Settings, default: tuple[int, ...]) -> int:
    """How many stages a net of pictures has, each but the last of which halves them; `OmniError` if they are none."""
    count = len(pictures.get("channel_multiplier", default))
    if not 1 <= count <= 16:
        raise OmniError(f"{pictures.source}: channel_multiplier has {count} stages; it must be 1 to 16")
    return count


def code_table(named: Iterable[tuple[int, int]], codes: int, source: str) -> Int[np.ndarray, " codes"]:
    """The id of each code of a picture, from (code, id) of each name.

    Raises:
      OmniError: names are not those of all codes, each once, or two of them have one id.
    """
    named = list(named)
    found = dict(named)
    if len(named) != codes or found.keys() != set(range(codes)) or len(set(found.values())) != codes:
        raise OmniError(
            f"{source}: vocabulary_map has {len(named)} names of codes of pictures, for {len(found)} codes and "
            f"{len(set(found.values()))} ids; vq_config has {codes} codes, each of which needs one name and one id"
        )
    return np.array([found[code] for code in range(codes)], np.int32)
