"""The grammar: packer, parser and state machine come from one declaration and must tell the same story."""

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni.grammar import Grammar, GrammarError, Span
from omni.layout import CODE, ROLES, SpanLayout
from omni.vocabulary import Vocabulary
from omni_tokenizers.errors import OmniError

SPECIAL = [
    "<bos>",
    "<turn>",
    "<eos>",
    "<pad>",
    "<i>",
    "</i>",
    "<go>",
    "<row>",
    "<2>",
    "<3>",
    "<a>",
    "</a>",
    "<v>",
    "</v>",
    "<f>",
    "</f>",
]
KEPT = ("next_state", "cost", "role", "modality", "level", "row", "column", "offset", "closed", "minimum")
CONTROL = {"bos": "<bos>", "turn": "<turn>", "eos": "<eos>", "pad": "<pad>"}
FRAMES = {"codebooks": ["a0", "a1", "a2"], "open": ["<a>"], "close": ["</a>"]}
GRID = {"codebooks": ["image"], "open": ["<i>"], "close": ["</i>"]}
VIDEO = {"codebooks": ["image"], "open": ["<v>"], "close": ["</v>"]}

LAYOUTS = {
    "fixed count": GRID | {"shapes": [{"columns": 4}]},
    "grid": GRID | {"shapes": [{"rows": 2, "columns": 3}]},
    "grid with row ends": GRID | {"row_end": "<row>", "shapes": [{"rows": 3, "columns": 2}]},
    "row ends tell the width": GRID
    | {"row_end": "<row>", "shapes": [{"rows": r, "columns": c} for r in (1, 2, 3) for c in (2, 3)]},
    "no last row end": GRID | {"row_end": "<row>", "last_row_end": False, "shapes": [{"rows": 2, "columns": 2}]},
    "size prefix": GRID
    | {
        "begin": ["<go>"],
        "close": ["<row>", "</i>"],
        "shapes": [
            {"rows": r, "columns": c, "prefix": [f"<{r}>", f"<{c}>"]} for r, c in itertools.product((2, 3), (2, 3))
        ],
    },
    "size written as text": GRID | {"shapes": [{"rows": 2, "columns": 2, "prefix": [14, 15]}], "begin": ["<go>"]},
    "frames flattened": FRAMES | {"shapes": [{"columns": {"min": 1, "max": 6}}]},
    "frames delayed": FRAMES | {"delays": [0, 1, 2], "shapes": [{"columns": {"min": 1, "max": 6}}]},
    "two books delayed alike": FRAMES | {"delays": [0, 1, 1], "shapes": [{"columns": {"min": 2, "max": 5}}]},
    # Nothing in the package mentions this one: rows of two delayed codebooks, a two-token opening, ends and sizes.
    "unseen": {
        "codebooks": ["a0", "image"],
        "open": ["<v>", "<go>"],
        "close": ["</v>"],
        "row_end": "<row>",
        "delays": [1, 0],
        "shapes": [{"rows": 2, "columns": 3, "prefix": ["<2>"]}, {"rows": 3, "columns": 2, "prefix": ["<3>"]}],
    },
    "video": VIDEO | {"shapes": [{"frames": 3, "rows": 2, "columns": 2}]},
    "video of any length": VIDEO | {"shapes": [{"frames": {"min": 2, "max": 4}, "rows": 2, "columns": 2}]},
    "frame ends and row ends": VIDEO
    | {"row_end": "<row>", "frame_end": "</f>", "shapes": [{"frames": {"min": 1, "max": 3}, "rows": 2, "columns": 2}]},
    "frames begin, sizes first, books delayed": FRAMES
    | {
        "begin": ["<go>"],
        "close": ["</f>", "</a>"],
        "frame_begin": "<f>",
        "frame_end": "</f>",
        "row_end": "<row>",
        "last_row_end": False,
        "delays": [0, 1, 1],
        "shapes": [
            {"frames": {"min": 1, "max": 3}, "rows": 2, "columns": 2, "prefix": ["<2>"]},
            {"frames": 2, "rows": 1, "columns": {"min": 1, "max": 3}, "prefix": ["<3>"]},
            {"frames": 1, "rows": 1, "columns": {"min": 2, "max": 4}, "prefix": ["<2>", "<3>"]},
        ],
    },
    "videos of one row": VIDEO | {"frame_end": "</f>", "shapes": [{"frames": {"min": 1, "max": 3}, "columns": 2}]},
}


