"""Emu3 (arXiv:2409.18869): text and pictures of many sizes, a grid of rows with ends behind a size in plain text.

Tensors are found under the names that the hub's files have, under which transformers writes them, too, and under those
that transformers 5 has in memory. The tokenizer of pictures is whole in the weights. Checked against transformers
5.23.0.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath
from PIL.Image import Resampling

import omni_tokenizers
from omni.image_processor import ImageProcessor
from omni.interop.family import (
    Family,
    Place,
    Preset,
    control_ids,
    llama_lacks,
    llama_places,
    read_config,
    text_ids,
    with_new_ids,
    write_config,
)
from omni.interop.pictures import PLACEHOLDER, code_table, stages, vocabulary_map
from omni.model import TransformerConfig
from omni.vocabulary import Vocabulary
from omni_tokenizers.checkpoints.emu3 import to_transformers
from omni_tokenizers.checkpoints.family import Settings
from omni_tokenizers.emu3 import Emu3Tokenizer
from omni_tokenizers.text_public import PublicTextTokenizer

if TYPE_CHECKING:
    from omni.bundle import Model

DEFAULTS = {
    "vocab_size": 184_622,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": False,
}
CONTROL = {"bos_token_id": 151_849, "eos_token_id": 151_850, "pad_token_id": 151_643}
CONTEXT_LENGTH = 9216
ROLES = {
    "begin": "<|image start|>",
    "image": "<|image token|>",
    "row_end": "<|extra_200|>",
    "last": "<|extra_201|>",
    "end": "<|image end|>",
}
"""Names in the vocabulary of what a picture is written with."""
AREAS, RATIOS = (720 * 720, 512 * 512), ("1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16")
"""Pixels of pictures, and width to height; the first area is the one that Emu3 draws."""
LARGEST_SIDE = 2000
"""More rows or columns than a picture has that is read."""
SCALING = {
    "resample": int(Resampling.BICUBIC),
    "rescale_factor": 1 / 255,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
    "min_pixels": 512 * 512,
    "max_pixels": 1024 * 1024,
}
"""Of pictures as Emu3 was trained; where a file says nothing, transformers takes the mean and deviation of CLIP."""
_PREFIX, _NEWER_PREFIX = "text_model.model.", "model.text_model."
_VQMODEL, _NEWER_VQMODEL = "vqmodel.", "model.vqmodel."
_VISUAL = "<|visual token {:06}|>"
_CODE, _NO_TEXT = re.compile(r"<\|visual token (\d{6})\|>"), re.compile(r"<\|[^|]+\|>|" + PLACEHOLDER)

log = logging.getLogger(__name__)


def section(settings: Settings) -> Settings:
    """What config.json says of the language model."""
    values = settings.values.get("text_config")
    return Settings(values if isinstance(values, dict) else {}, f"{settings.source}: text_config")


def read(settings: Settings) -> TransformerConfig:
    """The transformer's configuration."""
    return read_config(section(settings), DEFAULTS, qk_norm="none")


def places(config: TransformerConfig, prefix: str) -> list[Place]:
    """The tensors, under the names of the files or those in memory."""
    return llama_places(config, prefix, "text_model.lm_head.weight" if prefix == _PREFIX else "lm_head.weight")


def preset(settings: Settings, config: TransformerConfig, text: PublicTextTokenizer | None) -> Preset:
    """Text, and pictures of each ratio and area that the context holds; the turn is a new id.

    A picture's size is written in the text tokenizer's ids of "rows*columns", or without one in those that
    `vocabulary_map` has for its characters. Where neither is known there is text alone, and the log says so.
    """
    own, published = section(settings), config.vocabulary_size
    names = vocabulary_map(settings, published)
    pictures = settings.section("vq_config")
    named = [(int(match[1]), names[match[0]]) for match in map(_CODE.fullmatch, names) if match]
    codes = code_table(named, pictures.get("codebook_size", 32_768), settings.source)
    ids = control_ids(Settings(CONTROL | own.values, own.source), published)
    size = with_new_ids(ids, published, ("bos", "turn", "eos", "pad"))
    special = {f"<{role}>": token for role, token in ids.items()}
    special |= {name: names[name] for name in (*ROLES.values(), PLACEHOLDER) if name in names}
    no_text = [token for name, token in names.items() if _NO_TEXT.fullmatch(name)]
    blocks = {"text": text_ids(published, text, [*no_text, *special.values()]), "image": codes}
    step = 2 ** (stages(pictures, (1, 2, 2, 4)) - 1)
    spell, context = spelling(names, text), own.get("max_position_embeddings", CONTEXT_LENGTH)
    written = sizes(step, context, spell) if spell and names.keys() >= set(ROLES.values()) else []
    if not written:
        why = f"no size fits {context} tokens" if spell else "add tokenizer.json, by which sizes are written"
        log.warning("%s: this model knows text alone, not pictures: %s", settings.source, why)
    more: dict[str, Any] = {"preprocessing": ImageProcessor(**SCALING, spatial_factor=step).to_json()}
    if spell and (characters := spelled(spell)):
        more["spelling"] = characters
    return Preset(Vocabulary(size, blocks, special), grammar(written, **more))


