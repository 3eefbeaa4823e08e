"""AnyGPT (arXiv:2402.12226): Llama 2 with added tokens for pictures, speech and music.

A config.json says nothing of them, so it is known by the names that its text tokenizer adds, and these names say which
id is which code. Pictures are 32 codes of SEED, speech the first level of SpeechTokenizer, music EnCodec's four levels
(32 kHz, 50 frames a second), a frame's codes together. Music is `audio` here, since EnCodec reads and makes sound of it
(tokenizers/audio). Of the tokenizers of pictures and speech there is no reader here: these are codes alone. Its files
were not at hand: names, templates and settings are those of the release's code.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from omni.interop import llama
from omni.interop.family import ADDED_TOKENS, Family, Preset, control_ids, llama_places, text_ids, with_new_ids
from omni.layout import LARGEST_FAMILY
from omni.model import TransformerConfig
from omni.vocabulary import Vocabulary
from omni_tokenizers.checkpoints.family import Settings
from omni_tokenizers.errors import OmniError
from omni_tokenizers.text_public import PublicTextTokenizer

if TYPE_CHECKING:
    from omni.bundle import Model

TURN, END = "[MMGPT]", "<eos>"
"""Names of what stands before and behind an answer. What stands before a question is left to its text."""
PREFIXES = {"image": "\U0001f440", "speech": "\U0001f5e3\ufe0f", "audio": "\U0001f3b6"}
"""What the names of a modality's codes begin with."""
LETTERS = {"image": "im", "speech": "sp", "audio": "mu"}
"""How the names of what opens and closes it end."""
LEVELS, PICTURE = 4, 32
"""Levels of music, codes of a picture."""
GENERATION = {"top_k": {"audio": 200}, "repetition_penalty": {"audio": 1.15, "speech": 1.05}}
"""Of the release's tools."""
_NO_TEXT = re.compile("<[^0-9<>]+[0-9]+>|<[se]o[a-z]{2}>")


def holds(settings: Settings) -> bool:
    """Whether the added tokens are this family's."""
    names = settings.values.get(ADDED_TOKENS, {})
    return {TURN, *map(opening, LETTERS)} <= names.keys()


def preset(settings: Settings, config: TransformerConfig, text: PublicTextTokenizer | None) -> Preset:
    """Text, pictures, speech and music, as the names of added tokens say.

    Raises:
      OmniError: names of codes that are not those of 0, 1, 2, ..., or ids that the model does not have.
    """
    published, names = config.vocabulary_size, settings.values[ADDED_TOKENS]
    if beyond := [name for name, token in names.items() if token >= published]:
        raise OmniError(f"{settings.source}: the added token {beyond[0]!r} has an id that is none below {published}")
    image, speech, music = (_codes(names, modality, settings.source) for modality in PREFIXES)
    if len(music) % LEVELS:
        raise OmniError(f"{settings.source}: {len(music)} codes of music are not {LEVELS} levels of them")
    ids = control_ids(settings, published) | {"turn": names[TURN]}
    if END in names:
        ids |= {"eos 2": ids["eos"]} if "eos" in ids else {}
        ids["eos"] = names[END]
    if "pad" not in ids and 0 not in ids.values():
        ids["pad"] = 0  # as the release's code has it
    size = with_new_ids(ids, published, ("bos", "turn", "eos", "pad"))
    special = {f"<{role}>": token for role, token in ids.items()}
    special |= {name: names[name] for modality in LETTERS for name in (opening(modality), closing(modality))}
    no_text = [token for name, token in names.items() if _NO_TEXT.fullmatch(name)]
    blocks = {"text": text_ids(published, text, [*no_text, *special.values()]), "image": image, "speech": speech}
    blocks |= {f"audio {level}": codes for level, codes in enumerate(np.split(music, LEVELS))}
    context = settings.get("max_position_embeddings", llama.FAMILY.context_length)
    return Preset(Vocabulary(size, blocks, special), grammar(PICTURE, context - 32), GENERATION)


def grammar(picture: int, room: int) -> dict[str, Any]:
    """The declaration: pictures of so many codes, speech and music of up to `room` codes, as far as a layout goes."""
    books = {"image": ["image"], "speech": ["speech"], "audio": [f"audio {level}" for level in range(LEVELS)]}
    longest = {name: min(max(1, room // len(books[name])), LARGEST_FAMILY) for name in ("speech", "audio")}
    columns = {"image": picture} | {name: {"min": 1, "max": most} for name, most in longest.items()}
    modalities = {
        name: {
            "codebooks": books[name],
            "open": [opening(name)],
            "close": [closing(name)],
            "shapes": [{"columns": columns[name]}],
        }
        for name in books
    }
    control = {role: f"<{role}>" for role in ("bos", "turn", "eos", "pad")}
    return {"format": 1, "control": control, "modalities": {"text": {"block": "text"}} | modalities}


def opening(modality: str) -> str:
    """The name of the token before its codes."""
    return f"<so{LETTERS[modality]}>"


def closing(modality: str) -> str:
    """The name of the token behind its codes."""
    return f"<eo{LETTERS[modality]}>"


def _codes(names: dict[str, int], modality: str, source: str) -> Int[np.ndarray, " codes"]:
    """The id of each code of a modality."""
    count = sum(name.startswith(f"<{PREFIXES[modality]}") for name in names)
    wanted = [f"<{PREFIXES[modality]}{code}>" for code in range(count)]
    missing = [name for name in [*wanted, opening(modality), closing(modality)] if name not in names]
    if missing or not count:
        raise OmniError(f"{source}: of {count} codes of {modality}, the added tokens lack {(missing or ['all'])[0]}")
    return np.array([names[name] for name in wanted], np.int32)


def lacks(model: Model) -> str | None:
    """What this family lacks of a model."""
    if "speech" not in model.grammar.modalities:
        return "model without speech"
    return llama.FAMILY.lacks(model)


FAMILY = Family(
    name="anygpt",
    model_type="llama",
    context_length=llama.FAMILY.context_length,
    read=llama.FAMILY.read,
    write=llama.FAMILY.write,
    lacks=lacks,
    preset=preset,
    places=llama_places,
    holds=holds,
)
