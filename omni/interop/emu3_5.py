"""Emu3.5 (arXiv:2510.26583): Emu3's successor, shaped like Qwen3, with 131,072 codes of pictures and longer contexts.

Pictures are written as Emu3's, but no end stands behind the last row, and nothing between it and the picture's end. An
answer stands between two tokens of its own, of which the first is the turn here and the second the end. The ids are
those of the release: the numbers of its control tokens count from that of a row's end. transformers has no such class:
checked against its Qwen3 (5.23.0), which computes the same. The tokenizer of pictures is a model of its own, for which
there is no reader here yet.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from omni.interop.emu3 import spelling
from omni.interop.family import (
    Family,
    Preset,
    control_ids,
    llama_lacks,
    llama_places,
    read_config,
    text_ids,
    with_new_ids,
    write_config,
)
from omni.interop.tiktoken import read_ranks, tokenizer_json
from omni.model import TransformerConfig
from omni.vocabulary import Vocabulary
from omni_tokenizers.checkpoints.family import Settings
from omni_tokenizers.errors import OmniError
from omni_tokenizers.text_json import JsonTextTokenizer
from omni_tokenizers.text_public import JSON_FILE, public_text

if TYPE_CHECKING:
    from omni.bundle import Model

DEFAULTS = {
    "vocab_size": 184_622,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": False,
}
"""What the release's own class has for what config.json leaves out."""
CONTEXT_LENGTH = 9216
CONTROL = {"bos_token_id": 151_849, "eos_token_id": 151_850, "pad_token_id": 151_643}
PICTURE = {"img_token_id": 151_851, "boi_token_id": 151_852, "eoi_token_id": 151_853, "eol_token_id": 151_846}
"""Keys of config.json, and their values where it leaves them out."""
ROLES = {"turn": "<|extra_100|>", "eos": "<|extra_101|>", "bos": "<|extra_203|>", "pad": "<|endoftext|>"}
NAMES = {"img": "<|image token|>", "boi": "<|image start|>", "eoi": "<|image end|>", "eol": "<|extra_200|>"}
END = "<|extra_204|>"
"""What the release ends documents with, behind the end of the answer, which is theirs here."""
ROW_END, THOUGHTS = 200, (50, 51, 60, 61)
"""Numbers of <|extra_...|>: of a row's end, and of those around thoughts, which are text."""
BEFORE_EXTRA = 3
"""Control tokens before <|extra_0|>; the first of them follows the pieces of text."""
CODES = 131_072
TIKTOKEN = "emu3.tiktoken"
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""What its words are: the expression of Qwen's tokenizers, whose pieces it has."""
CHARACTERS = {character: 15 + number for number, character in enumerate("0123456789")} | {"*": 9}
"""What the text tokenizer makes of sizes."""
DRAWN = ((55, 73), (41, 97), (47, 85), (52, 78), (64, 64), (73, 55), (85, 47), (78, 52))
"""Rows and columns of the pictures of about 1024 x 1024 pixels that the release's tools ask for."""
READ = ((39, 52), (29, 69), (34, 60), (37, 55), (45, 45), (52, 39), (60, 34), (55, 37))
"""Those of 720 x 720 pixels at the same ratios, to which the tools bring pictures that are told between texts."""
GENERATION = {
    "guidance": {"image": 3.0},
    "media_guidance": {"image": 1.0},
    "top_k": {"text": 1024, "image": 10_240},
    "top_p": {"text": 0.9},
}
"""Of the tools, for Emu3.5; for Emu3.5-Image they have a guidance of 5 and a top_k of 5120. What they weigh a prompt
against is the prompt without its text."""

log = logging.getLogger(__name__)


def read(settings: Settings) -> TransformerConfig:
    """The transformer's configuration; `OmniError` for Emu3 as it was first published, which has this type, too."""
    if settings.get("vocab_size", DEFAULTS["vocab_size"]) == DEFAULTS["vocab_size"]:
        raise OmniError(f"{settings.source}: this is Emu3 under its first names; take the directory for transformers")
    return read_config(settings, DEFAULTS, qk_norm="rms")


