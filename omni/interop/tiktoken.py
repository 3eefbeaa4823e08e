"""A text tokenizer in the form of the package tiktoken, as the tokenizer.json that the package `tokenizers` reads.

Such a file has a line for each piece of bytes, in base 64, with its id, which is its rank too: of neighbours the two
whose bytes together have the lowest rank are joined first. tokenizer.json lists the pairs that may be joined instead,
so each way to cut a piece in two others is one.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Collection, Mapping

from etils import epath

from omni_tokenizers.errors import OmniError
from omni_tokenizers.text_public import LARGEST

LONGEST = 256
"""Bytes of a piece: the ways to cut it grow with them."""


def read_ranks(path: epath.PathLike) -> dict[bytes, int]:
    """The ids of pieces; `OmniError` for a file of another form."""
    path = epath.Path(path)
    if path.stat().length > LARGEST:
        raise OmniError(f"{path}: larger than {LARGEST} bytes, so no list of pieces of text")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            piece, rank = line.split()
            piece = base64.b64decode(piece, validate=True)
            if not 1 <= len(piece) <= LONGEST or piece in ranks:
                raise ValueError("no piece, or one that stood there before")
            ranks[piece] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise OmniError(f"{path}: line {number} is no piece in base 64 and its id ({error})") from None
    bytes_alone = {bytes([byte]) for byte in range(256)}
    if len(set(ranks.values())) < len(ranks) or not bytes_alone <= ranks.keys():
        raise OmniError(f"{path}: an id stands there twice, or a byte has none")
    return ranks


def tokenizer_json(ranks: Mapping[bytes, int], pattern: str, added: Mapping[str, int], text: Collection[str]) -> bytes:
    """The content of a tokenizer.json.

    Args:
      ranks: ids of pieces, which are their ranks.
      pattern: regular expression of the words that are cut into pieces one by one.
      added: ids by name of tokens that are no pieces.
      text: those of them that may stand in text.
    """
    letters = _letters()
    names = {piece: "".join(letters[byte] for byte in piece) for piece in ranks}
    merges = []
    for piece, rank in ranks.items():
        cuts = ((piece[:place], piece[place:]) for place in range(1, len(piece)))
        known = [(ranks[left], ranks[right], left, right) for left, right in cuts if left in ranks and right in ranks]
        merges += [(rank, *pair) for pair in known]
    merges.sort(key=lambda merge: merge[:3])
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content = {
        "version": "1.0",
        "added_tokens": [
            {"id": token, "content": name, "special": name not in text} | plain for name, token in added.items()
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            ],
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {
            "type": "BPE",
            "ignore_merges": True,  # a word that is a piece is that piece
            "vocab": {names[piece]: rank for piece, rank in ranks.items()},
            "merges": [[names[left], names[right]] for *_, left, right in merges],
        },
    }
    return json.dumps(content, ensure_ascii=False).encode()


def _letters() -> dict[int, str]:
    """The letter by which byte-level vocabularies write each byte: those that can be seen as themselves, the others, in
    order, from U+0100 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {byte: chr(0x100 + place) for place, byte in enumerate(hidden)}
