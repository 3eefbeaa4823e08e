"""The decoding state machine of a grammar, as tables.

States 0 to 3 follow bos, text, turn and eos; then comes one state for each closed modality; the others are the nodes of
a trie of all the token runs that the layouts allow. Ids that no rule tells apart share a class.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from omni.layout import BOUNDARY, CODE, CONTROL, TEXT, Shape, SpanLayout, Symbol
from omni_tokenizers.errors import OmniError

AFTER_BOS, AFTER_TEXT, AFTER_TURN, AFTER_EOS = range(4)


@dataclass(frozen=True, eq=False)
class GrammarTables:
    """The decoding state machine. A state stands for what the last token was; modality 0 is text and control.

    Attributes:
      class_of: class of each id (the last class: ids that no rule admits, such as the vocabulary's padding).
      next_state: state after an id of that class, -1 where it is not admitted.
      cost: fewest tokens that still follow until a part may begin.
      top: whether a part may begin here.
      role: role of the last token, an index into `ROLES`.
      modality: modality of the last token.
      next_modality: modality whose sampling settings choose the next token.
      level, column: codebook and column of the code that came last, -1 if it was no code.
      row: its row in a grid, -1 outside grids (a layout whose spans all have one row is none, unless it has frames).
      offset: tokens between the span's first token and the last token; 0 outside spans.
      closed: modality of the span that the last token closed, else -1.
      entry: classes that begin a part of each modality.
      minimum: fewest tokens of a whole part of each modality.
    """

    class_of: Int[np.ndarray, " vocabulary"]
    next_state: Int[np.ndarray, "states classes"]
    cost: Int[np.ndarray, " states"]
    top: Bool[np.ndarray, " states"]
    role: Int[np.ndarray, " states"]
    modality: Int[np.ndarray, " states"]
    next_modality: Int[np.ndarray, " states"]
    level: Int[np.ndarray, " states"]
    row: Int[np.ndarray, " states"]
    column: Int[np.ndarray, " states"]
    offset: Int[np.ndarray, " states"]
    closed: Int[np.ndarray, " states"]
    entry: Bool[np.ndarray, "modalities classes"]
    minimum: Int[np.ndarray, " modalities"]
    start: int
    after_text: int
    after_turn: int
    end: int
    bos_class: int
    turn_class: int
    eos_class: int
    bos: int
    turn: int
    eos: int
    pad: int


class _Classes:
    """The partition of the ids by the rules that mention them."""

    def __init__(self, size: int, text_table, control: Mapping[str, int], layouts: Sequence[SpanLayout]):
        rules: list[np.ndarray] = [text_table]
        rules += [table for layout in layouts for table in layout.tables]
        tokens = set(control.values())
        for layout in layouts:
            tokens.update(layout.open, layout.begin, layout.close, layout.row_end, layout.frame_begin, layout.frame_end)
            tokens.update(token for family in layout.families for token in family[0].prefix)
        rules += [np.array([token]) for token in sorted(tokens)]
        membership = np.zeros((size, len(rules)), bool)
        for column, rule in enumerate(rules):
            membership[rule, column] = True
        # A last row of False makes sure of a class that no rule admits, and that it sorts first.
        patterns, class_of = np.unique(np.vstack([membership, np.zeros(len(rules), bool)]), axis=0, return_inverse=True)
        self.count = len(patterns)
        self.of_id = ((class_of.reshape(-1)[:size] - 1) % self.count).astype(np.int32)

    def of(self, ids) -> frozenset[int]:
        return frozenset(self.of_id[np.atleast_1d(ids)].tolist())


class _Trie:
    """States and transitions while they grow."""

    def __init__(self):
        self.edges: list[dict[frozenset[int], int]] = []
        self.attributes: list[tuple[int, ...]] = []  # role, modality, level, row, column, offset

    def add(self, role: int, modality: int, level: int = -1, row: int = -1, column: int = -1, offset: int = 0) -> int:
        self.edges.append({})
        self.attributes.append((role, modality, level, row, column, offset))
        return len(self.edges) - 1

    def connect(self, source: int, symbols: frozenset[int], target: int, where: str) -> None:
        for known, child in self.edges[source].items():
            if known & symbols and (known != symbols or child != target):
                raise OmniError(f"grammar: {where}: two rules admit the same id with different meanings")
        self.edges[source][symbols] = target

    def step(self, source: int, symbols: frozenset[int], attributes: tuple[int, ...], where: str) -> int:
        """The state after `symbols`: the one that is there already if it means the same, else a new one."""
        child = self.edges[source].get(symbols)
        if child is not None and self.attributes[child] == attributes:
            return child
        child = self.add(*attributes)
        self.connect(source, symbols, child, where)
        return child


def compile_tables(
    size: int, text_table: Int[np.ndarray, " codes"], control: Mapping[str, int], layouts: Sequence[SpanLayout]
) -> GrammarTables:
    """Compiles layouts to a state machine.

    Args:
      size: number of ids of the vocabulary.
      text_table: ids of the text block.
      control: ids of bos, turn, eos and pad.
      layouts: the modalities other than text, in order; modality m of the tables is `layouts[m - 1]`.

    Raises:
      OmniError: if two rules admit the same id with different meanings, so that ids could not be parsed.
    """
    classes, trie = _Classes(size, text_table, control, layouts), _Trie()
    for role in (CONTROL, TEXT, CONTROL, CONTROL):
        trie.add(role, 0)
    closed_states = [trie.add(BOUNDARY, m) for m in range(1, len(layouts) + 1)]
    top_states = [AFTER_BOS, AFTER_TEXT, AFTER_TURN, *closed_states]

    text = classes.of(text_table)
    for modality, layout in enumerate(layouts, start=1):
        _insert(trie, classes, layout, modality, closed_states[modality - 1])
    trie.connect(AFTER_BOS, text, AFTER_TEXT, "text")
    trie.connect(AFTER_BOS, classes.of(control["turn"]), AFTER_TURN, "turn")
    trie.connect(AFTER_BOS, classes.of(control["eos"]), AFTER_EOS, "eos")
    for state in top_states:
        trie.edges[state] = trie.edges[AFTER_BOS]

    next_state = np.full((len(trie.edges), classes.count), -1, np.int32)
    for state, edges in enumerate(trie.edges):
        for symbols, target in edges.items():
            next_state[state, list(symbols)] = target
    first_span_state = AFTER_EOS + 1 + len(layouts)
    cost = np.zeros(len(trie.edges), np.int32)
    for state in range(len(cost) - 1, first_span_state - 1, -1):  # children are younger than their parents
        cost[state] = 1 + min(cost[target] for target in trie.edges[state].values())

    entry = np.zeros((len(layouts) + 1, classes.count), bool)
    entry[0, list(text)] = True
    for modality, layout in enumerate(layouts, start=1):
        entry[modality, list(classes.of(layout.open[0]))] = True
    role, modality, level, row, column, offset = np.array(trie.attributes, np.int32).T.copy()
    top = np.isin(np.arange(len(cost)), top_states)
    closed = np.full(len(cost), -1, np.int32)
    closed[closed_states] = np.arange(1, len(layouts) + 1)
    return GrammarTables(
        class_of=classes.of_id,
        next_state=next_state,
        cost=cost,
        top=top,
        role=role,
        modality=modality,
        next_modality=np.where(np.arange(len(cost)) < first_span_state, 0, modality).astype(np.int32),
        level=level,
        row=row,
        column=column,
        offset=offset,
        closed=closed,
        entry=entry,
        minimum=np.array([1, *(min(layout.by_length) for layout in layouts)], np.int32),
        start=AFTER_BOS,
        after_text=AFTER_TEXT,
        after_turn=AFTER_TURN,
        end=AFTER_EOS,
        bos_class=int(classes.of_id[control["bos"]]),
        turn_class=int(classes.of_id[control["turn"]]),
        eos_class=int(classes.of_id[control["eos"]]),
        **{name: int(control[name]) for name in ("bos", "turn", "eos", "pad")},
    )


def _insert(trie: _Trie, classes: _Classes, layout: SpanLayout, modality: int, closed_state: int) -> None:
    """Adds the runs of one modality, from the state after bos to the state of its closed span."""
    where = f"modality '{layout.name}'"
    in_grid = layout.has_frames or any(rows > 1 for rows, _ in layout.shapes)
    code_classes = [classes.of(table) for table in layout.tables]

    def walk(state: int, offset: int, symbols: Iterable[Symbol]) -> list[int]:
        states = [state]
        for token, role, level, _, row, column in symbols:
            accepted = code_classes[level] if role == CODE else classes.of(token)
            grid_row = row if in_grid else -1
            states.append(trie.step(states[-1], accepted, (role, modality, level, grid_row, column, offset), where))
            offset += 1
        return states

    for family in layout.families:
        longest = list(layout.symbols(family[-1]))[: -len(layout.close)]
        spine = walk(AFTER_BOS, 0, longest)
        for shape in family:
            head, rest = _branch(layout, family[-1], shape, longest)
            state = walk(spine[head], head, rest[:-1])[-1]
            trie.connect(state, classes.of(layout.close[-1]), closed_state, where)


def _branch(
    layout: SpanLayout, largest: Shape, shape: Shape, longest: Sequence[Symbol]
) -> tuple[int, Sequence[Symbol]]:
    """How many tokens a shape shares with the largest of its family, whose tokens are `longest`; those that follow."""
    (frames, rows, columns), closing = shape.grid, list(layout.closing())
    if (rows, columns) == largest.grid[1:]:  # the first frames of the largest, or itself
        return len(longest) - (largest.grid[0] - frames) * layout.frame_length(shape), closing
    if (frames, rows) != (1, 1):
        return 0, list(layout.symbols(shape))
    # A shorter row of codes is the beginning of the longest one, up to its own last step, then the delayed rest. The
    # beginning is counted, not written out: for thousands of lengths that takes a minute.
    lead = next(i for i, symbol in enumerate(longest) if symbol[1] == CODE)
    shared = sum(max(0, columns - delay) for delay in layout.delays)
    return lead + shared, list(layout.ending(shape))