def make_vocabulary() -> Vocabulary:
    return Vocabulary.build({"text": 20, "image": 8, "a0": 4, "a1": 5, "a2": 4}, SPECIAL)


def make_grammar(layout: dict, other: dict | None = None) -> Grammar:
    modalities = {"text": {"block": "text"}, "thing": layout} | ({"other": other} if other else {})
    return Grammar({"format": 1, "control": CONTROL, "modalities": modalities}, make_vocabulary())


GRAMMARS = {name: make_grammar(layout) for name, layout in LAYOUTS.items()}
MIXED = make_grammar(LAYOUTS["size prefix"], LAYOUTS["frames delayed"])


@st.composite
def documents(draw, grammar: Grammar):
    """Spans of random modalities, sizes and codes, context first, no two texts side by side on one side of the turn."""
    spans = []
    for context in (True, False):
        before = None
        for modality in draw(st.lists(st.sampled_from(grammar.modalities), max_size=4)):
            if modality == before == "text":
                continue
            before = modality
            spans.append(Span(modality, draw_codes(draw, grammar, modality), context))
    return spans


def draw_codes(draw, grammar: Grammar, modality: str) -> np.ndarray:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if modality == "text":
        return rng.integers(0, 20, draw(st.integers(1, 5)))
    layout = grammar.layouts[modality]
    shape = draw(st.sampled_from(sorted(layout.shapes)))
    return np.stack([rng.integers(0, len(table), shape) for table in layout.tables])


