"""Random weights, the hardest case, under the grammar of each family: replies parse, with the parts asked for."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from flax import nnx
from published_presets import anygpt_preset, chameleon_preset, emu3_5_preset, emu3_preset, janus_preset

from omni.generate import Engine, Generated, PreparedRequest
from omni.grammar import Grammar, Span
from omni.interop import anygpt, chameleon, emu3, emu3_5, janus
from omni.interop.family import Preset
from omni.model import Transformer, TransformerConfig, make_decoder
from omni.vocabulary import Vocabulary

CODES, TEXT = 9, 20
CONTROL = tuple(f"<{role}>" for role in ("bos", "turn", "eos", "pad"))
NAMES = (*chameleon.ROLES.values(), *emu3.ROLES.values(), *CONTROL)


def small_vocabulary(size: int, names: Sequence[str] = NAMES, books: Sequence[str] = ("image",)) -> Vocabulary:
    """Few codes and little text, scattered, under these names."""
    ids = np.random.default_rng(0).permutation(31 + TEXT + CODES * len(books))
    blocks = {"text": np.sort(ids[:TEXT]).astype(np.int32)}
    for place, book in enumerate(books):
        blocks[book] = ids[TEXT + CODES * place :][:CODES].astype(np.int32)
    return Vocabulary(size, blocks, dict(zip(names, ids[TEXT + CODES * len(books) :].tolist(), strict=False)))


def emu3_shapes(vocabulary: Vocabulary) -> list[dict]:
    """Grids up to 8 x 8 with a prefix of three ids of text each, some of which begin alike."""
    text = vocabulary.block("text").tolist()
    sizes = ((8, 8), (8, 4), (4, 8), (2, 3), (2, 2), (1, 8))
    return [
        {"rows": rows, "columns": columns, "prefix": [text[rows], text[0], text[columns]]} for rows, columns in sizes
    ]


def small_grammars() -> dict[str, Grammar]:
    vocabulary, sparse = small_vocabulary(64), small_vocabulary(chameleon.LUMINA_SIZE + 8)
    newer = small_vocabulary(64, (*emu3_5.ROLES.values(), *emu3_5.NAMES.values()))
    spans = [token for name in anygpt.LETTERS for token in (anygpt.opening(name), anygpt.closing(name))]
    seeing = small_vocabulary(64, (*CONTROL, janus.BEGIN, janus.END, janus.PLACEHOLDER))
    many = small_vocabulary(128, (*CONTROL, *spans), ("image", "speech", *(f"audio {level}" for level in range(4))))
    return {
        "chameleon": Grammar(chameleon.grammar({"rows": 8, "columns": 8}), vocabulary),
        "lumina": Grammar(chameleon.lumina_grammar(64), sparse),
        "emu3": Grammar(emu3.grammar(emu3_shapes(vocabulary)), vocabulary),
        "emu3.5": Grammar(emu3_5.grammar(emu3_shapes(newer)), newer),
        "anygpt": Grammar(anygpt.grammar(picture=6, room=12), many),
        "janus": Grammar(janus.grammar(8, features={"token": janus.PLACEHOLDER, "count": 3}), seeing),
    }


GRAMMARS = small_grammars()


def engine_of(grammar: Grammar, **settings) -> Engine:
    config = TransformerConfig(
        vocabulary_size=grammar.vocabulary.size, depth=1, dim=16, heads=2, key_value_heads=1, head_dim=8, mlp_dim=16
    )
    return Engine(make_decoder(Transformer(config, rngs=nnx.Rngs(0))), grammar, **settings)


def random_request(grammar: Grammar, seed: int) -> PreparedRequest:
    """Any order of parts or none, a budget that is just enough or more, a prompt of any parts."""
    draw = np.random.default_rng(seed)
    want = None
    if seed % 4:
        want = draw.integers(len(grammar.modalities), size=draw.integers(1, 4)).tolist()
        want = tuple(m for i, m in enumerate(want) if m or not i or want[i - 1])
    fewest = 1 if want is None else 1 + sum(grammar.tables.minimum[m] for m in want)
    spans = [random_span(grammar, draw) for _ in range(draw.integers(3))]
    return request(
        grammar,
        spans,
        max_tokens=int(fewest + draw.choice([0, 0, 1, 2, 5, 80])),
        want=want,
        seed=seed,
        temperature=np.full(len(grammar.modalities), draw.choice([0, 1, 4]), np.float32),
    )


def random_span(grammar: Grammar, draw: np.random.Generator) -> Span:
    modality = grammar.modalities[(1 - draw.integers(len(grammar.modalities))) % len(grammar.modalities)]
    if modality == "text":
        return Span("text", draw.integers(TEXT, size=draw.integers(1, 5)))
    layout = grammar.layouts[modality]
    shapes = list(layout.shapes)
    size = (len(layout.codebooks), *shapes[draw.integers(len(shapes))])
    return Span(modality, draw.integers(CODES, size=size))


def request(grammar: Grammar, prompt: Sequence[Span], **changes) -> PreparedRequest:
    neutral = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1}
    settings = {name: np.full(len(grammar.modalities), value, np.float32) for name, value in neutral.items()} | changes
    return PreparedRequest(grammar.prompt(prompt), **(settings | {"top_k": settings["top_k"].astype(np.int32)}))


def check(grammar: Grammar, requests: Sequence[PreparedRequest], replies: Sequence[Generated]) -> set[tuple]:
    """Every reply parses, within its budget, to the parts that were asked for; returns modalities and their sizes."""
    sizes = set()
    for asked, reply in zip(requests, replies, strict=True):
        spans = [span for span in grammar.parse(np.concatenate([asked.ids, reply.ids])) if not span.context]
        assert reply.well_formed and len(reply.ids) <= asked.max_tokens
        if asked.want is not None:
            assert tuple(grammar.index(span.modality) for span in spans) == asked.want
            assert reply.ids[-1] == grammar.control["eos"]
        sizes |= {(span.modality, span.codes.shape[1:]) for span in spans if span.modality != "text"}
    return sizes


@pytest.mark.parametrize("name", GRAMMARS)
def test_a_thousand_replies_parse(name):
    """Spans of every declared size come, and a request in the batch of all is answered as it is alone."""
    grammar = GRAMMARS[name]
    engine = engine_of(grammar, max_rows=128)
    requests = [random_request(grammar, seed) for seed in range(1000)]
    replies = engine.generate(requests)
    declared = {(name, size) for name, layout in grammar.layouts.items() for size in layout.shapes}
    assert check(grammar, requests, replies) == declared
    for place in range(0, 1000, 50):
        assert engine.generate([requests[place]])[0].ids.tolist() == replies[place].ids.tolist()


def lumina_preset() -> Preset:
    return dataclasses.replace(chameleon_preset(), declaration=chameleon.lumina_grammar(512))


def smaller_emu3_preset() -> Preset:
    """Of the two areas of Emu3's pictures the smaller one, about 64 x 64 codes."""
    declared = emu3_preset()
    shapes = declared.declaration["modalities"]["image"]["shapes"]
    small = [shape for shape in shapes if shape["rows"] * shape["columns"] < 4500]
    assert len(small) == 7
    return dataclasses.replace(declared, declaration=emu3.grammar(small))


def smaller_emu3_5_preset() -> Preset:
    """The sizes of about 45 x 45 codes."""
    declared = emu3_5_preset()
    shapes = declared.declaration["modalities"]["image"]["shapes"]
    return dataclasses.replace(declared, declaration=emu3_5.grammar(shapes[len(emu3_5.DRAWN) :]))


PUBLISHED = {
    "chameleon": chameleon_preset,
    "lumina": lumina_preset,
    "emu3": smaller_emu3_preset,
    "emu3.5": smaller_emu3_5_preset,
    "anygpt": anygpt_preset,
    "janus": janus_preset,
}


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("preset", PUBLISHED.values(), ids=PUBLISHED)
def test_ten_pictures_of_full_size_parse(preset):
    """At the published ids and sizes, behind a text."""
    declared = preset()
    grammar = Grammar(declared.declaration, declared.vocabulary)
    longest = max(grammar.layouts["image"].by_length)
    prompt = [Span("text", np.arange(5))]
    requests = [request(grammar, prompt, max_tokens=longest + 40, want=(0, 1), seed=seed) for seed in range(10)]
    assert check(grammar, requests, engine_of(grammar).generate(requests))