def grammar(shapes: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """The declaration: pictures of these shapes, or text alone if there are none; `more` is of pictures, too."""
    image = {
        "codebooks": ["image"],
        "open": [ROLES["begin"]],
        "begin": [ROLES["image"]],
        "row_end": ROLES["row_end"],
        "close": [ROLES["last"], ROLES["end"]],
        "shapes": shapes,
        **more,
    }
    control = {role: f"<{role}>" for role in ("bos", "turn", "eos", "pad")}
    modalities = {"text": {"block": "text"}} | ({"image": image} if shapes else {})
    return {"format": 1, "control": control, "modalities": modalities}


def sizes(step: int, context: int, spell: Callable[[str], list[int]]) -> list[dict[str, Any]]:
    """The shapes of `AREAS` and `RATIOS`, `step` pixels a code, that leave room in a context.

    Rows and columns are rounded from the sides of exact area, as Emu3 does it.
    """
    found = {}
    for area in AREAS:
        for ratio in RATIOS:
            width, height = map(int, ratio.split(":"))
            scale = (area / (width * height)) ** 0.5 / step
            rows, columns = round(height * scale), round(width * scale)
            if rows * (columns + 1) + 32 < context:
                found[rows, columns] = spell(f"{rows}*{columns}")
    return [{"rows": rows, "columns": columns, "prefix": ids} for (rows, columns), ids in found.items()]


def spelling(names: Mapping[str, int], text: PublicTextTokenizer | None) -> Callable[[str], list[int]] | None:
    """What gives the ids of a size, by the text tokenizer or by the ids of characters; None if neither is known."""
    if text is not None:
        return lambda size: text.ids[text.encode(size)].tolist()
    if set("0123456789*") <= names.keys():
        return lambda size: [names[character] for character in size]
    return None


def spelled(spell: Callable[[str], list[int]]) -> dict[str, int]:
    """The token of each character of a size, so that any can be written; none where some are joined, as "57" may be."""
    found = {character: spell(character) for character in "0123456789*"}
    sizes = (f"{number}*{number}" for number in range(1, LARGEST_SIDE))
    apart = all(len(ids) == 1 for ids in found.values()) and all(
        spell(size) == [found[character][0] for character in size] for size in sizes
    )
    return {character: ids[0] for character, ids in found.items()} if apart else {}


def write(model: Model) -> dict[str, Any]:
    """The content of config.json; `vocabulary_map` has the names that transformers and this package look for."""
    text = write_config(model, "emu3_text_model", "Emu3ForCausalLM")
    del text["head_dim"], text["architectures"]
    pictures, _ = to_transformers(model.tokenizers["image"])
    names = {_VISUAL.format(code): token for code, token in enumerate(model.vocabulary.block("image").tolist())}
    return {
        "model_type": "emu3",
        "architectures": ["Emu3ForConditionalGeneration"],
        "tie_word_embeddings": text["tie_word_embeddings"],
        "text_config": text,
        "vq_config": pictures,
        "vocabulary_map": dict(model.vocabulary.special) | names,
    }


def lacks(model: Model) -> str | None:
    """What this family lacks of a model."""
    config = model.config
    if not isinstance(model.tokenizers.get("image"), Emu3Tokenizer):
        return "model without its image tokenizer, Emu3's"
    if config.heads * config.head_dim != config.dim:
        return f"heads of {config.head_dim} in a width of {config.dim}"
    return llama_lacks(config, qk_norm="none")


def tokenizers(directory: epath.Path) -> dict[str, omni_tokenizers.Tokenizer]:
    """The tokenizer of pictures in the weights."""
    return {"image": omni_tokenizers.load(directory)}


def more_tensors(model: Model) -> dict[str, np.ndarray]:
    """The tokenizer of pictures, under its names."""
    return {f"{_VQMODEL}{name}": value for name, value in to_transformers(model.tokenizers["image"])[1].items()}


FAMILY = Family(
    name="emu3",
    model_type="emu3",
    context_length=CONTEXT_LENGTH,
    read=read,
    write=write,
    lacks=lacks,
    preset=preset,
    image_processor_type="Emu3ImageProcessor",
    places=places,
    prefix=_PREFIX,
    other_prefixes=(_NEWER_PREFIX,),
    others=(_VQMODEL, _NEWER_VQMODEL),
    tokenizers=tokenizers,
    more_tensors=more_tensors,
    carries=lambda model: ("image",),
    section=section,
    frame=("bos_token", ""),
)
