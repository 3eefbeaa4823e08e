"""The batched, cached engine against the slow reference, and its counts of steps and compilations."""

import re
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from reference import (
    AUDIO,
    IMAGE,
    ONE,
    PLAIN,
    SIZED,
    TEXT,
    VIDEO,
    make_grammar,
    make_model,
    prompt,
    request,
    slow_draws,
    slow_generate,
    three_passes,
)

from omni.generate import Engine, Shadow, guidance_shadows, loop, rules, unconditional_shadow
from omni.generate.loop import guided_logits, read
from omni.model import make_decoder
from omni_tokenizers.errors import OmniError


@pytest.fixture(scope="module")
def grammar():
    return make_grammar(PLAIN)


@pytest.fixture(scope="module")
def model(grammar):
    return make_model(grammar.vocabulary.size)


@pytest.fixture(scope="module")
def engine(model, grammar):
    return Engine(make_decoder(model), grammar)


def mixed_requests(grammar, temperature: float) -> list:
    """Eight requests that differ in prompt, order, length, guidance, sampling and seed."""
    nothing = prompt(grammar, 0)
    guidance = np.array([1, 3, 1.5], np.float32)

    def ask(seed: int, *modalities: str, **changes):
        ids = prompt(grammar, seed, *modalities)
        return request(grammar, ids, **({"temperature": temperature, "seed": seed} | changes))

    two_way = unconditional_shadow(nothing, guidance)
    three_way = (
        Shadow(nothing, np.array([0, -0.5, -1], np.float32)),
        Shadow(prompt(grammar, 99, "text"), np.array([0, -1.5, 0.5], np.float32)),
    )
    return [
        ask(1, "text", want=(IMAGE,)),
        ask(2, "image", "text", "audio", want=(AUDIO,), max_tokens=12),
        ask(3, "audio", want=(TEXT,), max_tokens=9),
        ask(4, "text", want=(TEXT, IMAGE, AUDIO, IMAGE), shadows=two_way, max_tokens=40),
        ask(5, max_tokens=30),
        ask(6, "text", "image", shadows=three_way, top_k=(5, 3, 0), top_p=(0.9, 1, 0.5)),
        ask(7, "image", "image", top_p=0.7, max_tokens=17),
        ask(8, "audio", "text", constrained=False, shadows=two_way, max_tokens=15),
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_same_tokens_as_recomputing_each_row_alone(model, grammar, engine, temperature):
    """Cache, batch, padding, shadows, masks and keys change no token."""
    requests = mixed_requests(grammar, temperature)
    for asked, reply in zip(requests, engine.generate(requests), strict=True):
        assert reply.ids.tolist() == slow_generate(model, grammar, asked)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_same_tokens_where_the_model_is_sure(grammar, temperature):
    """The same of a model with peaked probabilities, where guidance leaves only some of the admitted ids to choose."""
    model = make_model(grammar.vocabulary.size, sharpness=4)
    requests = mixed_requests(grammar, temperature)
    for asked, reply in zip(requests, Engine(make_decoder(model), grammar).generate(requests), strict=True):
        assert reply.ids.tolist() == slow_generate(model, grammar, asked)


def test_same_tokens_with_sizes_row_ends_and_delays():
    """The same for another layout: nothing in the engine knows what a span looks like."""
    grammar = make_grammar(SIZED)
    model = make_model(grammar.vocabulary.size, seed=3)
    orders = [None, (IMAGE,), (AUDIO, TEXT), (TEXT, IMAGE)]
    requests = [
        request(grammar, prompt(grammar, seed, "text", "image"), want=want, seed=seed, max_tokens=26)
        for seed, want in enumerate(orders)
    ]
    for asked, reply in zip(requests, Engine(make_decoder(model), grammar).generate(requests), strict=True):
        assert reply.ids.tolist() == slow_generate(model, grammar, asked)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_penalties_and_floors_of_some_requests(model, grammar, engine, temperature):
    """min_p and repetition_penalty by modality, under guidance too, are the reference's; no other reply changes."""
    plain = mixed_requests(grammar, temperature)
    settings = [{"repetition_penalty": (3, 1, 0.4)}, {"min_p": (0.5, 0.8, 0)}, {"min_p": 0.3, "repetition_penalty": 2}]
    asking = [
        request(
            grammar, each.ids, each.max_tokens, temperature=temperature, want=each.want, shadows=each.shadows, **changes
        )
        for each, changes in zip([plain[4], plain[0], plain[3]], settings, strict=True)
    ]
    replies = [reply.ids.tolist() for reply in engine.generate(plain + asking)]
    assert replies[:8] == [reply.ids.tolist() for reply in engine.generate(plain)]
    assert replies[8:] == [slow_generate(model, grammar, each) for each in asking]


def test_log_probabilities_are_of_what_each_token_was_drawn_from(model, grammar, engine):
    """Within 1e-4 of the reference, under guidance, penalties and all settings of a draw; None for who did not ask."""
    plain = mixed_requests(grammar, 1.0)
    asking = [replace(plain[place], log_probabilities=True) for place in (3, 5, 7, 4)]
    asking[3] = replace(asking[3], repetition_penalty=np.array([3, 1, 0.4]), min_p=np.array([0.1, 0.1, 0.1]))
    *replies, one, other = engine.generate([*asking, plain[3], plain[5]])
    for asked, reply in zip(asking, replies, strict=True):
        expected = slow_draws(model, grammar, asked)
        assert reply.ids.tolist() == [token for token, _ in expected]
        assert reply.log_probabilities.dtype == np.float32
        np.testing.assert_allclose(reply.log_probabilities, [each for _, each in expected], atol=1e-4)
    assert one.log_probabilities is None and one.ids.tolist() == replies[0].ids.tolist()
    assert other.log_probabilities is None and other.ids.tolist() == replies[1].ids.tolist()


def first_of(chosen: np.ndarray):
    """A `PreparedRequest.stop`: up to the first of some ids."""

    def stop(ids: np.ndarray) -> int | None:
        places = np.flatnonzero(np.isin(ids, chosen))
        return int(places[0]) + 1 if len(places) else None

    return stop


def stopping_requests(grammar) -> list:
    """Requests that end at some text ids, in the loop or on the host, and at ids that also stand inside of spans."""
    some = grammar.vocabulary.block("text")[::4]
    closing = grammar.vocabulary.token("</image>")
    codes = grammar.vocabulary.block("image").tolist()
    plain = [
        request(grammar, prompt(grammar, seed, "text"), seed=seed, max_tokens=40, want=(TEXT, IMAGE, TEXT, AUDIO))
        for seed in (1, 2, 3, 4)
    ]
    return [
        replace(plain[0], stop_tokens=tuple(some.tolist())),
        replace(plain[0], stop=first_of(some)),
        replace(plain[1], stop_tokens=(*codes, closing)),
        replace(plain[2], stop=first_of(np.array([closing]))),
        plain[3],
    ]


def test_stops_end_replies_where_they_come(model, grammar, engine):
    """At the token at which the reference stops, whatever the host looks at in one go; spans are never left open."""
    requests = stopping_requests(grammar)
    replies = engine.generate(requests)
    assert all(reply.well_formed for reply in replies)
    ids = [reply.ids.tolist() for reply in replies]
    assert ids == [slow_generate(model, grammar, asked) for asked in requests]
    assert ids[0] == ids[1] and ids[0][-1] in requests[0].stop_tokens
    assert ids[2][-1] == ids[3][-1] == grammar.vocabulary.token("</image>")
    whole = engine.generate([replace(asked, stop_tokens=(), stop=None) for asked in requests])
    assert [reply.ids[: len(own)].tolist() for reply, own in zip(whole, ids, strict=True)] == ids
    assert [len(own) < len(reply.ids) for reply, own in zip(whole, ids, strict=True)] == [True] * 4 + [False]


@pytest.mark.parametrize("hop", [1, 7])
def test_a_stream_stops_where_generate_does(grammar, engine, hop):
    """No id beyond the stop is ever given out."""
    requests = stopping_requests(grammar)
    joined = {i: [] for i in range(len(requests))}
    for increments in engine.stream(requests, hop):
        for progress in increments:
            joined[progress.number] += progress.ids.tolist()
    assert list(joined.values()) == [reply.ids.tolist() for reply in engine.generate(requests)]


def test_a_prompt_of_several_sequences_is_read_once(model, grammar):
    """Four samples under guidance: two prompts are read, and the replies are those of each alone."""
    engine = Engine(make_decoder(model), grammar)
    shadows = unconditional_shadow(prompt(grammar, 0), np.array([2, 3, 1], np.float32))
    asked = request(grammar, prompt(grammar, 1, "text", "image"), shadows=shadows, want=(TEXT, IMAGE))
    samples = [replace(asked, seed=seed) for seed in range(4)]
    together = [reply.ids.tolist() for reply in engine.generate(samples)]
    assert engine.counts["read"] == len(asked.ids) + len(shadows[0].ids)
    assert (copied := engine.counts["copy_rows"]) > 0
    assert together == [engine.generate([each])[0].ids.tolist() for each in samples]
    assert len(set(map(tuple, together))) == 4 and engine.counts["copy_rows"] == copied  # nothing to copy for one


def test_what_is_not_asked_for_is_not_in_the_program(model, grammar):
    """Ids that were seen are carried only where a request has a penalty, log-probabilities where one wants them."""
    engine = Engine(make_decoder(model), grammar)
    ids = prompt(grammar, 1, "text")

    def widths(**changes) -> list[int]:
        slots, _ = engine._lined_up([request(grammar, ids), request(grammar, ids, **changes)])
        slots.step(1)
        columns = slots._state.seen, slots._settings.stop_tokens, slots._state.log_probabilities
        return [each.shape[1] for each in columns]

    assert widths() == [0, 0, 0]
    assert widths(repetition_penalty=(1, 1, 1.5)) == [grammar.vocabulary.size, 0, 0]
    assert widths(stop_tokens=(1, 2, 3)) == [0, 4, 0]
    assert widths(log_probabilities=True) == [0, 0, slots_for(ids)]


def slots_for(ids: np.ndarray) -> int:
    """Of a cache for this prompt and the 24 tokens of `request`."""
    return -(-(len(ids) + 24) // 32) * 32


def test_a_batch_takes_the_steps_of_its_longest_in_one_program(model, grammar):
    """Eight different requests: steps are the maximum and not the sum; one program each is compiled."""
    engine = Engine(make_decoder(model), grammar)
    lengths = [len(reply.ids) for reply in engine.generate(mixed_requests(grammar, 1.0))]
    assert len(set(lengths)) > 3
    read = engine.counts.pop("read")
    assert engine.counts == {"read_prompts": 1, "copy_rows": 1, "enter": 1, "advance": 1, "steps": max(lengths)}
    assert read > 16  # all but the one that two requests have as their shadow


def test_a_begun_part_goes_on_under_guidance(model, grammar):
    """A prompt and its shadow may end inside of a picture, as a reply that was cut off does: the rest is as it was."""
    ids, nothing, weights = prompt(grammar, 3, "text"), prompt(grammar, 0), np.array([1, 3, 1], np.float32)
    engine, settings = Engine(make_decoder(model), grammar), {"temperature": 0.0}
    whole = request(grammar, ids, want=(IMAGE,), shadows=unconditional_shadow(nothing, weights), **settings)
    reply = engine.generate([whole])[0].ids
    begun, rest = reply[:3], reply[3:-1]
    shadows = unconditional_shadow(np.concatenate([nothing, begun]), weights)
    more = request(grammar, np.concatenate([ids, begun]), max_tokens=len(rest), shadows=shadows, **settings)
    np.testing.assert_array_equal(engine.generate([more])[0].ids, rest)


def test_what_ends_the_last_reply_is_not_read(model, grammar, monkeypatch):
    """The transformer reads one token less than a batch emits, of however many requests; none for replies of one."""
    turns = []

    def counted(*arguments, **named):
        jax.debug.callback(lambda: turns.append(1))
        return read(*arguments, **named)

    monkeypatch.setattr(loop, "read", counted)
    for lengths in ((1,), (1, 1), (9,), (3, 12)):
        requests = [request(grammar, prompt(grammar, 1, "text"), max_tokens=most) for most in lengths]
        engine, before = Engine(make_decoder(model), grammar), len(turns)
        engine.generate(requests)
        jax.effects_barrier()
        assert len(turns) - before == engine.counts["steps"] - 1


@pytest.mark.parametrize("requests", [1, 4])
def test_no_token_copies_the_cache(model, grammar, requests):
    """Keys and values are written where the cache lies: the compiled loop holds no copy of one."""
    compiled = Engine(make_decoder(model), grammar).lower(requests, capacity=96).compile().as_text()
    stored = f"f32[{requests},2,96,8]"
    assert stored in compiled and not re.findall(rf"= {re.escape(stored)}\S* copy\(", compiled)


def test_what_is_lowered_from_shapes_is_what_runs(model, grammar):
    """The loop that `omni compile --generate` compiles is, argument for argument, the one that a batch has run: it is
    not traced again."""
    engine = Engine(make_decoder(model), grammar)
    requests = [request(grammar, prompt(grammar, seed, "text"), max_tokens=9) for seed in (1, 2)]
    engine.generate(requests)
    assert engine.counts["advance"] == 1
    lowered = engine.lower(requests=2, capacity=32)
    assert engine.counts["advance"] == 1 and "while" in lowered.as_text()
    engine.lower(requests=2, capacity=64)
    assert engine.counts["advance"] == 2


def test_another_prompt_of_the_same_padded_length_compiles_nothing(grammar, engine):
    """Prompt, order, seed, sampling and budget are data."""
    engine.generate([request(grammar, prompt(grammar, 1, "text"), want=(IMAGE,), max_tokens=50)])
    before = {name: engine.counts[name] for name in ("read_prompts", "advance")}
    changed = {"want": (TEXT, AUDIO), "seed": 9, "temperature": 0.3, "top_p": 0.5, "max_tokens": 31}
    engine.generate([request(grammar, prompt(grammar, 2, "audio", "text", "image"), **changed)])
    assert before == {name: engine.counts[name] for name in ("read_prompts", "advance")}


def test_neither_batch_nor_slot_changes_a_reply(model, grammar, engine):
    """Replies come in the order of the requests, the same in batches of few as all at once."""
    requests = mixed_requests(grammar, 1.0)[::-1]
    together = engine.generate(requests)
    split = Engine(make_decoder(model), grammar, max_rows=8).generate(requests)
    for one, other in zip(together, split, strict=True):
        assert one.ids.tolist() == other.ids.tolist() and one.well_formed == other.well_formed


def test_seed_changes_a_reply_and_repeats_it(grammar, engine):
    """The same seed gives the same reply, another seed another."""
    ids = prompt(grammar, 1, "text")
    one, same, other = (engine.generate([request(grammar, ids, seed=seed)])[0] for seed in (1, 1, 2**32 - 1))
    assert one.ids.tolist() == same.ids.tolist() != other.ids.tolist()


def test_guidance_lifts_nothing_that_the_request_finds_unlikely():
    """An id that the shadow finds still less likely gains most by guidance, but it is nonsense and stays out."""
    own, shadow = np.log([[0.60, 0.30, 0.0999, 0.0001], [0.20, 0.40, 0.40, 1e-20]])
    settings = SimpleNamespace(shadow=np.array([[1]]), weight=np.array([[[-2.0]]]))
    logits = np.stack([own, shadow]).astype(np.float32)
    everything = np.ones((1, 4), bool)
    guided, left = guided_logits(settings, logits, np.array([0]), everything)
    assert np.argmax(guided[0]) == 3 and left[0].tolist() == [True, True, True, False]
    for weight in (0.0, 0.5, 1.0):  # no guidance, and towards the shadow: nothing is lifted
        settings.weight = np.full((1, 1, 1), weight)
        assert guided_logits(settings, logits, np.array([0]), everything)[1].all()
    settings.weight = np.array([[[-2.0]]])
    only = np.array([[False, False, True, True]])  # among what is admitted
    assert guided_logits(settings, logits, np.array([0]), only)[1][0].tolist() == [False, False, True, False]


def test_guidance_in_two_steps_is_three_passes(model, grammar, engine):
    """Chameleon's weights on pictures, others on text: log-probabilities within 1e-4 of its formula without a cache."""
    guidance, media_guidance = np.array([1.5, 3, 1], np.float32), np.array([0.5, 1.2, 1], np.float32)
    ids = prompt(grammar, 6, "text", "image")
    image = [span for span in grammar.parse(ids) if span.modality == "image"]
    media, nothing = grammar.prompt(image), grammar.prompt([])
    shadows = guidance_shadows(ids, media, nothing, guidance, media_guidance)
    assert len(shadows) == 2
    asked = request(grammar, ids, shadows=shadows, want=(TEXT, IMAGE), seed=2, log_probabilities=True)
    reply = engine.generate([asked])[0]
    expected = three_passes(model, grammar, asked, media, nothing, guidance, media_guidance, reply.ids.tolist())
    np.testing.assert_allclose(reply.log_probabilities, expected, atol=1e-4)
    assert len(expected) >= 8 and min(expected) < -1


def test_guidance_in_two_steps_of_a_prompt_that_lacks_one(grammar):
    """Without text, pictures against nothing; without pictures, or with one weight for both, all against nothing."""
    text, image, both = (prompt(grammar, 6, *names) for names in (("text",), ("image",), ("text", "image")))
    nothing, strong, weak = prompt(grammar, 0), np.full(3, 3, np.float32), np.full(3, 1.2, np.float32)

    def weights(*arguments) -> list:
        return [(shadow.ids.tolist(), float(shadow.weight[0])) for shadow in guidance_shadows(*arguments)]

    assert weights(text, nothing, nothing, strong, weak) == [(nothing.tolist(), -2)]
    assert weights(image, image, nothing, strong, weak) == [(nothing.tolist(), pytest.approx(-0.2))]
    assert weights(both, image, nothing, strong, strong) == [(nothing.tolist(), -2)]
    assert weights(both, image, nothing, strong, strong / 3) == [(image.tolist(), -2)]


def test_guidance_of_modalities_that_cannot_come_costs_nothing(grammar, engine):
    """A request for text only, guided in pictures only, has no shadow and answers as without guidance."""
    ids, nothing = prompt(grammar, 1, "image"), prompt(grammar, 0)
    shadows = unconditional_shadow(nothing, np.array([1, 3, 1]))
    plain = engine.generate([request(grammar, ids, want=(TEXT,))])
    before = dict(engine.counts)
    guided = engine.generate([request(grammar, ids, want=(TEXT,), shadows=shadows)])
    assert guided[0].ids.tolist() == plain[0].ids.tolist()
    assert engine.counts["advance"] == before["advance"]


@pytest.mark.parametrize("hop", [1, 7, 1000])
def test_stream_gives_what_generate_gives(grammar, engine, hop):
    """Increments join to the replies; a part's last token ends an increment."""
    requests = mixed_requests(grammar, 1.0)
    joined = {i: [] for i in range(len(requests))}
    closing = {grammar.vocabulary.token(name) for name in ("</image>", "</audio>")}
    for increments in engine.stream(requests, hop):
        assert increments
        for i, ids in ((progress.number, progress.ids) for progress in increments):
            joined[i] += ids.tolist()
            assert 0 < len(ids) <= hop
            if requests[i].constrained:  # elsewhere the token may stand where it closes nothing
                assert not closing & set(ids[:-1].tolist())
    assert list(joined.values()) == [reply.ids.tolist() for reply in engine.generate(requests)]


@pytest.mark.parametrize("layouts", [PLAIN, SIZED, ONE, VIDEO], ids=["plain", "sized", "one", "video"])
def test_constrained_replies_parse_in_order_within_budget(layouts):
    """Over random weights, orders, budgets and seeds: replies are documents, with exactly the wanted parts."""
    grammar = make_grammar(layouts)
    model = make_model(grammar.vocabulary.size, depth=1, dim=16, heads=2, key_value_heads=1)
    draw = np.random.default_rng(0)
    requests = []
    for seed in range(256):
        want = None
        if seed % 4:
            want = draw.integers(len(grammar.modalities), size=draw.integers(1, 6)).tolist()
            want = tuple(m for i, m in enumerate(want) if m or not i or want[i - 1])
        fewest = 1 if want is None else 1 + sum(grammar.tables.minimum[m] for m in want)
        limit = int(fewest + draw.choice([0, 0, 1, 2, 5, 20]))
        ids = prompt(grammar, seed, *draw.choice(grammar.modalities, size=draw.integers(3)))
        requests.append(
            request(grammar, ids, max_tokens=limit, want=want, seed=seed, temperature=draw.choice([0, 1, 4]))
        )
    replies = Engine(make_decoder(model), grammar).generate(requests)
    for asked, reply in zip(requests, replies, strict=True):
        spans = [span for span in grammar.parse(np.concatenate([asked.ids, reply.ids])) if not span.context]
        assert reply.well_formed and len(reply.ids) <= asked.max_tokens
        if asked.want is not None:
            assert tuple(grammar.index(span.modality) for span in spans) == asked.want
            assert reply.ids[-1] == grammar.vocabulary.token("<eos>")
        else:
            ended = reply.ids[-1] == grammar.vocabulary.token("<eos>")
            assert ended or len(reply.ids) == asked.max_tokens


def test_unconstrained_replies_may_break_and_say_so(grammar, engine):
    """Without the mask, `well_formed` is what the parser finds, and never bos, turn or padding comes."""
    requests = [
        request(grammar, prompt(grammar, seed), seed=seed, constrained=False, max_tokens=9) for seed in range(64)
    ]
    replies = engine.generate(requests)
    never = {grammar.vocabulary.token(name) for name in ("<bos>", "<turn>", "<pad>")}
    used = 11 + 20 + 9 + 7 + 5
    for asked, reply in zip(requests, replies, strict=True):
        assert not never & set(reply.ids.tolist()) and reply.ids.max() < used
        try:
            grammar.parse(np.concatenate([asked.ids, reply.ids]))
            parses = True
        except OmniError:
            parses = False
        assert reply.well_formed == parses
    assert len({reply.well_formed for reply in replies}) == 2


@pytest.mark.parametrize("layouts", [PLAIN, SIZED], ids=["plain", "sized"])
def test_a_head_sliced_to_what_may_come_changes_nothing(layouts, monkeypatch):
    """Pictures, sounds and mixtures of all, guided and not, are those of the whole head; where all requests are inside
    of pictures, its product has the pictures' ids alone."""
    grammar = make_grammar(layouts)
    model = make_model(grammar.vocabulary.size)
    whole = Engine(make_decoder(model), grammar)
    monkeypatch.setattr(rules, "SLICED", 1)
    sliced = Engine(make_decoder(model), grammar)
    assert whole.programs._blocks == []
    names = ["</image>"] + (["<row>", "<2x2>", "<3x2>"] if layouts is SIZED else [])
    picture = [*grammar.vocabulary.block("image").tolist(), *map(grammar.vocabulary.token, names)]
    assert sliced.programs._blocks[0].ids.tolist() == sorted(picture)
    shadows = unconditional_shadow(prompt(grammar, 0), np.array([1, 3, 1.5], np.float32))
    pictures = [request(grammar, prompt(grammar, i, "text"), want=(IMAGE,), seed=i) for i in range(4)]
    guided = [replace(asked, shadows=shadows, temperature=np.zeros(3, np.float32)) for asked in pictures]
    sounds = [request(grammar, prompt(grammar, i, "image"), want=(AUDIO, IMAGE), seed=i, top_p=0.8) for i in range(3)]
    loose = [replace(pictures[0], want=None, constrained=False)]
    penalised = [replace(pictures[1], repetition_penalty=np.full(3, 1.5, np.float32))]
    for requests in (guided, sounds, [*pictures, *guided, *sounds, *loose, *penalised]):
        one, other = whole.generate(requests), sliced.generate(requests)
        assert [reply.ids.tolist() for reply in one] == [reply.ids.tolist() for reply in other]
