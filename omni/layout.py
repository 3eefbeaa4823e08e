"""How one modality's codes are written as a run of ids between its opening and closing tokens.

A `SpanLayout` reads the JSON of one modality and answers two questions, for any size that the modality allows: which
token stands where (`template`), and which sizes there are (`shapes`). Codes are always `[codebooks, rows, columns]`: a
picture is `[1, height, width]`, sound `[codebooks, 1, frames]`. Rows are written one after the other; inside a row,
codebook k is shifted right by `delays[k]` columns (all 0: the codebooks of a column stand together, "flattened"; 0, 1,
2, ...: the delay pattern of MusicGen, https://arxiv.org/abs/2306.05284), and places outside the row are left out.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from omni.vocabulary import Vocabulary
from omni_tokenizers.errors import OmniError

CONTROL, TEXT, BOUNDARY, SIZE, ROW_END, CODE = range(6)
ROLES = ("control", "text", "boundary", "size", "row_end", "code")

_KEYS = {"codebooks", "open", "begin", "close", "shapes", "row_end", "last_row_end", "delays"}
_SHAPE_KEYS = {"rows", "columns", "prefix"}


@dataclass(frozen=True)
class Shape:
    """An allowed size of a span and the size tokens that announce it (none for most layouts)."""

    rows: int
    columns: int
    prefix: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Template:
    """The tokens of a whole span of one shape, opening and closing tokens included.

    Attributes:
      fixed: id of every token that does not depend on the codes, -1 where a code stands.
      role: index into `ROLES`.
      level, row, column: codebook and place of a code; -1 elsewhere.
    """

    fixed: Int[np.ndarray, " tokens"]
    role: Int[np.ndarray, " tokens"]
    level: Int[np.ndarray, " tokens"]
    row: Int[np.ndarray, " tokens"]
    column: Int[np.ndarray, " tokens"]

    @functools.cached_property
    def is_code(self) -> Bool[np.ndarray, " tokens"]:
        return self.role == CODE

    @functools.cached_property
    def places(self) -> tuple[Int[np.ndarray, " codes"], ...]:
        """(level, row, column) of each code, in the order in which they are written."""
        return self.level[self.is_code], self.row[self.is_code], self.column[self.is_code]


# Bounds for declarations that come with files from elsewhere: codes of a span, and sizes in one range of them.
LARGEST, LARGEST_FAMILY = 1 << 20, 1 << 14


class SpanLayout:
    """The declaration of one modality (all but text), with names resolved to ids.

    Declaration keys: `codebooks` (block names), `open`, `close` (token names or ids), `shapes` (a list of
    `{"rows", "columns", "prefix"}`; `columns` may be `{"min", "max"}`), and optionally `begin` (tokens between size and
    codes), `row_end`, `last_row_end` (default true: the last row is ended too), `delays`.

    Raises:
      OmniError: for an unknown key, an unknown token or block, or sizes that are not positive.
    """

    def __init__(self, name: str, declaration: dict, vocabulary: Vocabulary):
        self.name = name
        _check_keys(declaration, _KEYS, required={"codebooks", "open", "close", "shapes"}, where=f"modality '{name}'")

        def ids(symbols) -> tuple[int, ...]:
            return tuple(s if isinstance(s, int) else vocabulary.token(s) for s in symbols)

        self.codebooks = tuple(declaration["codebooks"])
        self.tables = [vocabulary.block(block) for block in self.codebooks]
        self.open, self.close = ids(declaration["open"]), ids(declaration["close"])
        self.begin = ids(declaration.get("begin", ()))
        self.row_end = ids([declaration["row_end"]]) if declaration.get("row_end") is not None else ()
        self.last_row_end = declaration.get("last_row_end", True)
        self.delays = tuple(declaration.get("delays", (0,) * len(self.codebooks)))
        if not self.open or not self.close or not self.codebooks:
            raise OmniError(f"grammar: modality '{name}' needs an opening token, a closing token and a codebook")
        if len(self.delays) != len(self.codebooks) or min(self.delays) != 0:
            raise OmniError(f"grammar: modality '{name}' needs a delay for each codebook, the smallest of them 0")
        self.families = [self._family(entry, ids) for entry in declaration["shapes"]]
        self.shapes = {(s.rows, s.columns): s for family in self.families for s in family}
        if len(self.shapes) != sum(map(len, self.families)) or not self.shapes:
            raise OmniError(f"grammar: modality '{name}' declares no size, or one size twice")

    def _family(self, entry: dict, ids) -> list[Shape]:
        """The shapes of one entry of `shapes`: one, or a range of lengths that share one prefix."""
        _check_keys(entry, _SHAPE_KEYS, required={"columns"}, where=f"a shape of modality '{self.name}'")
        rows, columns = entry.get("rows", 1), entry["columns"]
        low, high = (columns["min"], columns["max"]) if isinstance(columns, dict) else (columns, columns)
        if not (rows >= 1 and 1 <= low <= high and rows * high <= LARGEST and high - low < LARGEST_FAMILY):
            raise OmniError(f"grammar: modality '{self.name}' has a size of {rows} x {low}..{high}")
        return [Shape(rows, c, ids(entry.get("prefix", ()))) for c in range(low, high + 1)]

    def row(self, row: int, columns: int, first_step: int = 0) -> Iterator[tuple[int, int, int]]:
        """(level, row, column) of the codes of a row, in writing order, from step `first_step` on."""
        for step in range(first_step, columns + max(self.delays)):
            for level, delay in enumerate(self.delays):
                if 0 <= step - delay < columns:
                    yield level, row, step - delay

    def symbols(self, shape: Shape) -> Iterator[tuple[int, int, int, int, int]]:
        """(fixed id or -1, role, level, row, column) of every token of a span."""
        for token in self.open:
            yield token, BOUNDARY, -1, -1, -1
        for token in shape.prefix:
            yield token, SIZE, -1, -1, -1
        for token in self.begin:
            yield token, BOUNDARY, -1, -1, -1
        for row in range(shape.rows):
            for level, _, column in self.row(row, shape.columns):
                yield -1, CODE, level, row, column
            if row < shape.rows - 1 or self.last_row_end:
                for token in self.row_end:
                    yield token, ROW_END, -1, row, -1
        for token in self.close:
            yield token, BOUNDARY, -1, -1, -1

    @functools.cache  # noqa: B019  (a layout lives as long as its grammar)
    def template(self, rows: int, columns: int) -> Template:
        """The tokens of a span of this size; `OmniError` if the grammar does not allow it."""
        shape = self.shapes.get((rows, columns))
        if shape is None:
            raise OmniError(f"the grammar writes no {self.name} of {rows} x {columns} codes; it knows {self.sizes()}")
        return Template(*np.array(list(self.symbols(shape)), np.int32).T)

    @functools.cached_property
    def by_length(self) -> dict[int, list[Shape]]:
        """Shapes by the number of tokens of the whole span."""
        lengths: dict[int, list[Shape]] = {}
        for shape in self.shapes.values():
            ends = (shape.rows if self.last_row_end else shape.rows - 1) * len(self.row_end)
            codes = len(self.codebooks) * shape.rows * shape.columns
            fixed = len(self.open) + len(shape.prefix) + len(self.begin) + len(self.close)
            lengths.setdefault(fixed + codes + ends, []).append(shape)
        return lengths

    def sizes(self) -> str:
        """The allowed sizes in words, for messages."""
        families = [
            f"{f[0].rows} x {f[0].columns}" + (f"..{f[-1].columns}" if len(f) > 1 else "")
            for f in itertools.islice(self.families, 6)
        ]
        return ", ".join(families) + (", ..." if len(self.families) > 6 else "")


def _check_keys(declaration: dict, known: set[str], required: set[str], where: str) -> None:
    unknown, missing = set(declaration) - known, required - set(declaration)
    if unknown or missing:
        problem = f"unknown key {sorted(unknown)}" if unknown else f"missing key {sorted(missing)}"
        raise OmniError(f"grammar: {where}: {problem}; keys are {sorted(known)}")
