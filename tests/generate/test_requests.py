"""Requests that cannot be answered are refused in one line before anything runs."""

import numpy as np
import pytest
from reference import AUDIO, IMAGE, PLAIN, TEXT, make_grammar, make_model, prompt, request

from omni.generate import Engine, Shadow, per_modality, unconditional_shadow, wanted_modalities
from omni.model import make_decoder
from omni_tokenizers.errors import OmniError, UsageError


@pytest.fixture(scope="module")
def grammar():
    return make_grammar(PLAIN)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"want": (IMAGE, AUDIO), "max_tokens": 10}, "image, audio take at least 11 tokens"),
        ({"want": (IMAGE, TEXT, TEXT)}, "text twice"),
        ({"want": ()}, "empty"),
        ({"want": (3,)}, "indices"),
        ({"want": (IMAGE,), "constrained": False}, "constraint"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1.0}, "temperature of text is -1.0"),
        ({"temperature": (1.0, np.nan, 1.0)}, "temperature of image"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"stop_tokens": (3, 9999)}, r"stop_tokens are ids in 0\.\.\d+, not 9999"),
        ({"min_p": 1.5}, "min_p of text is 1.5"),
        ({"repetition_penalty": (1, 0, 1)}, "repetition_penalty of image is 0.0"),
        ({"shadows": (Shadow(np.array([0, 1]), np.array([0, np.inf, 0])),)}, "guidance"),
    ],
)
def test_usage_errors(grammar, changes, message):
    """A request out of range is a UsageError that names what is wrong, and no good request beside it runs."""
    engine = Engine(make_decoder(make_model(grammar.vocabulary.size)), grammar)
    good = request(grammar, prompt(grammar, 0, "text"))
    with pytest.raises(UsageError, match=message):
        engine.generate([good, request(grammar, prompt(grammar, 0, "text"), **changes)])
    assert not engine.counts


def test_longer_than_the_context(grammar):
    """Prompt and budget (the shadow's prompt too) must fit the context."""
    engine = Engine(make_decoder(make_model(grammar.vocabulary.size)), grammar, context=30)
    ids = prompt(grammar, 0, "image", "image")
    shadow = unconditional_shadow(ids, np.array([3, 3, 3]))
    for asked in (request(grammar, ids, 17), request(grammar, prompt(grammar, 0), 17, shadows=shadow)):
        with pytest.raises(OmniError, match="14 tokens and the reply may have 17, but the model reads at most 30"):
            engine.generate([asked])
    assert not engine.counts
    assert len(engine.generate([request(grammar, ids, 16)])) == 1


def test_names_to_indices(grammar):
    """Unknown modalities are refused with the nearest known one; settings fall back to their default."""
    assert wanted_modalities(grammar, ["audio", "text"]) == (AUDIO, TEXT)
    assert wanted_modalities(grammar, None) is None
    with pytest.raises(UsageError, match=r"unknown modality 'imgae'.*did you mean 'image'"):
        wanted_modalities(grammar, ["imgae"])
    assert per_modality(grammar, {"image": 3}, 1.0, "guidance").tolist() == [1, 3, 1]
    assert per_modality(grammar, 2, 1.0, "guidance").tolist() == [2, 2, 2]
    with pytest.raises(UsageError, match="guidance: unknown modality 'video'"):
        per_modality(grammar, {"video": 3}, 1.0, "guidance")
