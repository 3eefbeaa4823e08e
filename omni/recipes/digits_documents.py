"""Which documents the digits model is taught: drawn by number, in words and draw numbers, before any tokenizer.

`draw(index, seed)` says what stands in a training document; `assemble` fills in the codes. `requests` lists what can be
asked in words, split into what training draws and what is held out.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product
from typing import NamedTuple

import numpy as np

from omni_tokenizers.errors import UsageError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MODALITIES = ("text", "image", "audio")
HELD_OUT = 0.2
CAPITAL = 0.2  # share of texts in the context that begin with a capital letter
PHRASE = 0.2  # share of bare texts in the context that are more than the word

# Shares of the kinds of documents:
#   pair           a part, then a part of another modality, no words around them
#   three          one or two parts, then the rest of the three modalities, in any order
#   request        "say seven, then draw it" and what it asks for
#   given          a picture or a sound or both, and what to do: "draw what you hear:"
#   again          a picture, then another; a sound, then another
#   unconditional  nothing, then one or two parts: the other side of classifier-free guidance
KINDS = {
    "pair": 0.50,
    "three": 0.16,
    "request": 0.16,
    "given": 0.06,
    "again": 0.03,
    "unconditional": 0.09,
}
# Weights of the directions among pairs. A word of the target is one token to learn from where a picture is sixteen, so
# reading needs more documents than drawing; and the directions without text are the hardest.
PAIRS = {
    ("text", "image"): 1,
    ("text", "audio"): 1,
    ("image", "text"): 3,
    ("audio", "text"): 2,
    ("image", "audio"): 3,
    ("audio", "image"): 2,
}
LENGTHS = (0.4, 0.4, 0.2)  # shares of requests for one, two and three parts
TWICE = 0.1  # share of requests for two pictures or two sounds

VERBS = {"text": ("write", "type"), "image": ("draw", "sketch"), "audio": ("say", "speak")}
PHRASES = ("{}", "the digit {}", "the number {}", "{article} {}")
JOINTS = {
    1: ("{0}",),
    2: ("{0}, then {1}", "{0} and {1}", "{0} and then {1}", "first {0}, then {1}"),
    3: ("{0}, {1}, then {2}", "{0}, then {1}, then {2}", "first {0}, then {1} and {2}"),
}
SENSES = {"image": "what you see", "audio": "what you hear"}
INTRODUCTIONS = ("this is {}:", "here is {}:")


class Element(NamedTuple):
    """A part to be: a string of text, or the draw number of a picture or sound of the document's digit."""

    modality: str
    value: str | int


@dataclass(frozen=True)
class DocumentPlan:
    """One document, of one digit."""

    kind: str
    digit: int
    context: tuple[Element, ...]
    target: tuple[Element, ...]


class Request(NamedTuple):
    """Something to ask in words, and the modalities that answer it, in order."""

    text: str
    digit: int
    want: tuple[str, ...]


class Pools(NamedTuple):
    """What `assemble` takes codes from: the text tokenizer, and for each digit the codes of its pictures and sounds."""

    text: Callable[[str], np.ndarray]
    image: Sequence[Sequence[np.ndarray]]
    audio: Sequence[Sequence[np.ndarray]]


def draw(index: int, seed: int) -> DocumentPlan:
    """The training document of this number, a pure function of (index, seed)."""
    rng = np.random.default_rng([seed, index])
    kind = _choose(rng, KINDS)
    digit = int(rng.integers(10))
    context, target = _DRAW[kind](rng, digit)
    return DocumentPlan(kind, digit, tuple(_capitalise(rng, element) for element in context), tuple(target))


def assemble(plan: DocumentPlan, pools: Pools) -> list[tuple[str, np.ndarray, bool]]:
    """The parts of a document in order: (modality, codes, whether it is context). No picture or sound comes twice."""
    used = {"image": set(), "audio": set()}
    parts = []
    for elements, context in ((plan.context, True), (plan.target, False)):
        for modality, value in elements:
            if modality == "text":
                parts.append((modality, pools.text(value), context))
                continue
            pool = getattr(pools, modality)[plan.digit]
            place = value % len(pool)
            while place in used[modality] and len(used[modality]) < len(pool):
                place = (place + 1) % len(pool)
            used[modality].add(place)
            parts.append((modality, pool[place], context))
    return parts


@cache
def requests(split: str) -> tuple[Request, ...]:
    """Every request for one to three different modalities that training draws ("train") or never draws ("test")."""
    return tuple(_fill(split, ((order, _commands(order, phrase)) for order in _orders(1, 2, 3) for phrase in PHRASES)))


@cache
def repetitions(split: str) -> tuple[Request, ...]:
    """As `requests`, for two pictures or two sounds."""
    orders = (("image", "image"), ("audio", "audio"))
    return tuple(
        _fill(split, ((order, _commands(order[:1], f"{phrase} twice")) for order in orders for phrase in PHRASES))
    )


def phrases(digit: int) -> tuple[str, ...]:
    """The ways to name a digit, the bare word first."""
    return tuple(_name(phrase, digit) for phrase in PHRASES)


def training_text() -> Iterator[str]:
    """All texts that training documents can hold, for the text tokenizer: held-out requests are not among them."""
    yield from WORDS
    contexts = [request.text for request in (*requests("train"), *repetitions("train"))]
    contexts += [phrase for digit in range(10) for phrase in phrases(digit)]
    contexts += [introduction.format(word) for introduction in INTRODUCTIONS for word in WORDS]
    for order in _orders(1, 2):
        contexts += _commands(order, "it")
        contexts += [f"{command}:" for sense in SENSES.values() for command in _commands(order, sense)]
    for text in contexts:
        yield text
        yield _capital(text)


