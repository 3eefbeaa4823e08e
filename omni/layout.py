"""How one modality's codes are written as a run of ids between its opening and closing tokens.

A `SpanLayout` reads the JSON of one modality and answers two questions, for any size that the modality allows: which
token stands where (`template`), and which sizes there are (`shapes`). Codes are `[codebooks, rows, columns]`: a picture
is `[1, height, width]`, sound `[codebooks, 1, frames]`; or `[codebooks, frames, rows, columns]` where the declared
shapes have frames: video. Frames are written one after the other, and the rows of a frame likewise; inside a row,
codebook k is shifted right by `delays[k]` columns (all 0: the codebooks of a column stand together, "flattened"; 0, 1,
2, ...: the delay pattern of MusicGen, https://arxiv.org/abs/2306.05284), and places outside the row are left out.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from omni.vocabulary import Vocabulary
from omni_tokenizers.errors import OmniError

CONTROL, TEXT, BOUNDARY, SIZE, ROW_END, CODE, FRAME_BOUNDARY = range(7)
ROLES = ("control", "text", "boundary", "size", "row_end", "code", "frame_boundary")

_KEYS = {"codebooks", "open", "begin", "close", "shapes", "row_end", "last_row_end", "delays"}
_PICTURE_KEYS = {"preprocessing", "spelling", "features"}
_VIDEO_KEYS = {"frame_begin", "frame_end", "frame_rate"}
_SPELLED, _LONGEST_SIZE = "0123456789*", 16
_SHAPE_KEYS = {"frames", "rows", "columns", "prefix"}

Symbol = tuple[int, int, int, int, int, int]
"""A token of a span: its fixed id or -1, its role, and level, frame, row and column of the code that it is, else -1."""


@dataclass(frozen=True)
class Shape:
    """An allowed size of a span and the size tokens that announce it (none for most layouts).

    `size` is (rows, columns), or (frames, rows, columns) of a video.
    """

    size: tuple[int, ...]
    prefix: tuple[int, ...] = ()

    @property
    def grid(self) -> tuple[int, int, int]:
        """(frames, rows, columns); what is no video counts as one frame."""
        return (1, *self.size)[-3:]


@dataclass(frozen=True, eq=False)
class Template:
    """The tokens of a whole span of one shape, opening and closing tokens included.

    Attributes:
      fixed: id of every token that does not depend on the codes, -1 where a code stands.
      role: index into `ROLES`.
      level, frame, row, column: codebook and place of a code; -1 elsewhere.
    """

    fixed: Int[np.ndarray, " tokens"]
    role: Int[np.ndarray, " tokens"]
    level: Int[np.ndarray, " tokens"]
    frame: Int[np.ndarray, " tokens"]
    row: Int[np.ndarray, " tokens"]
    column: Int[np.ndarray, " tokens"]

    @functools.cached_property
    def is_code(self) -> Bool[np.ndarray, " tokens"]:
        return self.role == CODE

    @functools.cached_property
    def places(self) -> tuple[Int[np.ndarray, " codes"], ...]:
        """(level, frame, row, column) of each code, in the order in which they are written."""
        return tuple(each[self.is_code] for each in (self.level, self.frame, self.row, self.column))


# Bounds for declarations that come with files from elsewhere: codes of a span, sizes in one range of them, and frames
# in a second.
LARGEST, LARGEST_FAMILY, FASTEST = 1 << 20, 1 << 14, 240


class SpanLayout:
    """The declaration of one modality (all but text), with names resolved to ids.

    Declaration keys: `codebooks` (block names), `open`, `close` (token names or ids), `shapes` (a list of
    `{"rows", "columns", "prefix"}`; `columns` may be `{"min", "max"}`), and optionally `begin` (tokens between size and
    codes), `row_end`, `last_row_end` (default true: the last row is ended too), `delays`.

    Grids of pictures may have `preprocessing` (`omni.image_processor`, there for the same reason as `frame_rate`), and
    `spelling`, a token of text for each of "0123456789*": then a picture that is given, not drawn, may have any size,
    whose prefix is "rows*columns" in these tokens. With `features`, `{"token", "count"}`, pictures of prompts are no
    codes: between the tokens that open and close them stands a special token `count` times, in the places of features.

    The shapes of videos, and they alone, also have `frames`, frames of codes, which may be the range in place of
    `columns`. Optional keys of theirs are `frame_begin` and `frame_end`, tokens around every frame, and `frame_rate`.

    Attributes:
      has_frames: whether this is a video's layout.
      feature: the token that stands in the places of features; None where prompts have codes.
      seen: ids of a whole span of features.
      frame_rate: frames of pixels, not of codes, in a second of video; None where the declaration does not say. It is
        declared here since it is part of what the codes mean: a model that learned 8 frames a second reads others
        wrongly, and in the declaration it is covered by the hash that shards and weights are compared by.

    Raises:
      OmniError: for an unknown key, an unknown token or block, or sizes that are not positive.
    """

    def __init__(self, name: str, declaration: dict, vocabulary: Vocabulary):
        self.name = name
        required = {"codebooks", "open", "close", "shapes"}
        _check_keys(declaration, _KEYS | _PICTURE_KEYS | _VIDEO_KEYS, required=required, where=f"modality '{name}'")

        def ids(symbols) -> tuple[int, ...]:
            return tuple(s if isinstance(s, int) else vocabulary.token(s) for s in symbols)

        self.codebooks = tuple(declaration["codebooks"])
        self.tables = [vocabulary.block(block) for block in self.codebooks]
        self.open, self.close = ids(declaration["open"]), ids(declaration["close"])
        self.begin = ids(declaration.get("begin", ()))
        self.row_end, self.frame_begin, self.frame_end = (
            ids([declaration[key]]) if declaration.get(key) is not None else ()
            for key in ("row_end", "frame_begin", "frame_end")
        )
        self.last_row_end = declaration.get("last_row_end", True)
        self.delays = tuple(declaration.get("delays", (0,) * len(self.codebooks)))
        if not self.open or not self.close or not self.codebooks:
            raise OmniError(f"grammar: modality '{name}' needs an opening token, a closing token and a codebook")
        if len(self.delays) != len(self.codebooks) or min(self.delays) != 0:
            raise OmniError(f"grammar: modality '{name}' needs a delay for each codebook, the smallest of them 0")
        self.families = [self._family(entry, ids) for entry in declaration["shapes"]]
        self.shapes = {shape.size: shape for family in self.families for shape in family}
        if len(self.shapes) != sum(map(len, self.families)) or not self.shapes:
            raise OmniError(f"grammar: modality '{name}' declares no size, or one size twice")
        self.has_frames = len(next(iter(self.shapes))) == 3
        self.frame_rate = self._frame_rate(declaration)
        self.preprocessing = declaration.get("preprocessing")
        if not isinstance(self.preprocessing, dict | None):
            raise OmniError(f"grammar: modality '{name}' has preprocessing that is no JSON object")
        self.spelling = dict(zip(spelled := declaration.get("spelling", {}), ids(spelled.values()), strict=True))
        self.feature, self.seen = self._features(declaration.get("features"), vocabulary)
        if self.has_frames and (foreign := _PICTURE_KEYS & set(declaration)):
            raise OmniError(f"grammar: modality '{name}' has {sorted(foreign)}, which no video has")
        if self.spelling and (len(set(self.spelling.values())), *sorted(self.spelling)) != (11, *sorted(_SPELLED)):
            raise OmniError(f"grammar: modality '{name}' needs spelling to be a token for each of {_SPELLED}")

    def _features(self, declared: dict | None, vocabulary: Vocabulary) -> tuple[int | None, tuple[int, ...]]:
        """The token that stands in the places of features, and all ids of a span of these; None and no ids without."""
        if declared is None:
            return None, ()
        _check_keys(declared, {"token", "count"}, {"token", "count"}, where=f"features of modality '{self.name}'")
        if not 1 <= declared["count"] <= LARGEST:
            raise OmniError(f"grammar: modality '{self.name}' has {declared['count']} features, not 1 to {LARGEST}")
        token = vocabulary.token(declared["token"])
        return token, (*self.open, *[token] * declared["count"], *self.close)

    def _frame_rate(self, declaration: dict) -> float | None:
        """The declared rate; also refuses what only videos have where shapes have no frames, and frames in some."""
        if any(len(size) != 2 + self.has_frames for size in self.shapes):
            raise OmniError(f"grammar: modality '{self.name}' has sizes with frames and sizes without")
        if not self.has_frames and (foreign := _VIDEO_KEYS & set(declaration)):
            raise OmniError(f"grammar: modality '{self.name}' has {sorted(foreign)}, but no frames in its shapes")
        rate = declaration.get("frame_rate")
        if rate is not None and not 0 < rate <= FASTEST:
            raise OmniError(f"grammar: modality '{self.name}' has a frame rate of {rate}; it is above 0, to {FASTEST}")
        return None if rate is None else float(rate)

    def _family(self, entry: dict, ids) -> list[Shape]:
        """The shapes of one entry of `shapes`: one, or a range of lengths that share one prefix."""
        _check_keys(entry, _SHAPE_KEYS, required={"columns"}, where=f"a shape of modality '{self.name}'")
        axes = ("frames", "rows", "columns") if "frames" in entry else ("rows", "columns")
        sides = [_side(entry.get(axis, 1), may_vary=axis != "rows") for axis in axes]
        lowest, largest = (tuple(ends) for ends in zip(*sides, strict=True))
        fits = math.prod(largest) <= LARGEST and sum(low < high for low, high in sides) <= 1
        if not fits or not all(1 <= low <= high < low + LARGEST_FAMILY for low, high in sides):
            raise OmniError(f"grammar: modality '{self.name}' has a size of {_in_words(lowest, largest)}")
        sizes = itertools.product(*(range(low, high + 1) for low, high in sides))
        return [Shape(size, ids(entry.get("prefix", ()))) for size in sizes]

    def row(self, row: int, columns: int, first_step: int = 0) -> Iterator[tuple[int, int, int]]:
        """(level, row, column) of the codes of a row, in writing order, from step `first_step` on."""
        for step in range(first_step, columns + max(self.delays)):
            for level, delay in enumerate(self.delays):
                if 0 <= step - delay < columns:
                    yield level, row, step - delay

    def opening(self, shape: Shape) -> Iterator[Symbol]:
        """The tokens before the codes."""
        for tokens, role in ((self.open, BOUNDARY), (shape.prefix, SIZE), (self.begin, BOUNDARY)):
            yield from _fixed(tokens, role)

    def frame(self, frame: int, shape: Shape) -> Iterator[Symbol]:
        """The tokens of one frame: all codes of what is no video."""
        yield from _fixed(self.frame_begin, FRAME_BOUNDARY)
        for row in range(shape.grid[1]):
            yield from self._row(frame, row, shape)
        yield from _fixed(self.frame_end, FRAME_BOUNDARY)

    def _row(self, frame: int, row: int, shape: Shape, first_step: int = 0) -> Iterator[Symbol]:
        """The tokens of a row, from the codes of step `first_step` on."""
        _, rows, columns = shape.grid
        for level, _, column in self.row(row, columns, first_step):
            yield -1, CODE, level, frame, row, column
        if row < rows - 1 or self.last_row_end:
            yield from _fixed(self.row_end, ROW_END, row)

    def ending(self, shape: Shape) -> Iterator[Symbol]:
        """Of a span of one row of n columns, the tokens behind steps 0 to n - 1, with which longer rows begin, too."""
        yield from self._row(0, 0, shape, shape.grid[2])
        yield from _fixed(self.frame_end, FRAME_BOUNDARY)
        yield from self.closing()

    def closing(self) -> Iterator[Symbol]:
        """The tokens after the codes."""
        return _fixed(self.close, BOUNDARY)

    def symbols(self, shape: Shape) -> Iterator[Symbol]:
        """Every token of a span."""
        yield from self.opening(shape)
        for frame in range(shape.grid[0]):
            yield from self.frame(frame, shape)
        yield from self.closing()

    def template(self, *size: int, given: bool = False) -> Template:
        """The tokens of a span of this size, (rows, columns) or (frames, rows, columns).

        Args:
          given: whether it may have a size that is read and never drawn.
        Raises:
          OmniError: if the grammar does not allow it.
        """
        if size in self.shapes:
            return self._declared(*size)
        if not (given and self.spelling and min(size) >= 1 and math.prod(size) <= LARGEST):
            words = _in_words(size, size)
            raise OmniError(f"the grammar writes no {self.name} of {words} codes; it knows {self.sizes()}")
        return self._spelled(*size)

    @functools.cache  # noqa: B019  (a layout lives as long as its grammar)
    def _declared(self, *size: int) -> Template:
        return self._template(self.shapes[size])

    @functools.lru_cache(maxsize=64)  # noqa: B019  (of any sizes there are too many to keep all)
    def _spelled(self, rows: int, columns: int) -> Template:
        prefix = tuple(self.spelling[character] for character in f"{rows}*{columns}")
        return self._template(Shape((rows, columns), prefix))

    def _template(self, shape: Shape) -> Template:
        return Template(*np.array(list(self.symbols(shape)), np.int32).T)

    def given_template(self, ids: Int[np.ndarray, " tokens"]) -> tuple[tuple[int, ...], Template] | None:
        """Size and tokens of the span that ids begin with, if it is of a size that is read and never drawn."""
        names, place, size = {token: character for character, token in self.spelling.items()}, len(self.open), ""
        if not names or tuple(ids[:place].tolist()) != self.open:
            return None
        for token in ids[place : place + _LONGEST_SIZE].tolist():
            if token not in names:
                break
            size += names[token]
        if not re.fullmatch(r"[1-9][0-9]*\*[1-9][0-9]*", size):
            return None
        rows, columns = map(int, size.split("*"))
        if (rows, columns) in self.shapes or rows * columns > len(ids):
            return None
        return (rows, columns), self.template(rows, columns, given=True)

    @functools.cached_property
    def by_length(self) -> dict[int, list[Shape]]:
        """Shapes by the number of tokens of the whole span."""
        lengths: dict[int, list[Shape]] = {}
        for shape in self.shapes.values():
            fixed = len(self.open) + len(shape.prefix) + len(self.begin) + len(self.close)
            lengths.setdefault(fixed + shape.grid[0] * self.frame_length(shape), []).append(shape)
        return lengths

    def frame_length(self, shape: Shape) -> int:
        """Number of tokens of a frame."""
        _, rows, columns = shape.grid
        ends = (rows if self.last_row_end else rows - 1) * len(self.row_end)
        return len(self.frame_begin) + len(self.codebooks) * rows * columns + ends + len(self.frame_end)

    def sizes(self) -> str:
        """The allowed sizes in words, for messages."""
        families = [_in_words(f[0].size, f[-1].size) for f in itertools.islice(self.families, 6)]
        return ", ".join(families) + (", ..." if len(self.families) > 6 else "")


def _fixed(tokens: tuple[int, ...], role: int, row: int = -1) -> Iterator[Symbol]:
    """Tokens that do not depend on the codes."""
    for token in tokens:
        yield token, role, -1, -1, row, -1


def _side(declared, *, may_vary: bool) -> tuple[int, int]:
    """Smallest and largest length of a side, which is a number or `{"min", "max"}`."""
    return (declared["min"], declared["max"]) if may_vary and isinstance(declared, dict) else (declared, declared)


def _in_words(lowest: tuple[int, ...], largest: tuple[int, ...]) -> str:
    """A size, or a range of sizes: 2 x 3..5."""
    return " x ".join(f"{a}" if a == b else f"{a}..{b}" for a, b in zip(lowest, largest, strict=True))


def _check_keys(declaration: dict, known: set[str], required: set[str], where: str) -> None:
    unknown, missing = set(declaration) - known, required - set(declaration)
    if unknown or missing:
        problem = f"unknown key {sorted(unknown)}" if unknown else f"missing key {sorted(missing)}"
        raise OmniError(f"grammar: {where}: {problem}; keys are {sorted(known)}")
