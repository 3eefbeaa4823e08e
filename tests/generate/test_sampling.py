"""Sampling by definition: against sorts in float64, and as a distribution."""

import jax
import jax.numpy as jnp
import numpy as np
from reference import choose

from omni.generate.sampling import _search, draw, sample


def test_agrees_with_the_definition():
    """Mask, temperature, top-k, top-p, min-p and draw, every row with its own settings."""
    random = np.random.default_rng(0)
    rows, size = 512, 300
    logits = random.normal(size=(rows, size)).astype(np.float32) * 3
    admitted = random.random((rows, size)) < random.choice([0.02, 0.5, 1], size=(rows, 1))
    admitted[:, 7] = True
    temperature = random.choice([0, 0.3, 1, 2], size=rows).astype(np.float32)
    top_k = random.choice([0, 1, 5, 1000], size=rows)
    top_p = random.choice([0.1, 0.6, 0.95, 1], size=rows).astype(np.float32)
    min_p = random.choice([0, 0.05, 0.5, 1], size=rows).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), rows)
    uniform = np.asarray(jax.vmap(jax.random.uniform)(keys), np.float64)
    got, log_probabilities = jax.jit(sample)(logits, admitted, keys, temperature, jnp.asarray(top_k), top_p, min_p)
    settings = temperature, top_k, top_p, min_p
    expected = [choose(*row) for row in zip(logits, admitted, uniform, *settings, strict=True)]
    assert got.tolist() == [token for token, _ in expected]
    np.testing.assert_allclose(log_probabilities, [log_probability for _, log_probability in expected], atol=1e-4)


def test_draws_follow_the_weights_and_never_take_what_has_none():
    """Frequencies over a grid of uniform numbers are the probabilities; weightless ids never come, even at the ends."""
    random = np.random.default_rng(1)
    weights = random.random(400).astype(np.float32) * (random.random(400) < 0.3)
    weights[:130] = weights[-140:] = 0  # a whole empty block at either end
    uniform = np.append(np.linspace(0, 1, 200_000, endpoint=False, dtype=np.float32), np.nextafter(np.float32(1), 0))
    ids = jax.lax.map(lambda u: draw(jnp.asarray(weights)[None], u[None])[0], jnp.asarray(uniform), batch_size=1000)
    counts = np.bincount(np.asarray(ids), minlength=400)
    assert not counts[weights == 0].any()
    np.testing.assert_allclose(counts / len(uniform), weights / weights.sum(), atol=2e-5)


def test_greedy_takes_the_first_of_equals():
    """At temperature 0 ties go to the lowest id, whatever the key."""
    logits = np.zeros((4, 200), np.float32)
    logits[:, [150, 160]] = 2
    keys = jax.random.split(jax.random.key(3), 4)
    got, _ = sample(
        logits, np.ones_like(logits, bool), keys, jnp.zeros(4), jnp.zeros(4, int), jnp.ones(4), jnp.zeros(4)
    )
    assert got.tolist() == [150] * 4


def test_rounding_below_zero_takes_no_weightless_id():
    """A target that rounding left just below 0 finds the first positive weight, one beyond the sum the last."""
    weights = jnp.array([[0, 0, 1, 0, 2, 0]], jnp.float32)
    found = [int(_search(weights, jnp.array([target], jnp.float32))[0][0]) for target in (-1e-7, 0, 1, 3, 4)]
    assert found == [2, 2, 4, 4, 4]
