"""Mixtures of shard sets: shares of tokens, each set in its own order, one index as the position, for any processes."""

import grain
import numpy as np
import pytest
from documents import make_documents, make_grammar

from omni.data.loader import PackedRows, batches, mixed_rows, stack
from omni.data.shards import TokenShards, write_shards
from omni_tokenizers.errors import OmniError, UsageError

ROW_LENGTH = 40
SHARES = (0.5, 0.3, 0.2)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Three sets of 60, 35 and 20 documents, none of which is in two."""
    grammar, root = make_grammar(), tmp_path_factory.mktemp("mixtures")
    counts = (60, 35, 20)
    documents = {document.ids.tobytes(): document for document in make_documents(grammar, 400)}
    documents = list(documents.values())[: sum(counts)]
    parts = np.split(np.arange(len(documents)), np.cumsum(counts)[:-1])
    return [
        TokenShards(write_shards(root / f"{i}", [documents[j] for j in part], grammar.vocabulary, grammar, {}))
        for i, part in enumerate(parts)
    ]


@pytest.fixture(scope="module")
def mixture(sets):
    return mixed_rows(list(zip(sets, SHARES, strict=True)), ROW_LENGTH, seed=3)


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


def documents_of(row) -> list[bytes]:
    return [row["ids"][row["segments"] == segment].tobytes() for segment in range(1, row["segments"].max() + 1)]


def origins(sets) -> dict[bytes, int]:
    return {shards[i]["ids"].tobytes(): place for place, shards in enumerate(sets) for i in range(len(shards))}


def test_tokens_come_by_share(sets, mixture):
    """Over many rows the tokens of each set have its share to a hundredth, and never stray far from it on the way."""
    origin, tokens = origins(sets), np.zeros(len(sets))
    for number in range(1, 601):
        row = mixture[number - 1]
        place = {origin[document] for document in documents_of(row)}
        assert len(place) == 1
        tokens[place.pop()] += (row["segments"] > 0).sum()
        if number % 100 == 0:
            np.testing.assert_allclose(tokens / tokens.sum(), SHARES, atol=3 / number + 0.01)
    np.testing.assert_allclose(tokens / tokens.sum(), SHARES, atol=0.01)


def test_no_set_loses_or_repeats_a_document(sets, mixture):
    """Each set goes through its documents once an epoch of its own, whatever the others do."""
    origin, read = origins(sets), [[] for _ in sets]
    for number in range(400):
        for document in documents_of(mixture[number]):
            read[origin[document]].append(document)
    for shards, found in zip(sets, read, strict=True):
        whole = sorted(shards[i]["ids"].tobytes() for i in range(len(shards)))
        epochs = len(found) // len(shards)
        assert epochs >= 2
        for epoch in range(epochs):
            assert sorted(found[epoch * len(shards) : (epoch + 1) * len(shards)]) == whole


def test_one_set_is_read_as_ever(sets):
    """A mixture of one is `PackedRows`, on whose order finished runs depend; so is the first of several."""
    rows = PackedRows(sets[0], ROW_LENGTH, seed=3)
    alone = mixed_rows([(sets[0], 1.0)], ROW_LENGTH, seed=3)
    assert all(same(alone[i], rows[i]) for i in range(3 * rows.packing.rows))
    assert sets[0][rows.packing.epoch(0)[0][0]]["ids"].tobytes() == documents_of(rows[0])[0]


def test_sets_are_not_shuffled_alike(sets):
    """The same documents twice, as one in two directions would be, come in different orders."""
    twice = mixed_rows([(sets[0], 1.0), (sets[0], 1.0)], ROW_LENGTH, seed=3)
    assert not all(same(twice[2 * i], twice[2 * i + 1]) for i in range(5))


def test_restored_at_every_position_it_goes_on_the_same(sets, mixture):
    """From the state at every position of an epoch of the largest set, all that follows is bit-equal."""
    count = 2 * PackedRows(sets[0], ROW_LENGTH, seed=3).packing.rows + 3
    dataset = batches(mixture, batch_size=1)
    undisturbed, states, iterator = [], [], iter(dataset)
    for _ in range(count):
        states.append(iterator.get_state())
        undisturbed.append(next(iterator))
    for position, state in enumerate(states):
        iterator = iter(batches(mixed_rows(list(zip(sets, SHARES, strict=True)), ROW_LENGTH, seed=3), batch_size=1))
        iterator.set_state(state)
        for expected in undisturbed[position:]:
            assert same(next(iterator), expected)
    assert len({str(state) for state in states}) == count


@pytest.mark.parametrize("processes", [2, 4])
def test_order_does_not_depend_on_processes(mixture, processes):
    """The batches of all processes, joined, are the global batches."""
    size = 8
    share = size // processes
    readers = [iter(batches(mixture, size, range(p * share, (p + 1) * share))) for p in range(processes)]
    for step in range(10):
        parts = [next(reader) for reader in readers]
        joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        assert same(joined, stack([mixture[step * size + row] for row in range(size)]))
    assert len({str(reader.get_state()) for reader in readers}) == 1


def test_shares_that_cannot_be_are_refused(sets):
    """None, negative, no number."""
    for share in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="numbers above 0"):
            mixed_rows([(sets[0], 1.0), (sets[1], share)], ROW_LENGTH, 0)
    with pytest.raises(OmniError, match="longer rows"):
        mixed_rows([(sets[0], 1.0), (sets[1], 1.0)], 3, 0)
    assert isinstance(mixed_rows([(sets[0], 0.1)], ROW_LENGTH, 0), grain.MapDataset)
