"""Requests that join and leave a running batch."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from reference import AUDIO, IMAGE, PLAIN, TEXT, make_grammar, make_model, prompt, request, slow_generate

from omni.generate import Engine, Generated, Shadow, slots, unconditional_shadow
from omni.generate.slots import CHUNKS, Slots, piece
from omni.model import make_decoder
from omni_tokenizers.errors import OmniError, UsageError

ROOM = 128
WANTS = [(TEXT,), (IMAGE,), (AUDIO, TEXT), (TEXT, IMAGE, AUDIO), None]


@pytest.fixture(scope="module")
def grammar():
    return make_grammar(PLAIN)


@pytest.fixture(scope="module")
def model(grammar):
    return make_model(grammar.vocabulary.size)


def arrivals(grammar, n: int, seed: int) -> list:
    """Requests of every kind, with short replies and long ones."""
    draw = np.random.default_rng(seed)
    shadows = unconditional_shadow(prompt(grammar, 0), np.array([1, 3, 1.5], np.float32))
    requests = []
    for i in range(n):
        modalities = draw.choice(grammar.modalities, size=draw.integers(1, 4))
        asked = request(
            grammar,
            prompt(grammar, int(draw.integers(1 << 30)), *modalities),
            want=WANTS[draw.integers(len(WANTS))],
            max_tokens=int(draw.choice([14, 20, 30, 60])),
            temperature=float(draw.choice([0, 1])),
            shadows=shadows if i % 3 == 0 else (),
            seed=i,
        )
        if i % 7 == 0:
            asked = replace(asked, repetition_penalty=np.full(3, 1.5, np.float32), log_probabilities=True)
        requests.append(asked)
    return requests


def answer(batch: Slots, requests: list, draw: np.random.Generator) -> list[Generated]:
    """Replies to requests that arrive now and then while the batch runs."""
    replies, joined, numbers, waiting = {}, {}, {}, list(enumerate(requests))
    while waiting or batch.busy:
        for _ in range(min(draw.poisson(2), len(waiting))):
            place, asked = waiting.pop(0)
            numbers[batch.add(asked)] = place
        for progress in batch.step(int(draw.integers(1, 12)), parts=bool(draw.integers(2))):
            joined.setdefault(progress.number, []).extend(progress.ids.tolist())
            if progress.reply:
                assert progress.reply.ids.tolist() == joined[progress.number]
                replies[numbers[progress.number]] = progress.reply
    return [replies[place] for place in range(len(requests))]


def test_arrivals_through_eight_slots_are_answered_as_each_alone(model, grammar, compilations):
    """Two hundred at random times, of every kind: the replies are those of each alone, nothing is compiled after a
    warm-up, and the tokens take less than 2/3 of the steps that batches of eight in the order of arrival take."""
    engine = Engine(make_decoder(model), grammar)
    batch = engine.open(8, capacity=ROOM)
    requests = arrivals(grammar, 200, seed=2)
    batch.warm_up(requests)
    before = compilations.count
    assert before > 3, "compilations are counted"
    replies = answer(batch, requests, np.random.default_rng(2))
    assert compilations.count == before
    steps = engine.counts["steps"]
    alone = [engine.generate([asked])[0] for asked in requests]
    for own, other in zip(replies, alone, strict=True):
        assert own.ids.tolist() == other.ids.tolist() and own.well_formed == other.well_formed
        if other.log_probabilities is not None:
            np.testing.assert_allclose(own.log_probabilities, other.log_probabilities, atol=1e-4)
    lengths = [len(reply.ids) for reply in replies]
    in_batches = sum(max(lengths[start : start + 8]) for start in range(0, len(lengths), 8))
    assert steps * 1.5 < in_batches


def test_a_warm_batch_compiles_nothing_where_weights_are_kept_on_a_device(model, grammar, compilations):
    """Nor where replies are stopped and cancelled: arrays go from program to program, never by way of the host."""
    engine = Engine(jax.device_put(make_decoder(model), jax.devices()[0]), grammar)
    requests = arrivals(grammar, 20, seed=3)
    requests[3] = replace(requests[3], stop=lambda ids: 1)
    batch = engine.open(4, capacity=ROOM)
    batch.warm_up(requests)
    before = compilations.count
    answer(batch, requests, np.random.default_rng(2))
    number = batch.add(requests[0])
    batch.step(1)
    batch.cancel(number)
    answer(batch, requests[:5], np.random.default_rng(3))
    assert compilations.count == before > 3


def test_what_is_read_waits_unharmed_for_the_rest(model, grammar, monkeypatch):
    """Guided requests, whose two prompts take different times to read, wait while another one emits tokens: their first
    tokens, guided, are drawn from both."""
    monkeypatch.setattr(slots, "CHUNKS", (2, 8))
    shadows = unconditional_shadow(prompt(grammar, 0), np.array([0.3, 3, 1.5], np.float32))
    ids = prompt(grammar, 3, *["text", "image", "audio"] * 4)
    guided = [request(grammar, ids, want=(TEXT,), shadows=shadows, seed=seed, max_tokens=4) for seed in range(6)]
    busy = request(grammar, prompt(grammar, 1), want=(AUDIO,) * 9, max_tokens=110)
    batch = Engine(make_decoder(model), grammar).open(8, capacity=ROOM)
    batch.add(busy)
    batch.step(2)
    for asked in guided:
        batch.add(asked)
    found = [progress for _ in range(99) if batch.busy for progress in batch.step(2) if progress.reply]
    assert found[-1].number == 0, "it is busy until the others are done"
    replies = {progress.number: progress.reply.ids.tolist() for progress in found}
    expected = [slow_generate(model, grammar, asked) for asked in (busy, *guided)]
    assert replies == dict(enumerate(expected)) and len({tuple(ids) for ids in expected}) > 4


def test_what_was_read_for_one_that_was_cancelled_stays_true(model, grammar, monkeypatch):
    """Its shadow's row was read and never used; others come and go before a request begins with what it holds."""
    monkeypatch.setattr(slots, "CHUNKS", (2, 8))
    long = prompt(grammar, 3, *["text", "image", "audio"] * 4)
    shadow = (Shadow(prompt(grammar, 5, "text", "image"), np.array([-1, -2, -1], np.float32)),)
    engine = Engine(make_decoder(model), grammar)
    batch = engine.open(1, capacity=ROOM, shadows=1)
    number = batch.add(request(grammar, long, want=(IMAGE,), shadows=shadow))
    for _ in range(3):
        batch.step(1)
    batch.cancel(number)
    plain = request(grammar, prompt(grammar, 1, "text"), want=(IMAGE, TEXT), seed=2)
    guided = request(grammar, prompt(grammar, 2, "audio"), want=(IMAGE,), shadows=shadow, seed=1)
    before = engine.counts["read"]
    replies = answer(batch, [plain], np.random.default_rng(0)) + answer(batch, [guided], np.random.default_rng(0))
    assert [reply.ids.tolist() for reply in replies] == [
        slow_generate(model, grammar, each) for each in (plain, guided)
    ]
    rest = len(long) - 3 * 8  # of the prompt that was being read
    assert engine.counts["read"] - before <= max(rest, 0) + len(plain.ids) + len(guided.ids) + 1


