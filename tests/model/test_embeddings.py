"""Embedding rows that begin as projections of the codes' vectors."""

import jax
import jax.numpy as jnp
import numpy as np

from omni.model.embeddings import start_from_codebook

IDS = np.arange(10, 74)


def rows(share: float):
    embedding = jax.random.normal(jax.random.key(0), (100, 256)) / 16
    vectors = np.random.default_rng(1).normal(size=(64, 8)) * np.linspace(0.5, 3, 8) + 5
    return embedding, vectors, start_from_codebook(embedding, IDS, jnp.asarray(vectors), share, jax.random.key(1))


def distances(x):
    return np.linalg.norm(x[:, None] - x[None], axis=-1)[np.triu_indices(len(x), 1)]


def test_distances_of_codes_become_distances_of_rows():
    """The more the share, the closer distances of rows follow those of code vectors; other rows stay as they were."""
    correlations = []
    for share in (0.0, 0.5, 0.9):
        embedding, vectors, started = rows(share)
        correlations.append(np.corrcoef(distances(vectors), distances(np.asarray(started)[IDS]))[0, 1])
        others = np.setdiff1d(np.arange(100), IDS)
        np.testing.assert_array_equal(started[others], embedding[others])
    assert abs(correlations[0]) < 0.3 and correlations[1] > 0.6 and correlations[2] > 0.8


def test_rows_keep_their_size():
    """Whatever the share and the vectors' scale, rows are as long as they were drawn, on average."""
    for share in (0.0, 0.5, 1.0):
        embedding, _, started = rows(share)
        np.testing.assert_allclose(jnp.square(started[IDS]).mean(), jnp.square(embedding).mean(), rtol=0.25)
