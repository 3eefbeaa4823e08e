"""What families with pictures share: ids that are codes of pictures, by their names in config.json, and the files that
say how pictures are scaled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int

from omni.image_processor import ImageProcessor
from omni_tokenizers.base import read_object
from omni_tokenizers.checkpoints.family import Settings
from omni_tokenizers.errors import OmniError

PLACEHOLDER = "<image>"
"""A token of transformers' own, in whose place its processors put pictures; no document holds it."""

PREPROCESSOR, NEWER_PREPROCESSOR = "preprocessor_config.json", "processor_config.json"
"""Files of image processors; transformers 5 writes the second, where "image_processor" is the first."""


def with_file(declaration: Mapping[str, Any], directory: epath.Path) -> Mapping[str, Any]:
    """A family's grammar with what such a file in the directory says of the scaling of pictures.

    Raises:
      OmniError: the file asks for what is not supported, or for other sizes than the family has.
    """
    image, (values, source) = declaration["modalities"].get("image"), _file(directory)
    if not values or "preprocessing" not in (image or {}):
        return declaration
    said = {name: value for name, value in values.items() if value is not None}
    found = ImageProcessor.from_json(image["preprocessing"] | said, source)
    usual = ImageProcessor.from_json(image["preprocessing"], source)
    for name in ("side", "spatial_factor"):
        if (own := getattr(found, name)) != getattr(usual, name):
            cut = name == "side" and not found.min_size
            words = "size and crop_size have" if cut else "size is" if name == "side" else f"{name} is"
            raise OmniError(f"{source}: {words} {own}; config.json's pictures have {getattr(usual, name)}")
    image = image | {"preprocessing": found.to_json()}
    return declaration | {"modalities": declaration["modalities"] | {"image": image}}


def _file(directory: epath.Path) -> tuple[Mapping[str, Any], str]:
    """What the file of an image processor holds, and its name; nothing where there is none."""
    if (path := directory / PREPROCESSOR).exists():
        return read_object(path), str(path)
    path = directory / NEWER_PREPROCESSOR
    section = Settings(read_object(path) if path.exists() else {}, str(path)).section("image_processor")
    return section.values, section.source


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
