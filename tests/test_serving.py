"""Requests that arrive while others are answered, and turns of a chat."""

import dataclasses

import numpy as np
import pytest

import omni
from omni.prompts import Request, Turn
from omni_tokenizers.errors import OmniError, UsageError

PICTURE = np.full((8, 8, 3), 90, np.uint8)
SETTINGS = {"temperature": 1.0, "max_tokens": 16}


def requests(n: int) -> list[Request]:
    wants = [["image"], ["text"], ["text", "audio"], ["audio", "image"]]
    return [Request(["seven"] * (1 + i % 2), wants[i % 4], seed=i, **SETTINGS) for i in range(n)]


def test_a_server_answers_each_as_alone_while_others_arrive(tiny_model):
    """Ten through two slots, one arriving at every other step; events of each are in order and end with its reply."""
    server, waiting = tiny_model.serve(2), requests(10)
    server.warm_up(waiting)
    events: dict[int, list] = {}
    steps = 0
    while waiting or server.busy:
        if steps % 2 == 0 and waiting:
            assert server.add(waiting.pop(0)) == len(events)
            events[len(events)] = []
        for number, event in server.step():
            events[number].append(event)
        steps += 1
    for number, request in enumerate(requests(10)):
        alone = tiny_model.generate_batch([request])[0]
        assert events[number][-1].kind == "end"
        np.testing.assert_array_equal(events[number][-1].reply.ids, alone.ids)
        assert [event.index for event in events[number]] == sorted(event.index for event in events[number])


def test_what_is_cancelled_is_heard_of_no_more_and_disturbs_nobody(tiny_model):
    """One that waits, one that is being answered, and one that ended long ago; their slots serve others."""
    server, asked = tiny_model.serve(1), requests(3)
    numbers = [server.add(request) for request in asked]
    server.cancel(numbers[1])
    events = server.step()
    server.cancel(numbers[0])
    while server.busy:
        events += server.step()
    assert {number for number, _ in events} <= {numbers[0], numbers[2]}
    np.testing.assert_array_equal(events[-1][1].reply.ids, tiny_model.generate_batch([asked[2]])[0].ids)
    server.cancel(numbers[0])
    with pytest.raises(UsageError, match="one reply"):
        server.add(dataclasses.replace(asked[0], samples=2))


def test_a_chat_is_what_its_messages_are(tiny_model):
    """Each turn's reply is the one that the whole conversation, given as messages, gets; nothing is read twice."""
    chat, counts = tiny_model.chat("be brief"), tiny_model.engine.counts
    settings = {"guidance": 1.0, "max_tokens": 12, "temperature": 0.9}
    first = chat.send(["seven", PICTURE], want=["text", "image"], seed=1, **settings)
    before = counts["read"]
    second = chat.send("say it", want=["text"], seed=2, **settings)
    new = tiny_model.prompts.prepare([Request(["say it"])])[0].ids
    assert counts["read"] - before <= len(new) + 1  # its ids without bos; the turn, the reply's last token
    assert [message.role for message in chat.messages] == ["system", "user", "assistant", "user", "assistant"]

    said = [{"role": "system", "content": "be brief"}, {"role": "user", "content": ["seven", PICTURE]}]
    np.testing.assert_array_equal(first.ids, tiny_model.generate(said, want=["text", "image"], seed=1, **settings).ids)
    grammar, prompts = tiny_model.grammar, tiny_model.prompts
    opening, question = (
        prompts.turns([Request(parts)])[0][0] for parts in (["be brief", "seven", PICTURE], ["say it"])
    )
    said = Turn(None, tuple(first.parts), tuple(first.spans))
    whole = prompts.of_turns(Request([], ["text"], seed=2, **settings), [opening, said, question])
    np.testing.assert_array_equal(second.ids, tiny_model.engine.generate([whole])[0].ids)
    turns = [place for place, token in enumerate(whole.ids) if token == grammar.control["turn"]]
    assert len(turns) == 3 and turns[-1] == len(whole.ids) - 1