@pytest.mark.parametrize("name", LAYOUTS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_parse_returns_what_was_packed(name, data):
    grammar = GRAMMARS[name]
    spans = data.draw(documents(grammar))
    tokens = grammar.pack(spans)
    parsed = grammar.parse(tokens.ids)
    assert [(s.modality, s.context) for s in parsed] == [(s.modality, s.context) for s in spans]
    for before, after in zip(spans, parsed, strict=True):
        np.testing.assert_array_equal(before.codes, after.codes)
    assert tokens.target.sum() == 1 + sum(len(grammar.span_ids(s)) for s in spans if not s.context)


def admitted(grammar: Grammar, state: int) -> set[int]:
    return set(np.flatnonzero(grammar.tables.next_state[state, grammar.tables.class_of] >= 0).tolist())


def finish(grammar: Grammar, ids: list[int], state: int) -> list[int]:
    """Walks from a state to where a part may begin, by the cheapest way."""
    tables = grammar.tables
    while not (tables.top[state] or state == tables.end):
        nexts = tables.next_state[state]
        symbol = min((c for c in range(len(nexts)) if nexts[c] >= 0), key=lambda c: tables.cost[nexts[c]])
        ids, state = [*ids, int(np.argmax(tables.class_of == symbol))], int(nexts[symbol])
    return ids


def parses(grammar: Grammar, ids: list[int]) -> bool:
    try:
        grammar.parse(np.array(ids))
    except GrammarError:
        return False
    return True


@pytest.mark.parametrize("name", LAYOUTS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_states_admit_exactly_what_the_parser_accepts(name, data):
    """At a random place of a random document every id of the vocabulary is tried: an admitted one can be finished to a
    document that parses, and for a refused one no whole span in the language begins with it (checked by brute force
    over the spans that agree with the ids so far)."""
    grammar = GRAMMARS[name]
    spans = data.draw(documents(grammar))
    tokens = grammar.pack(spans)
    place = data.draw(st.integers(0, len(tokens.ids) - 1))
    head, state = tokens.ids[: place + 1].tolist(), int(tokens.states[place])
    allowed = admitted(grammar, state)
    for token in range(grammar.vocabulary.size):
        if token in allowed:
            after = int(grammar.tables.next_state[state, grammar.tables.class_of[token]])
            whole = finish(grammar, [*head, token], after)
            assert parses(grammar, whole)
        else:
            assert not could_follow(grammar, head, int(grammar.tables.offset[state]), token, state)


def could_follow(grammar: Grammar, head: list[int], offset: int, token: int, state: int) -> bool:
    """Whether some span of the language agrees with the open span so far and goes on with `token`."""
    tables = grammar.tables
    if state == tables.end:
        return False
    if tables.top[state]:
        starts = {*grammar.vocabulary.block("text").tolist(), grammar.control["turn"], grammar.control["eos"]}
        return token in starts | {layout.open[0] for layout in grammar.layouts.values()}
    run = [*head[len(head) - 1 - offset :], token]
    for layout in grammar.layouts.values():
        for size in layout.shapes:
            template = layout.template(*size)
            if len(template.fixed) >= len(run) and all(
                ident in layout.tables[template.level[i]] if template.role[i] == CODE else ident == template.fixed[i]
                for i, ident in enumerate(run)
            ):
                return True
    return False


@pytest.mark.parametrize("name", LAYOUTS)
def test_cost_is_the_fewest_tokens_to_the_end_of_the_span(name):
    """Checked against a breadth-first search over the states."""
    tables = GRAMMARS[name].tables
    for state in range(len(tables.cost)):
        frontier, steps = {state}, 0
        while not any(tables.top[s] or s == tables.end for s in frontier):
            frontier = {int(n) for s in frontier for n in tables.next_state[s] if n >= 0}
            steps += 1
        assert tables.cost[state] == steps
    smallest = min(
        map(len, (GRAMMARS[name].layouts["thing"].template(*s).fixed for s in GRAMMARS[name].layouts["thing"].shapes))
    )
    assert tables.minimum.tolist() == [1, smallest]


def test_roles_levels_and_places_of_a_delayed_span():
    grammar = GRAMMARS["frames delayed"]
    tokens = grammar.pack([Span("thing", np.arange(9).reshape(3, 1, 3) % 4)])
    inside = tokens.states[2:-2]
    assert [grammar.tables.level[s] for s in inside[1:]] == [0, 0, 1, 0, 1, 2, 1, 2, 2]
    assert [grammar.tables.column[s] for s in inside[1:]] == [0, 1, 0, 2, 1, 0, 2, 1, 2]
    assert grammar.tables.closed[tokens.states[-2]] == 1


def test_positions_count_rows_and_columns_inside_a_grid_only():
    grammar = GRAMMARS["grid with row ends"]
    tokens = grammar.pack([Span("text", np.array([3]), True), Span("thing", np.zeros((1, 3, 2), np.int32))])
    positions = grammar.positions(tokens.states, np.arange(len(tokens.ids)))
    codes = grammar.tables.role[tokens.states] == CODE
    outside = positions[grammar.tables.row[tokens.states] < 0]
    assert (outside == outside[:, :1]).all()
    opened = 3  # bos, text, turn come first
    assert (positions[:, 0] == np.arange(len(tokens.ids))).all()
    assert (positions[codes][:, 1] - opened).tolist() == [0, 0, 1, 1, 2, 2]
    assert (positions[codes][:, 2] - opened).tolist() == [0, 1, 0, 1, 0, 1]
    sound = GRAMMARS["frames flattened"]
    tokens = sound.pack([Span("thing", np.zeros((3, 1, 2), np.int32))])
    np.testing.assert_array_equal(
        sound.positions(tokens.states, np.arange(len(tokens.ids))), np.arange(len(tokens.ids))[:, None].repeat(3, 1)
    )


def test_positions_of_a_video_count_rows_and_columns_inside_each_frame():
    """A place of the picture has the same row and column in every frame, one frame's tokens of time apart."""
    grammar = GRAMMARS["frame ends and row ends"]
    tokens = grammar.pack([Span("thing", np.zeros((1, 3, 2, 2), np.int32))])
    positions = grammar.positions(tokens.states, np.arange(len(tokens.ids)))
    codes = grammar.tables.role[tokens.states] == CODE
    opened, of_a_frame = 2, 2 * 2 + 2 + 1  # bos and turn come first; codes, row ends, frame end
    assert (positions[:, 0] == np.arange(len(tokens.ids))).all()
    assert (positions[codes][:, 1] - opened).tolist() == [0, 0, 1, 1] * 3
    assert (positions[codes][:, 2] - opened).tolist() == [0, 1, 0, 1] * 3
    assert (np.diff(positions[codes][::4, 0]) == of_a_frame).all()
    ends = positions[grammar.tables.role[tokens.states] == ROLES.index("frame_boundary")]
    assert len(ends) == 3 and (ends == ends[:, :1]).all()
    flat = GRAMMARS["videos of one row"]
    tokens = flat.pack([Span("thing", np.zeros((1, 2, 1, 2), np.int32))])
    positions = flat.positions(tokens.states, np.arange(len(tokens.ids)))
    assert (positions[flat.tables.role[tokens.states] == CODE][:, 2] - opened).tolist() == [0, 1, 0, 1]


def test_order_of_a_video_is_frame_row_column():
    """Codes numbered in the order of their array come out counting up, a frame's tokens around each frame."""
    grammar = GRAMMARS["frame ends and row ends"]
    ids = grammar.span_ids(Span("thing", np.arange(8).reshape(1, 2, 2, 2)))
    special, block = grammar.vocabulary.special, grammar.vocabulary.block("image")
    row, end = special["<row>"], special["</f>"]
    first, second = ([block[c], block[c + 1], row, block[c + 2], block[c + 3], row, end] for c in (0, 4))
    assert ids.tolist() == [special["<v>"], *first, *second, special["</v>"]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda ids: ids[1:], "begins with bos"),
        (lambda ids: ids[:-3], "not closed"),
        (lambda ids: np.append(ids, 1), "follows the end"),
        (lambda ids: np.insert(ids, 3, 1), "not closed"),
        (lambda ids: np.insert(ids, 1, 3), "neither begins nor belongs"),
    ],
)
def test_parser_says_where_ids_go_wrong(damage, message):
    grammar = GRAMMARS["grid"]
    ids = grammar.pack([Span("thing", np.zeros((1, 2, 3), np.int32))]).ids
    with pytest.raises(GrammarError, match=message):
        grammar.parse(damage(ids))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (GRID | {"shapes": [{"rows": 2, "columns": 2}, {"rows": 1, "columns": 4}]}, "different meanings"),
        (GRID | {"shapes": [{"columns": 4}], "close": ["<i>"], "open": ["<bos>", "<i>"]}, None),
        (GRID | {"shapes": [{"columns": 4}], "codebooks": ["nothing"]}, "no block 'nothing'"),
        (GRID | {"shapes": [{"columns": 4}], "open": ["<nothing>"]}, "no special token"),
        (GRID | {"shapes": [{"columns": 0}]}, "1 x 0"),
        (VIDEO | {"shapes": [{"frames": 0, "columns": 2}]}, "0 x 1 x 2"),
        (VIDEO | {"shapes": [{"frames": {"min": 3, "max": 2}, "columns": 2}]}, r"3\.\.2 x 1 x 2"),
        (
            VIDEO | {"shapes": [{"frames": {"min": 1, "max": 2}, "columns": {"min": 1, "max": 2}}]},
            r"1\.\.2 x 1 x 1\.\.2",
        ),
        (VIDEO | {"shapes": [{"frames": 1 << 15, "rows": 8, "columns": 8}]}, "32768 x 8 x 8"),
        (VIDEO | {"shapes": [{"frames": {"min": 1, "max": 1 << 15}, "columns": 1}]}, r"1\.\.32768 x 1 x 1"),
        (VIDEO | {"shapes": [{"frames": 2, "columns": 2}, {"columns": 2}]}, "with frames and sizes without"),
        (GRID | {"shapes": [{"columns": 2}], "frame_end": "</f>"}, "frame_end"),
        (VIDEO | {"shapes": [{"frames": 2, "columns": 2}], "frame_rate": 0}, "frame rate of 0"),
        (VIDEO | {"shapes": [{"frames": 2, "columns": 2}], "frame_rate": float("nan")}, "frame rate of nan"),
        (VIDEO | {"shapes": [{"frames": 2, "columns": 2}], "frame_rate": "fast"}, "not a declaration"),
        (
            VIDEO | {"shapes": [{"frames": {"min": 1, "max": 2}, "columns": 4}, {"frames": 1, "columns": 8}]},
            "different",
        ),
        (GRID | {"shapes": []}, "no size"),
        (GRID | {"shapes": [{"columns": 4}], "rowend": "<row>"}, "unknown key"),
        (FRAMES | {"shapes": [{"columns": 4}], "delays": [0]}, "a delay for each codebook"),
        (
            FRAMES | {"codebooks": ["a0", "a0"], "delays": [0, 1], "shapes": [{"columns": {"min": 1, "max": 3}}]},
            "different",
        ),
    ],
)
def test_declarations_that_cannot_work_are_refused(layout, message):
    if message is None:
        make_grammar(layout)
        return
    with pytest.raises(OmniError, match=message):
        make_grammar(layout)


