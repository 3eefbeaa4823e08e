"""What tokens cost the model: many documents at once beside one at a time."""

import numpy as np
import pytest
from flax import nnx

from omni import likelihood
from omni.bundle import Model
from omni.grammar import Span
from omni.model import Transformer, TransformerConfig

SIZES = ((1, 1), (17, 6), (40, 2), (59, 6))
"""Tokens of text and frames of sound: few, since each length is compiled where a document stands alone."""


def draw_documents(model, count, seed=0):
    """Documents of a text, a sound and a picture."""
    random = np.random.default_rng(seed)
    documents = []
    for number in range(count):
        letters, frames = SIZES[number % len(SIZES)]
        text = Span("text", random.integers(0, 40, letters), context=True)
        sound, picture = random.integers(0, 8, (2, 1, frames)), random.integers(0, 16, (1, 2, 2))
        documents.append(model.grammar.pack([text, Span("audio", sound), Span("image", picture)]))
    return documents


def alone(model, document):
    """Nats of each token of one document, from the logits of a row that holds nothing else, in float64."""
    logits = model.logits(document.ids[None])[0].astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return np.array([0.0, *(-log_probabilities[i, token] for i, token in enumerate(document.ids[1:]))])


@pytest.fixture(scope="module", params=["dense", "experts"])
def model(request, tiny_model):
    """Random weights: those of the other tests, and experts with positions of three coordinates."""
    if request.param == "dense":
        return tiny_model
    shape = {"vocabulary_size": tiny_model.vocabulary.size, "depth": 1, "dim": 32, "heads": 2, "key_value_heads": 2}
    more = {"head_dim": 16, "mlp_dim": 32, "rope": "time_row_column", "experts": 4, "tied_embeddings": False}
    transformer = Transformer(TransformerConfig(**shape, **more), rngs=nnx.Rngs(3))
    parts = (tiny_model.vocabulary, tiny_model.grammar, tiny_model.tokenizers)
    return Model(transformer, *parts, context_length=128)


def test_many_at_once_cost_what_each_costs_alone(model, monkeypatch):
    """Whatever stands beside a document, and however far its row is filled up."""
    monkeypatch.setattr(likelihood, "BATCH_TOKENS", 256)  # several batches of each length
    documents = draw_documents(model, 14)
    found = model.token_losses(documents)
    assert [len(nats) for nats in found] == [len(document.ids) for document in documents]
    for document, nats in zip(documents, found, strict=True):
        np.testing.assert_allclose(nats, alone(model, document), rtol=0, atol=2e-5)
    assert np.std(np.concatenate(found)) > 0.1  # it is not that all tokens cost the same


def test_few_shapes(tiny_model, monkeypatch):
    """Rows are filled up to few lengths, batches to few sizes, and no batch holds more tokens than it may."""
    shapes = []
    losses = likelihood._losses
    monkeypatch.setattr(likelihood, "_losses", lambda *given: (shapes.append(given[1].shape), losses(*given))[1])
    monkeypatch.setattr(likelihood, "BATCH_TOKENS", 512)
    tiny_model.token_losses(draw_documents(tiny_model, 40))
    assert {length for _, length in shapes} == {64, 128}
    assert all(rows * length <= 512 and rows & (rows - 1) == 0 for rows, length in shapes)
    assert len(shapes) > len(set(shapes)) and len(set(shapes)) <= 2 * 4


def test_nothing_costs_nothing(tiny_model):
    assert tiny_model.token_losses([]) == []
