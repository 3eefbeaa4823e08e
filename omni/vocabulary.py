"""One id space for every modality.

A vocabulary is a set of *blocks* (a table from the codes of one codebook to ids) and of *special* ids (boundaries and
control tokens). A block is a table and not only a range, because public checkpoints scatter image codes through their
text vocabulary.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from omni_tokenizers.errors import OmniError

LARGEST = 1 << 24  # ids of a vocabulary that comes with a file from elsewhere
MULTIPLE = 128  # matrix units like sizes that divide evenly, and a mesh can split the output head


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Names for ids.

    Attributes:
      size: number of ids, padding included.
      blocks: block name -> int32 table `[codes]` of ids.
      special: special token name -> id.
    """

    size: int
    blocks: Mapping[str, Int[np.ndarray, " codes"]]
    special: Mapping[str, int]

    def __post_init__(self):
        for name, table in self.blocks.items():
            if table.size == 0 or np.unique(table).size != table.size:
                raise OmniError(f"vocabulary: block '{name}' is empty or names an id twice")
        owners: dict[int, str] = {}
        named = [(f"block '{name}'", table.tolist()) for name, table in self.blocks.items()]
        named += [(f"special token '{name}'", [token]) for name, token in self.special.items()]
        for owner, ids in named:
            for token in ids:
                if not 0 <= token < self.size:
                    raise OmniError(f"vocabulary: {owner} has id {token}, outside 0..{self.size - 1}")
                if token in owners:
                    raise OmniError(f"vocabulary: id {token} belongs to {owners[token]} and to {owner}")
                owners[token] = owner

    def __repr__(self) -> str:
        blocks = (f"{len(table)} of {name}" for name, table in self.blocks.items())
        return f"Vocabulary({self.size} ids: {', '.join(blocks)}, {len(self.special)} special)"

    @classmethod
    def build(cls, blocks: Mapping[str, int], special: Sequence[str]) -> Vocabulary:
        """Lays out special ids first, then each block in order, and pads the size to a multiple of 128.

        Args:
          blocks: block name -> number of codes.
          special: names of the special tokens.
        """
        start = len(special)
        tables = {}
        for name, codes in blocks.items():
            tables[name] = np.arange(start, start + codes, dtype=np.int32)
            start += codes
        size = -(-start // MULTIPLE) * MULTIPLE
        return cls(size, tables, {name: i for i, name in enumerate(special)})

    def token(self, name: str) -> int:
        """The id of a special token; `OmniError` if there is none of that name."""
        if name not in self.special:
            raise OmniError(f"vocabulary: no special token '{name}'; it has {', '.join(self.special)}")
        return self.special[name]

    def block(self, name: str) -> Int[np.ndarray, " codes"]:
        """The table of a block; `OmniError` if there is none of that name."""
        if name not in self.blocks:
            raise OmniError(f"vocabulary: no block '{name}'; it has {', '.join(self.blocks)}")
        return self.blocks[name]

    @functools.cached_property
    def _code_of(self) -> dict[str, Int[np.ndarray, " vocabulary"]]:
        inverse = {}
        for name, table in self.blocks.items():
            inverse[name] = np.full(self.size, -1, np.int32)
            inverse[name][table] = np.arange(table.size, dtype=np.int32)
        return inverse

    def to_ids(self, block: str, codes: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
        """Codes of one codebook as ids, int32; `OmniError` for a code out of range."""
        table, codes = self.block(block), np.asarray(codes)
        if codes.size and (codes.min() < 0 or codes.max() >= table.size):
            raise OmniError(
                f"codes for '{block}' run from {codes.min()} to {codes.max()}; it holds 0..{table.size - 1}"
            )
        return table[codes]

    def to_codes(self, block: str, ids: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
        """Ids as codes of one codebook, int32; -1 where an id does not belong to the block."""
        self.block(block)
        return self._code_of[block][np.asarray(ids)]

    def to_json(self) -> dict:
        """A JSON object; a block that is a range is written as `{"start", "size"}`, others as `{"table"}`."""
        blocks = {}
        for name, table in self.blocks.items():
            if np.array_equal(table, np.arange(table[0], table[0] + table.size)):
                blocks[name] = {"start": int(table[0]), "size": int(table.size)}
            else:
                blocks[name] = {"table": table.tolist()}
        return {"size": self.size, "blocks": blocks, "special": dict(self.special)}

    @classmethod
    def from_json(cls, data: dict) -> Vocabulary:
        """Reads what `to_json` wrote; `OmniError` names what is missing or of the wrong kind."""
        try:
            if data["size"] > LARGEST or any(entry.get("size", 0) > LARGEST for entry in data["blocks"].values()):
                raise OmniError(f"vocabulary.json asks for more than {LARGEST} ids")
            blocks = {
                name: np.asarray(entry["table"], np.int32)
                if "table" in entry
                else np.arange(entry["start"], entry["start"] + entry["size"], dtype=np.int32)
                for name, entry in data["blocks"].items()
            }
            return cls(int(data["size"]), blocks, {name: int(token) for name, token in data["special"].items()})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise OmniError(f"vocabulary.json is not a vocabulary: {type(error).__name__}: {error}") from error

    @functools.cached_property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the JSON form."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]

    def difference(self, other: Vocabulary) -> list[str]:
        """What differs between this vocabulary and another, a line each; empty if they are the same."""
        lines = [f"size: {self.size} here, {other.size} there"] if self.size != other.size else []
        for name in [*self.blocks, *(n for n in other.blocks if n not in self.blocks)]:
            mine, theirs = self.blocks.get(name), other.blocks.get(name)
            if mine is None or theirs is None:
                lines.append(f"block '{name}': only {'there' if mine is None else 'here'}")
            elif not np.array_equal(mine, theirs):
                lines.append(f"block '{name}': {_range(mine)} here, {_range(theirs)} there")
        for name in [*self.special, *(n for n in other.special if n not in self.special)]:
            mine, theirs = self.special.get(name), other.special.get(name)
            if mine != theirs:
                lines.append(f"special token '{name}': {_token(mine)} here, {_token(theirs)} there")
        return lines


def _range(table: Int[np.ndarray, " codes"]) -> str:
    return f"{table.size} codes at {table.min()}..{table.max()}"


def _token(token: int | None) -> str:
    return "absent" if token is None else f"id {token}"