def test_sizes_and_codes_outside_the_grammar_are_refused():
    with pytest.raises(OmniError, match="writes no thing of 5 x 5"):
        GRAMMARS["grid"].pack([Span("thing", np.zeros((1, 5, 5), np.int32))])
    with pytest.raises(OmniError, match="run from 8 to 8"):
        GRAMMARS["grid"].pack([Span("thing", np.full((1, 2, 3), 8))])
    with pytest.raises(OmniError, match=r"writes no thing of 5 x 2 x 2 codes; it knows 2\.\.4 x 2 x 2"):
        GRAMMARS["video of any length"].pack([Span("thing", np.zeros((1, 5, 2, 2), np.int32))])
    with pytest.raises(OmniError, match=r"\[1, frames, rows, columns\]"):
        GRAMMARS["video of any length"].pack([Span("thing", np.zeros((1, 2, 2), np.int32))])
    with pytest.raises(OmniError, match="unknown modality 'smell'"):
        GRAMMARS["grid"].pack([Span("smell", np.zeros((1, 2, 3), np.int32))])


def test_mixed_modalities_and_json_round_trip():
    again = Grammar(MIXED.to_json(), Vocabulary.from_json(MIXED.vocabulary.to_json()))
    assert again.hash == MIXED.hash and again.vocabulary.hash == MIXED.vocabulary.hash
    np.testing.assert_array_equal(again.tables.next_state, MIXED.tables.next_state)
    assert again.modalities == ("text", "thing", "other")