def test_messages_are_read_in_turns(tiny_model):
    """Each ends with a turn, the system's with the first user's; guidance drops texts of all of them."""
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "seven"}, {"type": "image", "image": PICTURE}]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "say it"},
    ]
    prepared = tiny_model.prepare([Request(messages, media_guidance=2.0)])[0]
    spans = tiny_model.grammar.parse(prepared.ids)
    assert [span.modality for span in spans] == ["text", "image", "text", "text"]
    assert [tiny_model.tokenizers["text"].decode(span.codes) for span in spans if span.modality == "text"] == [
        "be briefseven", "yes", "say it",
    ]  # fmt: skip
    assert sum(prepared.ids == tiny_model.grammar.control["turn"]) == 3 and all(span.context for span in spans)


def test_a_stream_that_is_left_leaves_no_trace(tiny_model):
    """The next message follows what was said before; the rest of the stream that was left gives nothing."""
    chat = tiny_model.chat()
    left = chat.stream("seven", want=["text", "image"], max_tokens=20)
    next(left)
    reply = chat.send("say", want=["text"], seed=3, max_tokens=9)
    assert list(left) == [] and [message.role for message in chat.messages] == ["user", "assistant"]
    np.testing.assert_array_equal(reply.ids, tiny_model.generate(["say"], want=["text"], seed=3, max_tokens=9).ids)


def test_what_goes_wrong_with_one_request_is_told_to_it_alone(tiny_model, monkeypatch):
    """Its stream ends with an error; the others' lose nothing."""
    tokenizer = tiny_model.tokenizers["image"]
    monkeypatch.setattr(tokenizer, "decode", lambda codes: (_ for _ in ()).throw(OmniError("no colours left")))
    server, asked = tiny_model.serve(2), requests(2)
    numbers = [server.add(request) for request in asked]
    events = [event for _ in range(99) if server.busy for event in server.step()]
    own = {number: [event for other, event in events if other == number] for number in numbers}
    assert [(event.kind, event.text) for event in own[0]] == [("error", "no colours left")]
    alone = tiny_model.generate_batch([asked[1]])[0]
    assert own[1][-1].reply.text == alone.text == "".join(event.text for event in own[1])
    assert not server.busy


def test_a_missing_tokenizer_is_told_on_arrival(tiny_model, monkeypatch):
    monkeypatch.delitem(tiny_model.tokenizers, "image")
    with pytest.raises(OmniError, match="without its image tokenizer"):
        tiny_model.serve(1).add(Request(["seven"], ["image"]))


def test_a_stream_left_between_two_events_of_one_step_leaves_no_trace(tiny_model):
    """A part and the end come together; what is left after the part is never kept."""
    chat = tiny_model.chat()
    left = chat.stream("seven", want=["text"], max_tokens=3)
    while next(left).kind != "part":
        pass
    chat.send("say", want=["text"], max_tokens=3)
    assert list(left) == [] and chat.messages[0].parts[0].text == "say" and len(chat.messages) == 2


def test_a_chat_has_the_room_that_it_is_given(tiny_model):
    """Replies of no given length take what is left of it; what does not fit is told by that number."""
    chat = tiny_model.chat(capacity=64)
    assert len(chat.send("hi", constrained=True, seed=1).ids) <= 64
    with pytest.raises(OmniError, match="there is room for at most 64"):
        chat.send("x" * 300)


def test_a_reply_that_is_no_document_is_given_and_not_kept(tiny_model):
    chat = tiny_model.chat()
    replies = [chat.send("seven", constrained=False, max_tokens=9, seed=seed, temperature=2.0) for seed in range(6)]
    kept = [reply for reply in replies if reply.well_formed]
    assert len(kept) < 6 and len(chat.messages) == 2 * len(kept)


def test_a_chat_says_what_is_wrong_and_stays_as_it_was(tiny_model):
    chat = tiny_model.chat()
    with pytest.raises(UsageError, match="unknown modality"):
        chat.send("seven", want=["smell"])
    with pytest.raises(OmniError, match="reads at most 128"):
        chat.send("x" * 300, want=["image"])
    with pytest.raises(UsageError, match="unknown type"):
        chat.send([{"type": "smell"}])
    with pytest.raises(UsageError, match="one reply"):
        chat.send("seven", samples=2)
    assert chat.messages == [] and chat.send("seven", want=["image"]).images
    assert isinstance(chat.messages[0], omni.Message)
