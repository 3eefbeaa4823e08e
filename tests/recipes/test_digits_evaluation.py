"""What the digits recipe hands to evaluation."""

from collections import Counter

import numpy as np

from omni.data.shards import write_shards
from omni.grammar import Grammar, Span
from omni.recipes import digits_documents
from omni.recipes.digits_evaluation import held_out_requests, trained_codes
from omni.vocabulary import Vocabulary


def test_requests_are_held_out_and_mixed():
    """No request is one that training draws, and the first 300 ask for one, two and three parts of every digit."""
    requests = held_out_requests()
    assert not {r.text for r in requests} & {r.text for r in digits_documents.requests("train")}
    assert len({r.text for r in requests}) == len(requests) >= 1000
    first = Counter(len(request.order) for request in requests[:300])
    assert min(first[1], first[2], first[3]) >= 30
    assert {request.label for request in requests[:300]} == set(range(10))
    assert requests == held_out_requests()


def test_trained_codes_are_all_codes_once(tmp_path):
    """Every picture of the training documents is found, in whatever part, and the same picture counts once."""
    names = ("<bos>", "<turn>", "<eos>", "<pad>", "<i>", "</i>")
    vocabulary = Vocabulary.build({"text": 4, "image": 8}, names)
    control = {name: f"<{name}>" for name in ("bos", "turn", "eos", "pad")}
    image = {"codebooks": ["image"], "open": ["<i>"], "close": ["</i>"], "shapes": [{"rows": 1, "columns": 2}]}
    declaration = {"format": 1, "control": control, "modalities": {"text": {"block": "text"}, "image": image}}
    grammar = Grammar(declaration, vocabulary)
    pictures = [np.array([[pair]], np.int32) for pair in ((0, 1), (2, 3), (4, 5))]

    def document(given: int, wanted: int):
        return grammar.pack([Span("image", pictures[given], True), Span("image", pictures[wanted])])

    write_shards(tmp_path / "tokens", [document(0, 1), document(1, 2), document(2, 2)], vocabulary, grammar, {})
    found = trained_codes(tmp_path / "tokens")
    assert sorted(codes.ravel().tolist() for codes in found["image"]) == [[0, 1], [2, 3], [4, 5]]
    assert set(found) == {"image"}