def test_a_request_that_cannot_be_is_refused_on_arrival(model, grammar):
    """Ids that are no document, and numbers that are none, are never half admitted; impossible sizes are refused."""
    engine = Engine(make_decoder(model), grammar)
    batch = engine.open(1, capacity=ROOM)
    asked = request(grammar, prompt(grammar, 1, "text"), want=(TEXT,), max_tokens=9)
    for wrong in ({"ids": asked.ids[1:]}, {"seed": "a"}, {"seed": None}, {"max_tokens": 5.5}):
        with pytest.raises(OmniError):
            batch.add(replace(asked, **wrong))
    assert not batch.busy
    typed = batch.add(replace(asked, seed=np.int32(3)))
    with pytest.raises(UsageError, match="hop"):
        batch.step(-1)
    while batch.busy:
        found = batch.step()
    assert found[-1].number == typed
    assert found[-1].reply.ids.tolist() == engine.generate([replace(asked, seed=3)])[0].ids.tolist()
    for sizes in (
        {"slots": 0},
        {"slots": -3},
        {"slots": 1.5},
        {"slots": 1, "shadows": -1},
        {"slots": 1, "capacity": 0},
    ):
        with pytest.raises(UsageError, match="is a whole number"):
            engine.open(**({"capacity": ROOM} | sizes))


def test_prompts_in_pieces_while_others_answer(model, grammar, monkeypatch):
    """Prompts much longer than a piece, read between the tokens of running requests, give what the whole recomputed
    for each token gives."""
    monkeypatch.setattr(slots, "CHUNKS", (2, 8))
    monkeypatch.setattr(slots, "READING_HOP", 3)
    shadows = (Shadow(prompt(grammar, 9, "image", "text", "image"), np.array([0, -2, -1], np.float32)),)
    requests = [
        request(grammar, prompt(grammar, i, *["text", "image", "audio"] * (i % 4)), want=(IMAGE, TEXT), seed=i)
        for i in range(8)
    ]
    requests[5] = replace(requests[5], shadows=shadows)
    assert max(len(asked.ids) for asked in requests) > 30
    batch = Engine(make_decoder(model), grammar).open(3, capacity=ROOM, shadows=1)
    replies = answer(batch, requests, np.random.default_rng(0))
    assert [reply.ids.tolist() for reply in replies] == [slow_generate(model, grammar, asked) for asked in requests]


