"""Replies as events: what comes in pieces is what comes whole, in order and in time."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from omni.bundle import Model
from omni.grammar import Grammar, Span
from omni_tokenizers import AudioTokenizer, ImageTokenizer
from omni_tokenizers.audio import SpectralCodec
from omni_tokenizers.errors import UsageError
from omni_tokenizers.image import ImageTokenizerConfig, ImageVQ

ROWS = 4


@pytest.fixture(scope="module")
def streaming_model(tiny_model) -> Model:
    """The tiny model with a causal codec, and sounds of 8 frames and more."""
    sound = dataclasses.replace(tiny_model.tokenizers["audio"].config, causal=True)
    declaration = tiny_model.grammar.to_json()
    modalities = declaration["modalities"] | {
        "audio": declaration["modalities"]["audio"] | {"shapes": [{"columns": {"min": 8, "max": 24}}]},
    }
    grammar = Grammar(declaration | {"modalities": modalities}, tiny_model.vocabulary)
    tokenizers = tiny_model.tokenizers | {"audio": AudioTokenizer(sound, SpectralCodec(sound, rngs=nnx.Rngs(1)))}
    pieces = tiny_model.transformer, tiny_model.vocabulary, grammar, tokenizers
    return Model(*pieces, context_length=128, generation=tiny_model.generation)


def by_kind(events, kind: str) -> list:
    return [event for event in events if event.kind == kind]


@pytest.mark.parametrize("seconds", [0.04, 0.1, 5])
def test_pieces_of_sound_are_the_whole_sound(streaming_model, seconds):
    """Whatever their length, in the order of the parts, and for two sounds in one reply."""
    settings = {"want": ["audio", "text", "audio"], "seed": 2, "max_tokens": 110, "temperature": {"audio": 2.0}}
    events = list(streaming_model.stream(["say"], sound_seconds=seconds, **settings))
    whole = streaming_model.generate(["say"], **settings)
    assert [event.index for event in events] == sorted(event.index for event in events)
    for index in (0, 2):
        pieces = [event.part.samples for event in by_kind(events, "sound") if event.index == index]
        np.testing.assert_allclose(np.concatenate(pieces, 1), whole.parts[index].samples, atol=1e-4)
        assert by_kind(events, "part")[index].part.samples.shape == whole.parts[index].samples.shape
        frames = whole.parts[index].samples.shape[1] // streaming_model.tokenizers["audio"].samples_per_frame
        assert frames >= 8 and len(pieces) > 2 if seconds < 1 else len(pieces) == 1


def test_the_first_sound_does_not_wait_for_the_last_token(streaming_model):
    """It comes within one and a half chunks of tokens and what opens the sound."""
    model, chunk = streaming_model, 2 * 2  # codebooks x frames
    before = model.engine.counts["steps"]
    settings = {"want": ["audio"], "seed": 2, "max_tokens": 60, "temperature": 2.0}
    for event in model.stream(["say"], sound_seconds=0.08, **settings):
        if event.kind == "sound":
            assert model.engine.counts["steps"] - before <= 1.5 * chunk + 1
            break
    assert event.kind == "sound"
    whole = model.generate(["say"], **settings)
    assert len(whole.ids) > 4 * chunk


def test_sound_of_a_codec_that_is_not_causal_comes_whole(tiny_model):
    """And so does any where no pieces are asked for."""
    events = list(tiny_model.stream(["say"], want=["audio"], seed=1))
    assert [event.kind for event in events] == ["part", "end"]


def test_pictures_come_row_by_row(tiny_model):
    """The rows of codes so far are those of the whole picture; a decoder that sees one row shows their final pixels."""
    config = ImageTokenizerConfig(image_size=16, patch_size=4, channels=8, codebook_size=16, code_dim=4)
    picture = ImageTokenizer(config, ImageVQ(config, rngs=nnx.Rngs(0)))
    shown = []

    def rows_alone(codes: np.ndarray) -> np.ndarray:
        shown.append(np.array(codes))
        return np.repeat(np.repeat(codes.astype(np.uint8)[..., None] * 9, 4, 1), 4, 2).repeat(3, -1)

    picture.decode = rows_alone
    declaration = tiny_model.grammar.to_json()
    image = declaration["modalities"]["image"] | {"shapes": [{"rows": ROWS, "columns": ROWS}]}
    grammar = Grammar(declaration | {"modalities": declaration["modalities"] | {"image": image}}, tiny_model.vocabulary)
    pieces = tiny_model.transformer, tiny_model.vocabulary, grammar, tiny_model.tokenizers | {"image": picture}
    model = Model(*pieces, context_length=128)
    events = list(model.stream(["draw"], want=["image"], picture_rows=1, seed=3))
    whole = by_kind(events, "part")[0].part
    partial = [event.part.pixels for event in by_kind(events, "rows")]
    assert [pixels.shape for pixels in partial] == [(4 * rows, 16, 3) for rows in (1, 2, 3)]
    for pixels in partial:
        np.testing.assert_array_equal(pixels, whole.pixels[: len(pixels)])
    assert len(np.unique(shown[-1])) > 4 and [event.kind for event in events] == ["rows"] * 3 + ["part", "end"]
    coarse = list(model.stream(["draw"], want=["image"], picture_rows=2, seed=3))
    assert [event.part.pixels.shape[0] for event in by_kind(coarse, "rows")] == [8]


def test_the_end_holds_the_whole_reply(tiny_model):
    """Its parts are the very ones that came, its ids and spans those that `generate` gives."""
    settings = {"want": ["text", "image", "audio"], "seed": 5, "log_probabilities": True}
    events = list(tiny_model.stream(["seven"], **settings))
    whole, reply = tiny_model.generate(["seven"], **settings), events[-1].reply
    assert all(own is event.part for own, event in zip(reply.parts, by_kind(events, "part"), strict=True))
    np.testing.assert_array_equal(reply.ids, whole.ids)
    assert reply.well_formed and [span.modality for span in reply.spans] == ["text", "image", "audio"]


@pytest.mark.parametrize("setting", [{"picture_rows": -1}, {"picture_rows": 1.5}, {"sound_seconds": float("nan")}])
def test_pieces_of_impossible_size_are_refused(tiny_model, setting):
    with pytest.raises(UsageError, match=r"picture_rows is a whole number"):
        tiny_model.stream(["seven"], **setting)


def test_what_has_begun_of_a_span(tiny_model):
    """The codes that are there stand in their places at every length; the rest of the smallest size is open."""
    grammar = tiny_model.grammar
    for span in (
        Span("image", np.arange(4, dtype=np.int32).reshape(1, 2, 2)),
        Span("audio", np.arange(8, dtype=np.int32).reshape(2, 1, 4) % 8),
    ):
        ids = np.concatenate([grammar.prompt([]), grammar.span_ids(span)])
        states = grammar.annotate(ids)
        assert grammar.begun(ids, states) is None and grammar.begun(ids[:2], states[:2]) is None
        for length in range(3, len(ids)):
            begun = grammar.begun(ids[:length], states[:length])
            known = begun.codes >= 0
            assert begun.modality == span.modality and known.sum() == min(length - 3, span.codes.size)
            own = span.codes[..., : begun.codes.shape[-1]]
            np.testing.assert_array_equal(begun.codes[known], own[known])
