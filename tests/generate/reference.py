"""Small grammars, a small model, and generation the slow way: one request at a time, no cache, masks by trial.

The reference reads the grammar's declaration (layouts) and not its compiled tables, runs the training forward over the
whole sequence for each token, and computes in float64 with sorts.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omni.generate import PreparedRequest
from omni.grammar import Grammar, Span
from omni.layout import SpanLayout
from omni.model import Transformer, TransformerConfig
from omni.vocabulary import Vocabulary

TEXT, IMAGE, AUDIO = range(3)
CONTROL = ["<bos>", "<turn>", "<eos>", "<pad>"]
SPECIAL = [*CONTROL, "<image>", "</image>", "<audio>", "</audio>", "<row>", "<2x2>", "<3x2>"]
SPECIAL_OF_VIDEO = ["<video>", "</video>", "<frame>"]
SQUARE = {"rows": 2, "columns": 2}
PLAIN = {
    "image": {
        "codebooks": ["image"],
        "open": ["<image>"],
        "close": ["</image>"],
        "shapes": [SQUARE],
    },
    "audio": {
        "codebooks": ["audio0", "audio1"],
        "open": ["<audio>"],
        "close": ["</audio>"],
        "shapes": [{"columns": {"min": 1, "max": 4}}],
    },
}
SIZED = {
    "image": {
        "codebooks": ["image"],
        "open": ["<image>"],
        "close": ["</image>"],
        "row_end": "<row>",
        "shapes": [
            {**SQUARE, "prefix": ["<2x2>"]},
            {"rows": 3, "columns": 2, "prefix": ["<3x2>"]},
        ],
    },
    "audio": {**PLAIN["audio"], "delays": [0, 1], "shapes": [{"columns": {"min": 2, "max": 5}}]},
}
ONE = {"image": PLAIN["image"]}
VIDEO = {
    **PLAIN,
    "video": {
        "codebooks": ["image"],
        "open": ["<video>"],
        "close": ["</video>"],
        "row_end": "<row>",
        "frame_begin": "<frame>",
        "shapes": [{"frames": {"min": 2, "max": 4}, **SQUARE}],
    },
}


def make_grammar(layouts: dict) -> Grammar:
    special = SPECIAL + (SPECIAL_OF_VIDEO if "video" in layouts else [])
    vocabulary = Vocabulary.build({"text": 20, "image": 9, "audio0": 7, "audio1": 5}, special)
    control = {name: f"<{name}>" for name in ("bos", "turn", "eos", "pad")}
    return Grammar({"format": 1, "control": control, "modalities": {"text": {"block": "text"}, **layouts}}, vocabulary)


def make_model(vocabulary: int, seed: int = 0, sharpness: float = 1, **changes) -> Transformer:
    """Random weights with nothing left at 0 or 1, positions in three coordinates; logits times `sharpness`."""
    shape = {"depth": 2, "dim": 32, "heads": 4, "key_value_heads": 2, "head_dim": 8, "mlp_dim": 48} | changes
    config = TransformerConfig(vocabulary_size=vocabulary, rope="time_row_column", **shape)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    draw = np.random.default_rng(seed)
    leaves, tree = jax.tree.flatten_with_path(nnx.state(model))
    filled = []
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path)
        centre = 1 if "norm" in name and "bias" not in name else 0
        filled.append(jnp.asarray(draw.normal(centre, 0.2, leaf.shape), jnp.float32))
    nnx.update(model, jax.tree.unflatten(tree, filled))
    model.norm[...] *= sharpness  # the last norm's scale
    return model


def prompt(grammar: Grammar, seed: int, *modalities: str) -> np.ndarray:
    """A prompt of random parts."""
    draw = np.random.default_rng(seed)
    spans = []
    for name in modalities:
        if name == "text":
            codes = draw.integers(20, size=draw.integers(1, 9))
        else:
            layout = grammar.layouts[name]
            shape = list(layout.shapes)[draw.integers(len(layout.shapes))]
            sizes = [len(table) for table in layout.tables]
            codes = np.stack([draw.integers(size, size=shape) for size in sizes])
        spans.append(Span(name, codes.astype(np.int32), context=True))
    return grammar.prompt(spans)


def request(grammar: Grammar, ids: np.ndarray, max_tokens: int = 24, **changes) -> PreparedRequest:
    """A request; settings that are single numbers hold for all modalities."""
    sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    settings = sampling | changes
    for name in sampling:
        settings[name] = np.broadcast_to(settings[name], len(grammar.modalities)).astype(np.float32)
    return PreparedRequest(ids=ids, max_tokens=max_tokens, **settings)


@cache
def patterns(layout: SpanLayout) -> list[list[frozenset[int]]]:
    """For each size of a span: which ids may stand at each place."""
    found = []
    for shape in layout.shapes:
        template = layout.template(*shape)
        found.append(
            [
                frozenset(layout.tables[level].tolist()) if level >= 0 else frozenset([fixed])
                for fixed, level in zip(template.fixed.tolist(), template.level.tolist(), strict=True)
            ]
        )
    return found


def matches(pattern: list[frozenset[int]], ids: list[int]) -> bool:
    return len(ids) <= len(pattern) and all(token in allowed for token, allowed in zip(ids, pattern, strict=False))


def split(grammar: Grammar, ids: list[int]) -> tuple[list[int], list[int]]:
    """Modalities of the parts of a reply so far (the open one included), and the ids of the open span."""
    text = set(grammar.vocabulary.block("text").tolist())
    parts: list[int] = []
    open_span: list[int] = []
    in_text = False
    for token in ids:
        if not open_span and token in text:
            if not in_text:
                parts.append(TEXT)
            in_text = True
            continue
        in_text = False
        open_span.append(token)
        fits = [
            (modality, pattern)
            for modality, name in enumerate(grammar.modalities[1:], start=1)
            for pattern in patterns(grammar.layouts[name])
            if matches(pattern, open_span)
        ]
        if len(open_span) == 1:
            parts.append(fits[0][0])
        if any(len(pattern) == len(open_span) for _, pattern in fits):
            open_span = []
    return parts, open_span


def admitted(grammar: Grammar, asked: PreparedRequest, reply: list[int]) -> np.ndarray:
    """Which ids may come next, by trying each."""
    vocabulary, text = grammar.vocabulary, set(grammar.vocabulary.block("text").tolist())
    used = set(SPECIAL) - {"<bos>", "<turn>", "<pad>"}
    eos = vocabulary.token("<eos>")
    spans = [
        (modality, pattern)
        for modality, name in enumerate(grammar.modalities[1:], start=1)
        for pattern in patterns(grammar.layouts[name])
    ]
    allowed = np.zeros(vocabulary.size, bool)
    if not asked.constrained:
        for name in used:
            allowed[vocabulary.token(name)] = any(vocabulary.token(name) in p for _, ps in spans for p in ps)
        allowed[eos] = True
        for block in vocabulary.blocks:
            allowed[vocabulary.block(block)] = True
        return allowed

    parts, open_span = split(grammar, reply)
    remaining = asked.max_tokens - len(reply)
    fewest = [1, *(min(map(len, patterns(grammar.layouts[name]))) for name in grammar.modalities[1:])]
    for token in range(vocabulary.size):
        begun = parts
        if open_span:
            rest = [len(p) - len(open_span) - 1 for _, p in spans if matches(p, [*open_span, token])]
        elif token in text:
            begun = parts if reply and reply[-1] in text else [*parts, TEXT]
            rest = [0]
        elif token == eos:
            rest = [0]
        else:
            opened = [(m, len(p) - 1) for m, p in spans if matches(p, [token])]
            begun = [*parts, *{m for m, _ in opened}]
            rest = [length for _, length in opened]
        if not rest:
            continue
        reserve = 0
        if asked.want is not None:
            if tuple(begun) != asked.want[: len(begun)]:
                continue
            left = asked.want[len(begun) :]
            if token == eos and left:
                continue
            reserve = 0 if token == eos else sum(fewest[m] for m in left) + 1
        allowed[token] = 1 + min(rest) + reserve <= remaining
    return allowed


def next_modality(grammar: Grammar, reply: list[int]) -> int:
    parts, open_span = split(grammar, reply)
    return parts[-1] if open_span else TEXT


def penalised(logits: np.ndarray, seen: set[int], penalty: float) -> np.ndarray:
    """Logits of what was seen: positive ones divided by the penalty, negative ones multiplied."""
    return np.array([(x / penalty if x > 0 else x * penalty) if i in seen else x for i, x in enumerate(logits)])


def choose(
    logits: np.ndarray, allowed: np.ndarray, uniform: float, temperature: float, k: int, p: float, least: float
) -> tuple[int, float]:
    """One id and the log-probability it had: by definition, in float64, with a sort."""
    scores = np.where(allowed, logits, -np.inf)
    if temperature == 0:
        return int(np.argmax(scores)), 0.0
    weights = np.exp((scores - scores.max()) / temperature)
    if k:
        weights[weights < np.sort(weights)[-min(k, len(weights))]] = 0
    if p < 1:
        order = np.argsort(-weights, kind="stable")
        mass = np.cumsum(weights[order]) / weights.sum()
        weights[order[np.searchsorted(mass, p) + 1 :]] = 0
    weights[weights < least * weights.max()] = 0
    token = int(np.argmax(np.cumsum(weights) > uniform * weights.sum()))
    return token, float(np.log(weights[token] / weights.sum()))


@nnx.jit
def forward(model: Transformer, ids: jax.Array, positions: jax.Array) -> jax.Array:
    return model(ids, positions, None)


def whole_logits(model: Transformer, grammar: Grammar, ids: list[int], states: list[int]) -> np.ndarray:
    """Logits after the last id, recomputed from the first; padded on the right to one length."""
    length = 128
    positions = np.zeros((1, length, 3), np.int32)
    positions[0, : len(ids)] = grammar.positions(np.array(states), np.arange(len(ids)))
    padded = np.zeros((1, length), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(forward(model, jnp.asarray(padded), jnp.asarray(positions))[0, len(ids) - 1], np.float64)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def three_passes(
    model: Transformer, grammar: Grammar, asked: PreparedRequest, media, nothing, guidance, media_guidance, reply
) -> list[float]:
    """Log-probability of each token of a reply at temperature 1 under guidance in two steps, by its formula."""
    found = []
    for place, token in enumerate(reply):
        before = reply[:place]
        whole = [[*ids.tolist(), *before] for ids in (asked.ids, media, nothing)]
        own, half, none = (whole_logits(model, grammar, ids, grammar.annotate(np.array(ids)).tolist()) for ids in whole)
        modality = next_modality(grammar, before)
        strong, weak = guidance[modality], media_guidance[modality]
        allowed = admitted(grammar, asked, before)
        if weak > 1 or strong > weak:
            allowed = allowed & (own >= own[allowed].max() + np.log(0.1))
        logits = none + weak * (half - none) + strong * (own - half)
        found.append(log_softmax(np.where(allowed, logits, -np.inf))[token])
    return found


def slow_generate(model: Transformer, grammar: Grammar, asked: PreparedRequest) -> list[int]:
    """The reply to one request, ids."""
    return [token for token, _ in slow_draws(model, grammar, asked)]


def slow_draws(model: Transformer, grammar: Grammar, asked: PreparedRequest) -> list[tuple[int, float]]:
    """The reply to one request: ids and the log-probability that each had when it was drawn."""
    prompts = [asked.ids, *(shadow.ids for shadow in asked.shadows)]
    reply: list[int] = []
    drawn: list[tuple[int, float]] = []
    states = [grammar.annotate(ids).tolist() for ids in prompts]
    while len(reply) < asked.max_tokens:
        allowed = admitted(grammar, asked, reply) if asked.constrained else admitted(grammar, asked, [])
        if not allowed.any():
            break
        rows = [whole_logits(model, grammar, [*ids, *reply], state) for ids, state in zip(prompts, states, strict=True)]
        modality = int(grammar.tables.next_modality[states[0][-1]])
        if asked.constrained:
            assert modality == next_modality(grammar, reply)
        shares = [shadow.weight[modality] for shadow in asked.shadows]
        logits = sum((w * row for w, row in zip(shares, rows[1:], strict=True)), (1 - sum(shares)) * rows[0])
        if min(shares, default=0) < 0:  # nothing that the request itself finds ten times less likely than the likeliest
            own = np.exp(log_softmax(rows[0]))
            allowed = allowed & (own >= 0.1 * own[allowed].max())
        logits = penalised(logits, {*asked.ids.tolist(), *reply}, asked.repetition_penalty[modality])
        key = jax.random.fold_in(jax.random.key(asked.seed), len(reply))
        token, log_probability = choose(
            logits,
            allowed,
            float(jax.random.uniform(key)),
            asked.temperature[modality],
            int(asked.top_k[modality]),
            asked.top_p[modality],
            asked.min_p[modality],
        )
        reply.append(token)
        drawn.append((token, log_probability))
        for state in states:
            following = int(grammar.tables.next_state[state[-1], grammar.tables.class_of[token]])
            state.append(following if following >= 0 else state[-1])
        if token == grammar.vocabulary.token("<eos>"):
            break
        if token in asked.stop_tokens and not split(grammar, reply)[1]:
            break
        if asked.stop is not None and asked.stop(np.array(reply)) is not None:
            break
    return drawn
