"""A vocabulary and a grammar for a set of tokenizers, where nothing else is asked for."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from omni.grammar import Grammar
from omni.vocabulary import Vocabulary
from omni_tokenizers import Tokenizer
from omni_tokenizers.errors import UsageError

CONTROL = {"bos": "<bos>", "turn": "<turn>", "eos": "<eos>", "pad": "<pad>"}
MODALITIES = ("text", "image", "audio")


def make_grammar(tokenizers: Mapping[str, Tokenizer], longest_sound: int) -> Grammar:
    """Control and boundary ids, then the codes of text, pictures and sound; see `Grammar.vocabulary`.

    A picture is one grid of its tokenizer's size, a sound frames of all its codebooks.

    Args:
      tokenizers: by modality; one of text, and any of pictures and sound.
      longest_sound: samples of the longest sound, at the rate of its tokenizer.

    Raises:
      UsageError: no tokenizer of text, or one of a modality for which there is no layout here.
    """
    if "text" not in tokenizers or set(tokenizers) - set(MODALITIES):
        raise UsageError(
            f"a grammar is made for tokenizers of text and any of {', '.join(MODALITIES[1:])}; "
            f"these are of {', '.join(tokenizers)}"
        )
    spans = [name for name in MODALITIES[1:] if name in tokenizers]
    special = [*CONTROL.values(), *(token for name in spans for token in (f"<{name}>", f"</{name}>"))]
    blocks = {"text": tokenizers["text"].codebook_sizes[0]}
    for name in spans:
        blocks |= dict(zip(_blocks(name, tokenizers[name]), tokenizers[name].codebook_sizes, strict=True))
    layouts = {name: _layout(name, tokenizers[name], longest_sound) for name in spans}
    modalities = {"text": {"block": "text"}, **layouts}
    declaration = {"format": 1, "control": CONTROL, "modalities": modalities}
    return Grammar(declaration, Vocabulary.build(blocks, special))


def code_vectors(
    grammar: Grammar, tokenizers: Mapping[str, Tokenizer]
) -> dict[str, Float[np.ndarray, "codes code_dim"]]:
    """Vocabulary block -> the tokenizer's vectors of its codes, of all modalities that have some."""
    return {
        block: vectors
        for name, layout in grammar.layouts.items()
        for block, vectors in zip(layout.codebooks, tokenizers[name].code_vectors, strict=True)
    }


def _blocks(modality: str, tokenizer: Tokenizer) -> list[str]:
    """Vocabulary blocks of a tokenizer's codebooks."""
    levels = range(len(tokenizer.codebook_sizes))
    return [modality] if modality == "image" else [f"{modality}{level}" for level in levels]


def _layout(modality: str, tokenizer: Tokenizer, longest_sound: int) -> dict:
    if modality == "image":
        rows, columns = tokenizer.grid
        shape = {"rows": rows, "columns": columns}
    else:
        shape = {"columns": {"min": 1, "max": -(-longest_sound // tokenizer.samples_per_frame)}}
    codebooks = _blocks(modality, tokenizer)
    return {"codebooks": codebooks, "open": [f"<{modality}>"], "close": [f"</{modality}>"], "shapes": [shape]}