def test_layouts_without_frames_keep_their_tables():
    """Declarations from before videos give the states, costs and hashes that they gave."""
    tables = MIXED.tables
    digest = hashlib.sha256(b"".join(getattr(tables, name).tobytes() for name in KEPT)).hexdigest()[:16]
    assert (MIXED.hash, len(tables.cost), digest) == ("5ac3a4fbfa3d7b88", 79, "c93a27c4863cc8c3")


def test_long_videos_compile_fast_enough_to_be_declared():
    """96 frames of 64 codes: all lengths share one path, with a closing token for each."""
    grammar = make_grammar(VIDEO | {"shapes": [{"frames": {"min": 1, "max": 96}, "rows": 8, "columns": 8}]})
    assert len(grammar.tables.cost) < 96 * 64 + 10


def test_long_sounds_compile_fast_enough_to_be_declared():
    """750 frames of 8 codebooks: the trie shares the beginnings of all lengths, so its size is linear in frames."""
    books = {f"b{i}": 16 for i in range(8)}
    vocabulary = Vocabulary.build({"text": 20} | books, SPECIAL)
    layout = FRAMES | {
        "codebooks": list(books),
        "delays": list(range(8)),
        "shapes": [{"columns": {"min": 1, "max": 750}}],
    }
    grammar = Grammar(
        {"format": 1, "control": CONTROL, "modalities": {"text": {"block": "text"}, "thing": layout}}, vocabulary
    )
    assert len(grammar.tables.cost) < 750 * 8 * 6


def test_thousands_of_lengths_compile_without_writing_each_out(monkeypatch):
    """What is written out to compile lengths 1 to 3000 is some tokens for each, not as many as each is long."""
    counted, row = [0], SpanLayout.row

    def counting(self, *place):
        for symbol in row(self, *place):
            counted[0] += 1
            yield symbol

    monkeypatch.setattr(SpanLayout, "row", counting)
    layout = LAYOUTS["frames delayed"] | {"shapes": [{"columns": {"min": 1, "max": 3000}}]}
    grammar = make_grammar(layout)
    assert len(grammar.layouts["thing"].shapes) == 3000 and counted[0] < 10 * 3000