def _draw_pair(rng: np.random.Generator, digit: int) -> tuple[list[Element], list[Element]]:
    source, target = _choose(rng, PAIRS)
    return [_given(rng, source, digit)], [_wanted(rng, target, digit)]


def _draw_three(rng: np.random.Generator, digit: int) -> tuple[list[Element], list[Element]]:
    order, turn = _pick(rng, _orders(3)), int(rng.integers(1, 3))
    return [_given(rng, part, digit) for part in order[:turn]], [_wanted(rng, part, digit) for part in order[turn:]]


def _draw_request(rng: np.random.Generator, digit: int) -> tuple[list[Element], list[Element]]:
    length = 0 if rng.random() < TWICE else int(rng.choice((1, 2, 3), p=LENGTHS))
    request = _pick(rng, _training_requests()[digit, length])
    return [Element("text", request.text)], [_wanted(rng, part, digit) for part in request.want]


def _draw_given(rng: np.random.Generator, digit: int) -> tuple[list[Element], list[Element]]:
    """A picture, a sound or both, and what to do with them in words that do not name the digit."""
    order = _pick(rng, _orders(1, 2))
    target = [_wanted(rng, part, digit) for part in order]
    source, other = _pick(rng, (("image", "audio"), ("audio", "image")))
    form = rng.integers(3)
    if form == 0:
        command = _pick(rng, _commands(order, SENSES[source]))
        return [Element("text", f"{command}:"), _wanted(rng, source, digit)], target
    context = [_wanted(rng, source, digit)]
    if form == 1:
        introduction = Element("text", _pick(rng, INTRODUCTIONS).format(WORDS[digit]))
        context = [introduction, *context, _wanted(rng, other, digit)]
    return [*context, Element("text", _pick(rng, _commands(order, "it")))], target


def _draw_again(rng: np.random.Generator, digit: int) -> tuple[list[Element], list[Element]]:
    modality = _pick(rng, ("image", "audio"))
    return [_wanted(rng, modality, digit)], [_wanted(rng, modality, digit)]


def _draw_unconditional(rng: np.random.Generator, digit: int) -> tuple[list[Element], list[Element]]:
    return [], [_wanted(rng, part, digit) for part in _pick(rng, _orders(int(rng.integers(1, 3))))]


_DRAW = {
    "pair": _draw_pair,
    "three": _draw_three,
    "request": _draw_request,
    "given": _draw_given,
    "again": _draw_again,
    "unconditional": _draw_unconditional,
}


def _wanted(rng: np.random.Generator, modality: str, digit: int) -> Element:
    """A part with nothing but the digit: text is the bare word, so that it can be scored by exact match."""
    return Element(modality, WORDS[digit] if modality == "text" else int(rng.integers(2**31)))


def _given(rng: np.random.Generator, modality: str, digit: int) -> Element:
    if modality == "text" and rng.random() < PHRASE:
        return Element("text", _pick(rng, phrases(digit)[1:]))
    return _wanted(rng, modality, digit)


def _orders(*lengths: int) -> list[tuple[str, ...]]:
    return [order for length in lengths for order in permutations(MODALITIES, length)]


@cache
def _commands(order: tuple[str, ...], thing: str) -> tuple[str, ...]:
    """All ways to ask for these modalities of a thing: it is named once, later it is "it"."""
    return tuple(
        joint.format(*(f"{verb} {'it' if place else thing}" for place, verb in enumerate(verbs)))
        for verbs in product(*(VERBS[modality] for modality in order))
        for joint in JOINTS[len(order)]
    )


def _fill(split: str, templates: Iterable[tuple[tuple[str, ...], tuple[str, ...]]]) -> Iterator[Request]:
    """The requests of a split: each template with each digit, a fifth of these combinations is held out, by a hash."""
    if split not in ("train", "test"):
        raise UsageError(f"requests come in the splits train and test, not {split!r}")
    for order, commands in templates:
        for command, digit in product(commands, range(10)):
            text = _name(command, digit)
            held_out = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < HELD_OUT * 2**64
            if held_out == (split == "test"):
                yield Request(text, digit, order)


@cache
def _training_requests() -> dict[tuple[int, int], list[Request]]:
    """By digit and number of modalities; 0 for repetitions."""
    table = {(digit, length): [] for digit in range(10) for length in range(4)}
    for request in requests("train"):
        table[request.digit, len(request.want)].append(request)
    for request in repetitions("train"):
        table[request.digit, 0].append(request)
    return table


def _name(phrase: str, digit: int) -> str:
    return phrase.format(WORDS[digit], article="an" if WORDS[digit] == "eight" else "a")


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _capitalise(rng: np.random.Generator, element: Element) -> Element:
    if element.modality == "text" and rng.random() < CAPITAL:
        return Element("text", _capital(element.value))
    return element


def _pick(rng: np.random.Generator, items: Sequence):
    return items[int(rng.integers(len(items)))]


def _choose(rng: np.random.Generator, weights: Mapping):
    shares = np.array(list(weights.values()), float)
    return list(weights)[rng.choice(len(shares), p=shares / shares.sum())]