def text(directory: epath.Path, ids: np.ndarray | None = None) -> JsonTextTokenizer | None:
    """The text tokenizer: tokenizer.json, or the release's own file, behind whose pieces the control tokens stand."""
    path = directory / TIKTOKEN
    if (directory / JSON_FILE).exists() or not path.exists():
        return public_text(directory, ids)
    ranks = read_ranks(path)
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205))]
    added = {name: max(ranks.values()) + 1 + place for place, name in enumerate(names)}
    try:
        content = tokenizer_json(ranks, PATTERN, added, [f"<|extra_{number}|>" for number in THOUGHTS])
        return JsonTextTokenizer(content, ids)
    except OmniError as error:
        raise OmniError(f"{path}: {error}") from None


def preset(settings: Settings, config: TransformerConfig, text: JsonTextTokenizer | None) -> Preset:
    """Text, and pictures of the release's sizes that the context holds; without any, the log says so.

    Raises:
      OmniError: ids that leave none to text or to codes of pictures.
    """
    published = config.vocabulary_size
    tokens = {NAMES[key[:3]]: settings.get(key, default) for key, default in PICTURE.items()}
    extra = tokens[NAMES["eol"]] - ROW_END  # the id of <|extra_0|>
    ids = control_ids(Settings(CONTROL | settings.values, settings.source), published)
    tokens[END] = ids.pop("eos", extra + 204)
    ids |= {"turn": extra + 100, "eos": extra + 101}
    first_code = max(tokens.values()) + 1
    if extra - BEFORE_EXTRA <= 0 or first_code >= published:
        raise OmniError(f"{settings.source}: of {published} ids none are left to text, or to codes of pictures")
    size = with_new_ids(ids, published, tuple(ROLES))
    special = {ROLES.get(role, f"<{role}>"): token for role, token in ids.items()} | tokens
    thoughts = [extra + number for number in THOUGHTS]
    no_text = np.setdiff1d([*range(extra - BEFORE_EXTRA, published), *special.values()], thoughts).tolist()
    codes = np.arange(first_code, min(published, first_code + CODES), dtype=np.int32)
    blocks = {"text": text_ids(published, text, no_text), "image": codes}
    context = settings.get("max_position_embeddings", CONTEXT_LENGTH)
    shapes = sizes(context, spelling(CHARACTERS, text))
    if not shapes:
        log.warning("%s: this model knows text alone: no picture fits %s tokens", settings.source, context)
    return Preset(Vocabulary(size, blocks, special), grammar(shapes), GENERATION if shapes else {})


def sizes(context: int, spell: Callable[[str], list[int]]) -> list[dict[str, Any]]:
    """The shapes that leave room in a context."""
    fitting = [(rows, columns) for rows, columns in (*DRAWN, *READ) if rows * (columns + 1) + 32 < context]
    return [{"rows": rows, "columns": columns, "prefix": spell(f"{rows}*{columns}")} for rows, columns in fitting]


def grammar(shapes: list[dict[str, Any]]) -> dict[str, Any]:
    """The declaration: pictures of these shapes, or text alone if there are none."""
    image = {
        "codebooks": ["image"],
        "open": [NAMES["boi"]],
        "begin": [NAMES["img"]],
        "row_end": NAMES["eol"],
        "last_row_end": False,
        "close": [NAMES["eoi"]],
        "shapes": shapes,
    }
    modalities = {"text": {"block": "text"}} | ({"image": image} if shapes else {})
    return {"format": 1, "control": ROLES, "modalities": modalities}


def write(model: Model) -> dict[str, Any]:
    """The content of config.json, as the release's own class reads it."""
    values = write_config(model, "Emu3", "Emu3ForCausalLM")
    theta, special = values.pop("rope_parameters")["rope_theta"], model.vocabulary.special
    pictures = {key: special[NAMES[key[:3]]] for key in PICTURE}
    return values | pictures | {"rope_theta": theta, "eos_token_id": special[END]}


def lacks(model: Model) -> str | None:
    """What this family lacks of a model."""
    if not model.vocabulary.special.keys() >= {END, *NAMES.values()}:
        return "model without its names of control tokens"
    return llama_lacks(model.config, qk_norm="rms", rope_scaling=None)


FAMILY = Family(
    name="emu3.5",
    model_type="Emu3",
    context_length=CONTEXT_LENGTH,
    read=read,
    write=write,
    lacks=lacks,
    preset=preset,
    places=llama_places,
    text=text,
)
