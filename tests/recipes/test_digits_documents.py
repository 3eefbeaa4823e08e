"""Documents of the digits recipe."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from omni.recipes.digits_documents import (
    CAPITAL,
    KINDS,
    PAIRS,
    WORDS,
    DocumentPlan,
    Element,
    Pools,
    assemble,
    draw,
    phrases,
    repetitions,
    requests,
    training_text,
)
from omni_tokenizers.errors import UsageError


@pytest.fixture(scope="module")
def plans():
    return [draw(index, seed=0) for index in range(20_000)]


def modalities(elements):
    return tuple(element.modality for element in elements)


def test_draws_are_a_function_of_seed_and_index(plans):
    """A document is the same in any order of drawing; another seed draws another."""
    assert all(draw(index, seed=0) == plans[index] for index in (17, 3, 999))
    assert sum(draw(index, seed=1) == plans[index] for index in range(200)) < 5


def test_kinds_and_directions_have_their_shares(plans):
    """Kinds and the six directions are drawn as often as their tables say, digits equally often."""
    kinds = Counter(plan.kind for plan in plans)
    for kind, share in KINDS.items():
        assert abs(kinds[kind] / len(plans) - share) < 0.012
    pairs = Counter(modalities(plan.context) + modalities(plan.target) for plan in plans if plan.kind == "pair")
    for direction, weight in PAIRS.items():
        assert abs(pairs[direction] / kinds["pair"] - weight / sum(PAIRS.values())) < 0.02
    assert max(abs(count / len(plans) - 0.1) for count in Counter(plan.digit for plan in plans).values()) < 0.01
    assert abs(sum(KINDS.values()) - 1) < 1e-9


def test_every_order_of_three_parts_and_every_want_occurs(plans):
    """Three-part documents have all orders and both places of the turn; requests all fifteen orders and the doubles."""
    three = Counter((modalities(plan.context), modalities(plan.target)) for plan in plans if plan.kind == "three")
    assert len(three) == 12 and min(three.values()) > 100
    wants = Counter(modalities(plan.target) for plan in plans if plan.kind == "request")
    assert len(wants) == 17 and min(wants.values()) > 60
    given = {modalities(plan.context) for plan in plans if plan.kind == "given"}
    assert {("text", "audio"), ("image", "text"), ("text", "image", "audio", "text")} <= given
    unconditional = [plan for plan in plans if not plan.context]
    assert {plan.kind for plan in unconditional} == {"unconditional"}
    assert len({modalities(plan.target) for plan in unconditional}) == 9


def test_parts_are_well_formed(plans):
    """A target text is the bare word, no text touches another, and each text names no other digit."""
    for plan in plans:
        for elements in (plan.context, plan.target):
            assert ("text", "text") not in pairwise(modalities(elements))
        for modality, value in (*plan.context, *plan.target):
            assert isinstance(value, str if modality == "text" else int)
            if modality == "text":
                others = [word for digit, word in enumerate(WORDS) if digit != plan.digit]
                assert not any(word in value.lower().replace(",", "").split() for word in others)
        assert plan.target
        assert all(value == WORDS[plan.digit] for modality, value in plan.target if modality == "text")


def test_context_texts_vary(plans):
    """Texts before the turn are mostly words in small letters, sometimes phrases, sometimes capitalised."""
    texts = [plan.context[0].value for plan in plans if plan.kind == "pair" and plan.context[0].modality == "text"]
    assert abs(np.mean([text[0].isupper() for text in texts]) - CAPITAL) < 0.03
    assert 0.75 < np.mean([text.lower() in WORDS for text in texts]) < 0.85


def test_requests_split(plans):
    """A fifth of the requests is held out; training neither draws them nor trains the text tokenizer on them."""
    train, test = {request.text for request in requests("train")}, {request.text for request in requests("test")}
    assert not train & test and len(test) >= 300
    assert abs(len(test) / (len(train) + len(test)) - 0.2) < 0.02
    held_out = test | {request.text for request in repetitions("test")}
    drawn = {plan.context[0].value for plan in plans if plan.kind == "request"}
    drawn = {text[0].lower() + text[1:] for text in drawn}
    assert len(drawn) > 1000 and not drawn & held_out
    assert not {text[0].lower() + text[1:] for text in training_text()} & held_out
    assert {request.digit for request in requests("test")} == set(range(10))
    assert len({request.want for request in requests("test")}) == 15
    with pytest.raises(UsageError):
        requests("validation")


def test_requests_say_what_they_want():
    """The verbs of a request stand in the order of the modalities it wants."""
    verbs = {"write": "text", "type": "text", "draw": "image", "sketch": "image", "say": "audio", "speak": "audio"}
    for request in (*requests("train"), *requests("test")):
        words = request.text.replace(",", "").split()
        assert tuple(verbs[word] for word in words if word in verbs) == request.want
        assert WORDS[request.digit] in words
    assert "say seven, then draw it" in {request.text for request in (*requests("train"), *requests("test"))}
    assert phrases(8) == ("eight", "the digit eight", "the number eight", "an eight")


def test_training_text_covers_the_contexts(plans):
    """Every text that training draws is among those the text tokenizer learns from."""
    texts = set(training_text())
    assert all(
        value in texts for plan in plans for modality, value in (*plan.context, *plan.target) if modality == "text"
    )


def test_assemble_takes_codes_of_the_digit():
    """Codes come from the digit's pools in order, marked as context or not; no picture comes twice."""
    pools = Pools(
        text=lambda text: np.array([len(text)]),
        image=[[np.array([digit, item]) for item in range(3)] for digit in range(10)],
        audio=[[np.array([digit, item]) for item in range(2)] for digit in range(10)],
    )
    plan = DocumentPlan(
        "given", 7, (Element("text", "seven"), Element("image", 5)), (Element("image", 2), Element("audio", 8))
    )
    parts = [(modality, codes.tolist(), context) for modality, codes, context in assemble(plan, pools)]
    assert parts == [("text", [5], True), ("image", [7, 2], True), ("image", [7, 0], False), ("audio", [7, 0], False)]
