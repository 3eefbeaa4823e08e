"""How a document is written in ids, declared once as data.

From one JSON declaration (see `Grammar`) come the packer (`pack`), the parser (`parse`), the role and the (time, row,
column) position of each token, and the decoding state machine (`tables`): which ids may follow, what state they lead
to, and how many tokens an open span still needs. No other file knows what a span looks like.

A document is `bos, context parts, turn, target parts, eos`; in a chat, more turns follow, and all before the last one
is context. The state machine is a trie of all the token runs that the
layouts allow, over *classes* of ids: ids that no rule tells apart share a class, so its tables stay small whatever the
vocabulary.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int

from omni.automaton import GrammarTables, compile_tables
from omni.layout import ROLES, SpanLayout, Template
from omni.vocabulary import Vocabulary
from omni_tokenizers.errors import OmniError

__all__ = ["ROLES", "Grammar", "GrammarError", "GrammarTables", "Span", "Tokens"]

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Span:
    """The codes of one part, int32: text `[n]`, video `[codebooks, frames, rows, columns]`, others `[codebooks, rows,
    columns]`.

    A part of a prompt may have features in place of codes, of which there are then none.
    """

    modality: str
    codes: Int[np.ndarray, "*shape"]
    context: bool = False
    features: Float[np.ndarray, "features dim"] | None = None

    def __repr__(self) -> str:
        return f"Span({self.modality}, codes={self.codes.dtype}{list(self.codes.shape)}{', context' * self.context})"


@dataclass(frozen=True, eq=False)
class Tokens:
    """A document as ids, the grammar state after each, and whether it belongs to what is to be produced."""

    ids: Int[np.ndarray, " tokens"]
    states: Int[np.ndarray, " tokens"]
    target: Bool[np.ndarray, " tokens"]

    def __repr__(self) -> str:
        return f"Tokens({len(self.ids)} ids, {int(self.target.sum())} of them to be produced)"


class GrammarError(OmniError):
    """Ids that are not a document. `spans` holds the spans that were whole before the mistake."""

    def __init__(self, message: str, spans: Sequence[Span] = ()):
        super().__init__(message)
        self.spans = list(spans)


class Grammar:
    """A declaration compiled against a vocabulary.

    The declaration is a JSON object: `{"format": 1, "control": {"bos", "turn", "eos", "pad": token names},
    "modalities": {"text": {"block": name}, other: see `omni.layout.SpanLayout`}}`, and optionally `"unconditional"`:
    the prompt that guidance weighs against, "empty" (bos and turn, the default) or "padded" (`Grammar.padded`).

    Raises:
      OmniError: when the declaration is incomplete, names unknown tokens, or two of its rules cannot be told apart.
    """

    def __init__(self, declaration: dict, vocabulary: Vocabulary):
        try:
            self._read(declaration, vocabulary)
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # JSON of another form, in whatever place
            raise OmniError(f"grammar: not a declaration of a grammar ({type(error).__name__}: {error})") from error

    def _read(self, declaration: dict, vocabulary: Vocabulary) -> None:
        if declaration.get("format") != FORMAT:
            raise OmniError(
                f"grammar: format {declaration.get('format')!r} is not {FORMAT}, the one this version reads"
            )
        modalities = declaration.get("modalities", {})
        if "text" not in modalities or set(modalities["text"]) != {"block"}:
            raise OmniError('grammar: "modalities" needs "text": {"block": name}')
        if set(declaration.get("control", ())) != {"bos", "turn", "eos", "pad"}:
            raise OmniError('grammar: "control" must name exactly "bos", "turn", "eos" and "pad"')
        self.unconditional = declaration.get("unconditional", "empty")
        if self.unconditional not in ("empty", "padded"):
            raise OmniError(f'grammar: unconditional is {self.unconditional!r}; it must be "empty" or "padded"')
        if wrong := [name for name in modalities if not re.fullmatch("[A-Za-z0-9_-]{1,64}", name)]:  # names of folders
            raise OmniError(f"grammar: modality {wrong[0][:80]!r}: a name is letters, digits, - and _")
        self.declaration, self.vocabulary = declaration, vocabulary
        self.modalities = ("text", *(name for name in modalities if name != "text"))
        self.control = {role: vocabulary.token(name) for role, name in declaration["control"].items()}
        self.text_block = modalities["text"]["block"]
        self.layouts = {name: SpanLayout(name, modalities[name], vocabulary) for name in self.modalities[1:]}
        self._opening = {layout.open: layout for layout in self.layouts.values()}
        if len(self._opening) != len(self.layouts):
            raise OmniError("grammar: two modalities open with the same tokens")
        text_table = vocabulary.block(self.text_block)
        self.tables = compile_tables(vocabulary.size, text_table, self.control, list(self.layouts.values()))

    def __repr__(self) -> str:
        return f"Grammar({', '.join(self.modalities)})"

    def to_json(self) -> dict:
        """The declaration."""
        return self.declaration

    @property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the declaration."""
        return hashlib.sha256(json.dumps(self.declaration, sort_keys=True).encode()).hexdigest()[:16]

    def index(self, modality: str) -> int:
        """The number of a modality; `OmniError` names the known ones."""
        if modality not in self.modalities:
            raise OmniError(f"unknown modality '{modality}'; this model knows {', '.join(self.modalities)}")
        return self.modalities.index(modality)

    def span_ids(self, span: Span) -> Int[np.ndarray, " tokens"]:
        """The ids of one span, opening and closing tokens included; `OmniError` for a size or code it cannot hold."""
        codes = np.asarray(span.codes, np.int32)
        if span.modality == "text":
            return self.vocabulary.to_ids(self.text_block, codes)
        layout = self.layouts[self.modalities[self.index(span.modality)]]
        if span.features is not None:
            return self._seen_ids(layout, len(span.features))
        if codes.ndim != 3 + layout.has_frames or codes.shape[0] != len(layout.codebooks):
            raise OmniError(
                f"codes of {span.modality} have shape {codes.shape}; the grammar wants "
                f"[{len(layout.codebooks)}, {'frames, ' if layout.has_frames else ''}rows, columns]"
            )
        template = layout.template(*codes.shape[1:], given=span.context)
        per_level = np.stack(
            [self.vocabulary.to_ids(block, level) for block, level in zip(layout.codebooks, codes, strict=True)]
        )
        ids = template.fixed.copy()
        ids[template.is_code] = per_level.reshape(_framed(codes.shape))[template.places]
        return ids

    def _seen_ids(self, layout: SpanLayout, features: int) -> Int[np.ndarray, " tokens"]:
        ids = np.array(layout.seen, np.int32)
        if (count := np.count_nonzero(ids == layout.feature)) != features:
            raise OmniError(f"{features} features of {layout.name}; the grammar has places for {count}")
        return ids

    def feature_places(self, ids: Int[np.ndarray, " tokens"]) -> Int[np.ndarray, " features"]:
        """Where features stand in a prompt."""
        return np.flatnonzero(
            np.isin(ids, [each.feature for each in self.layouts.values() if each.feature is not None])
        )

    def prompt(self, spans: Sequence[Span]) -> Int[np.ndarray, " tokens"]:
        """Ids of `bos, spans, turn`: what the model reads before it answers."""
        return self.conversation([spans])

    def padded(self, ids: Int[np.ndarray, " tokens"]) -> Int[np.ndarray, " tokens"]:
        """A prompt that says nothing: as long as `ids`, padding but for bos."""
        return np.where(ids == self.control["bos"], ids, self.control["pad"]).astype(np.int32)

    def conversation(self, messages: Sequence[Sequence[Span]]) -> Int[np.ndarray, " tokens"]:
        """Ids of `bos, spans, turn, spans, turn, ...`: what two sides said in turns, before the next one answers."""
        pieces = [[self.control["bos"]]]
        for message in messages:
            pieces += [*map(self.span_ids, message), [self.control["turn"]]]
        return np.concatenate(pieces).astype(np.int32)

    def pack(self, spans: Sequence[Span]) -> Tokens:
        """A whole document; spans marked as context come first. `OmniError` if they do not."""
        contexts = [span.context for span in spans]
        if contexts != sorted(contexts, reverse=True):
            raise OmniError("a document's context parts come before its target parts")
        prompt = self.prompt([span for span in spans if span.context])
        targets = [self.span_ids(span) for span in spans if not span.context]
        ids = np.concatenate([prompt, *targets, [self.control["eos"]]]).astype(np.int32)
        return Tokens(ids, self.annotate(ids), np.arange(len(ids)) >= len(prompt))

    def annotate(self, ids: Int[np.ndarray, " tokens"]) -> Int[np.ndarray, " tokens"]:
        """The state after each id; `GrammarError` at the first id that may not stand where it stands."""
        ids = self._checked(ids)
        if not len(ids) or ids[0] != self.control["bos"]:
            raise GrammarError("a document begins with bos")
        rest = self._around_given(ids, 1, lambda state, run, first: self.follow(state, run, first=first))
        return np.array([self.tables.start, *rest], np.int32)

    def _around_given(
        self,
        ids: Int[np.ndarray, " tokens"],
        place: int,
        follow: Callable[[int, Int[np.ndarray, " tokens"], int], Sequence[int]],
    ) -> list[int]:
        """The states after the ids from a place on, where parts begin, by `follow` around spans that are given."""
        states, tables = [], self.tables
        for start, end, modality in [*sorted(self._given(ids)), (len(ids), len(ids), 0)]:
            states += list(follow(states[-1] if states else tables.start, ids[place:start], place))
            if start < end:
                if not tables.top[states[-1] if states else tables.start]:
                    raise GrammarError(f"token {start} (id {int(ids[start])}) may not stand there")
                # The tables know no span of such a size; nothing is drawn inside, so its tokens count as text does.
                states += [tables.after_text] * (end - start - 1)
                states.append(int(np.flatnonzero(tables.closed == modality)[0]))
            place = end
        return states

    def _given(self, ids: Int[np.ndarray, " tokens"]) -> Iterator[tuple[int, int, int]]:
        """Where spans that are read and never drawn, of other sizes or of features, begin and end; their modality."""
        for layout in self.layouts.values():
            seen = np.array(layout.seen, np.int32)
            for start in np.flatnonzero(ids == layout.open[0]).tolist() if layout.seen else ():
                if np.array_equal(ids[start : start + len(seen)], seen):
                    yield start, start + len(seen), self.index(layout.name)
            if not layout.spelling:
                continue
            for start in np.flatnonzero(ids == layout.open[0]).tolist():
                if (found := layout.given_template(ids[start:])) is not None:
                    end = start + len(found[1].fixed)
                    if self._codes(layout, *found, ids[start:end]) is not None:
                        yield start, end, self.index(layout.name)

    def annotate_chat(self, ids: Int[np.ndarray, " tokens"]) -> Int[np.ndarray, " tokens"]:
        """The state after each id of a chat, in which tokens that no document has may stand between parts, such as
        those that say who speaks; behind the last id a reply begins.

        Raises:
          GrammarError: no ids, or a part that is not whole.
        """
        states = self._around_given(self._checked(ids), 0, self._follow_chat)
        if not states or not self.tables.top[states[-1]]:
            raise GrammarError("a chat has tokens, and its last part is whole")
        return np.array([*states[:-1], self.tables.after_turn], np.int32)

    def _follow_chat(self, state: int, ids: Int[np.ndarray, " tokens"], first: int) -> list[int]:
        """The state after each of some ids of a chat, the first of which stands at the place `first`."""
        tables, next_states, states = self.tables, self._next_states, []
        for index, symbol in enumerate(tables.class_of[ids].tolist()):
            found, between = next_states[state][symbol], tables.top[state]
            state = tables.start if between and found in (-1, tables.end) else found
            if state < 0:
                raise GrammarError(f"token {first + index} (id {int(ids[index])}) may not stand there")
            states.append(state)
        return states

    def follow(self, state: int | None, ids: Int[np.ndarray, " tokens"], first: int = 0) -> Int[np.ndarray, " tokens"]:
        """The state after each of some ids behind `state`, None for the beginning of a reply.

        Raises:
          GrammarError: an id that may not stand where it stands; the message counts tokens from `first` on.
        """
        ids, next_states = self._checked(ids), self._next_states
        state, states = self.tables.after_turn if state is None else state, []
        for index, symbol in enumerate(self.tables.class_of[ids].tolist()):
            state = next_states[state][symbol]
            if state < 0:
                raise GrammarError(f"token {first + index} (id {int(ids[index])}) may not stand there")
            states.append(state)
        return np.array(states, np.int32)

    @functools.cached_property
    def _next_states(self) -> list[list[int]]:
        """The transitions as lists, which Python walks several times as fast as it does an array."""
        return self.tables.next_state.tolist()

    def _checked(self, ids: Int[np.ndarray, " tokens"]) -> Int[np.ndarray, " tokens"]:
        """The ids as int32; `GrammarError` for one that the vocabulary does not have."""
        ids = np.asarray(ids)
        outside = np.flatnonzero((ids < 0) | (ids >= self.vocabulary.size))
        if outside.size:
            raise GrammarError(f"token {outside[0]} (id {ids[outside[0]]}) is outside 0..{self.vocabulary.size - 1}")
        return ids.astype(np.int32)

    def positions(
        self, states: Int[np.ndarray, " tokens"], index: Int[np.ndarray, " tokens"]
    ) -> Int[np.ndarray, "tokens 3"]:
        """(time, row, column) of tokens at `index`.

        Time is the index itself. A code in a grid counts rows and columns from the index at which its span opened; any
        other token has its index in all three. After Qwen2-VL's M-RoPE (https://arxiv.org/abs/2409.12191), which holds
        time still inside a picture: here it runs on, so that one-dimensional positions are the first coordinate alone.
        Every frame of a video counts rows and columns from there, as in M-RoPE: what stands at one place of the picture
        has one row and one column in all frames, and its times are a frame's tokens apart.
        """
        tables = self.tables
        in_grid, opened = tables.row[states] >= 0, index - tables.offset[states]
        row = np.where(in_grid, opened + tables.row[states], index)
        column = np.where(in_grid, opened + np.maximum(tables.column[states], 0), index)
        return np.stack([index, row, column], axis=-1).astype(np.int32)

    def parse(self, ids: Int[np.ndarray, " tokens"]) -> list[Span]:
        """The spans of a document (or of one that has not ended yet, if no span is left open).

        Reads the declaration, not the compiled tables, so that each checks the other.

        Raises:
          GrammarError: with the place and the reason, and the spans read until there.
        """
        ids = self._checked(ids)
        if not ids.size or ids[0] != self.control["bos"]:
            raise GrammarError("a document begins with bos")
        spans: list[Span] = []
        context, place = True, 1
        while place < len(ids):
            token = int(ids[place])
            if token == self.control["eos"]:
                if place + 1 < len(ids):
                    raise GrammarError(f"token {place + 1}: something follows the end of the document", spans)
                break
            if token == self.control["turn"]:
                spans = [replace(span, context=True) for span in spans]
                context, place = False, place + 1
                continue
            span, place = self._parse_span(ids, place, context, spans)
            spans.append(span)
        return spans

    def begun(self, ids: Int[np.ndarray, " tokens"], states: Int[np.ndarray, " tokens"]) -> Span | None:
        """The span that ids leave open, with -1 in place of the codes to come; None if none is.

        Its size is the smallest that it can still have.

        Args:
          ids: at least those of the span.
          states: after each of them.
        """
        if not len(ids):
            return None
        tables, last = self.tables, states[-1]
        if tables.top[last] or last == tables.end:
            return None
        layout = self.layouts[self.modalities[tables.modality[last]]]
        own = np.asarray(ids)[len(ids) - 1 - tables.offset[last] :]
        shape = next(
            shape
            for shape in layout.by_length[len(own) + int(tables.cost[last])]
            if self._agrees(own, layout.template(*shape.size))
        )
        template = layout.template(*shape.size)
        places = tuple(each[: np.count_nonzero(template.is_code[: len(own)])] for each in template.places)
        found = own[template.is_code[: len(own)]]
        codes = np.full((len(layout.codebooks), *shape.grid), -1, np.int32)
        per_level = np.stack([self.vocabulary.to_codes(block, found) for block in layout.codebooks])
        codes[places] = per_level[places[0], np.arange(len(found))]
        return Span(layout.name, codes.reshape(len(codes), *shape.size))

    def _agrees(self, run: Int[np.ndarray, " tokens"], template: Template) -> bool:
        """Whether the fixed tokens of a template are those of its first ids."""
        fixed = template.fixed[: len(run)]
        return np.array_equal(run[fixed >= 0], fixed[fixed >= 0])

    def _parse_span(self, ids, place: int, context: bool, spans: list[Span]) -> tuple[Span, int]:
        text = self.vocabulary.to_codes(self.text_block, ids[place:])
        run = int(np.argmax(text < 0)) if (text < 0).any() else len(text)
        if run:
            return Span("text", text[:run], context), place + run
        for opening, layout in self._opening.items():
            if tuple(ids[place : place + len(opening)].tolist()) == opening:
                return self._parse_codes(layout, ids, place, context, spans)
        raise GrammarError(f"token {place} (id {int(ids[place])}) neither begins nor belongs to a part", spans)

    def _parse_codes(self, layout: SpanLayout, ids, place: int, context: bool, spans) -> tuple[Span, int]:
        for length, shapes in sorted(layout.by_length.items()):
            run = ids[place : place + length]
            if len(run) < length or tuple(run[-len(layout.close) :].tolist()) != layout.close:
                continue
            for shape in shapes:
                codes = self._codes(layout, shape.size, layout.template(*shape.size), run)
                if codes is not None:
                    return Span(layout.name, codes, context), place + length
        if (given := layout.given_template(ids[place:])) is not None:
            end = place + len(given[1].fixed)
            if (codes := self._codes(layout, *given, ids[place:end])) is not None:
                return Span(layout.name, codes, context), end
        raise GrammarError(
            f"token {place}: {layout.name} opens but is not closed with a size it may have ({layout.sizes()})", spans
        )

    def _codes(
        self, layout: SpanLayout, size: tuple[int, ...], template: Template, run: Int[np.ndarray, " tokens"]
    ) -> Int[np.ndarray, "codebooks *frames rows columns"] | None:
        """The codes of a whole span of this size; None if it is none."""
        if len(run) != len(template.fixed) or not self._agrees(run, template):
            return None
        codes, found = np.full((len(layout.codebooks), *(1, *size)[-3:]), -1, np.int32), run[template.is_code]
        per_level = np.stack([self.vocabulary.to_codes(block, found) for block in layout.codebooks])
        codes[template.places] = per_level[template.places[0], np.arange(len(found))]
        return codes.reshape(len(codes), *size) if codes.min() >= 0 else None


def _framed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of codes with the axis of frames that only videos have."""
    return (shape[0], *(1, *shape[1:])[-3:])