def test_a_later_turn_reads_what_is_new_alone(model, grammar):
    """Its prompt begins with an earlier prompt and its reply: of these nothing is read again, though others have been
    answered in between, in other slots; with shadows, nothing of theirs either."""
    engine = Engine(make_decoder(model), grammar)
    batch = engine.open(3, capacity=ROOM, shadows=2)
    nothing = prompt(grammar, 0)
    first = request(
        grammar,
        prompt(grammar, 1, "text", "image"),
        want=(TEXT, IMAGE),
        shadows=unconditional_shadow(nothing, np.array([1, 3, 1], np.float32)),
    )
    draw = np.random.default_rng(0)
    reply = answer(batch, [first], draw)[0]
    answer(batch, arrivals(grammar, 1, seed=4), draw)
    turn, held = [grammar.control["turn"]], reply.ids[:-1]  # without the end
    follow = prompt(grammar, 5, "text")[1:-1]
    longer = replace(
        first,
        ids=np.concatenate([first.ids, held, follow, turn]).astype(np.int32),
        shadows=[replace(each, ids=np.concatenate([each.ids, held, turn]).astype(np.int32)) for each in first.shadows],
        seed=3,
    )
    before = engine.counts["read"]
    second = answer(batch, [longer], draw)[0]
    assert engine.counts["read"] - before == len(follow) + 2
    assert second.ids.tolist() == slow_generate(model, grammar, longer)
    before = engine.counts["read"]
    again = answer(batch, [longer], draw)[0]
    assert again.ids.tolist() == second.ids.tolist()
    assert engine.counts["read"] - before == 2, "of what is held whole, the last token of each row is read again"


def test_replies_in_int8_are_those_of_each_alone(model, grammar):
    """Weights and cache in int8: guided requests in slots that hold the beginnings of earlier ones are answered as each
    in a batch of its own, and of a prompt whose beginning a slot holds the rest alone is read."""
    engine = Engine(make_decoder(model, "int8"), grammar, cache_dtype="int8")
    shadows = unconditional_shadow(prompt(grammar, 0), np.array([1, 3, 1.5], np.float32))
    requests = [
        request(
            grammar, prompt(grammar, i, "text", "image"), want=WANTS[i % 4], temperature=i % 2, shadows=shadows, seed=i
        )
        for i in range(8)
    ]

    def alone(asked):
        return answer(engine.open(4, capacity=ROOM, shadows=4), [asked], np.random.default_rng(0))[0]

    batch = engine.open(4, capacity=ROOM, shadows=4)
    replies = answer(batch, requests, np.random.default_rng(0))
    assert jax.tree.leaves(batch._state.cache)[0].dtype == "int8"
    assert [reply.ids.tolist() for reply in replies] == [alone(asked).ids.tolist() for asked in requests]
    follow = np.concatenate([requests[7].ids, replies[7].ids[:-1], requests[6].ids[1:]]).astype(np.int32)
    longer, before = replace(requests[6], ids=follow), engine.counts["read"]
    second = answer(batch, [longer], np.random.default_rng(0))[0]
    assert engine.counts["read"] - before == len(requests[6].ids) - 1 + 1, "and the last token of its shadow"
    assert second.ids.tolist() == alone(longer).ids.tolist()


def test_requests_wait_for_rows_of_shadows(model, grammar):
    """One row for guidance serves three guided requests one after the other; what two rows need never waits."""
    engine = Engine(make_decoder(model), grammar)
    batch = engine.open(4, capacity=ROOM, shadows=1)
    requests = arrivals(grammar, 7, seed=6)
    replies = answer(batch, requests, np.random.default_rng(0))
    assert [reply.ids.tolist() for reply in replies] == [engine.generate([asked])[0].ids.tolist() for asked in requests]
    two = replace(requests[0], shadows=(*requests[0].shadows, *requests[0].shadows))
    with pytest.raises(UsageError, match="2 more rows, the batch has 1"):
        batch.add(two)


def test_what_a_slot_cannot_hold_is_refused_on_arrival(model, grammar):
    """Before it waits; the others are answered."""
    batch = Engine(make_decoder(model), grammar, context=40).open(2, capacity=64)
    asked = request(grammar, prompt(grammar, 1, "text"), want=(TEXT,), max_tokens=9)
    with pytest.raises(OmniError, match="the model reads at most 40"):
        batch.add(replace(asked, max_tokens=60))
    assert len(answer(batch, [asked], np.random.default_rng(0))) == 1 and not batch.busy


def test_pieces_of_a_prompt():
    """A piece is never less than half full, but for the smallest; long prompts take full ones."""
    assert [piece(n, CHUNKS) for n in (1, 32, 33, 64, 65, 128, 200, 256, 257, 512, 5000)] == [
        32, 32, 32, 32, 128, 128, 128, 128, 512, 512, 512,
    ]  # fmt: skip
