"""The training forward against an obvious reference, and the properties that training relies on."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from transformer_cases import TINY, VARIANTS, apply_model, batch, noisy_model
from transformer_reference import features, forward

from omni.model import Transformer
from omni.model.config import TENSORS
from omni.model.positions import rotate, rotation
from omni_tokenizers.errors import UsageError


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_equals_reference(name):
    """Every variant computes what the obvious float64 transformer computes, padding included."""
    config, (ids, positions, segments) = VARIANTS[name], batch()
    model = noisy_model(config)
    logits = apply_model(model, ids, positions, segments)
    parameters = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    expected = np.stack([forward(config, parameters, *row) for row in zip(ids, positions, segments, strict=True)])
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("block", [3, 1024])
def test_what_the_flight_recorder_is_told(block):
    """Each token's largest attention logit of all blocks and heads, and the length of its stream before the last norm,
    are those of the reference, however many queries are read at once."""
    config, (ids, positions, segments) = dataclasses.replace(TINY, attention_blocks=(block, 1)), batch()
    model = noisy_model(config)
    found = nnx.jit(Transformer.features)(model, ids, positions, segments)
    parameters = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    rows = [features(config, parameters, *row) for row in zip(ids, positions, segments, strict=True)]
    _, norms, largest = map(np.stack, zip(*rows, strict=True))
    np.testing.assert_allclose(found.norms, norms, rtol=1e-5)
    np.testing.assert_allclose(found.largest_logits, largest, rtol=1e-4, atol=1e-5)


def test_segments_are_independent():
    """What stands in another segment, later, or in padding changes nothing."""
    ids, positions, segments = batch()
    model = noisy_model(TINY)
    logits = apply_model(model, ids, positions, segments)
    for start, stop, kept in ((0, 5, slice(5, 9)), (6, 11, slice(0, 6)), (9, 11, slice(0, 9))):
        changed = ids.copy()
        changed[:, start:stop] = (changed[:, start:stop] + 7) % TINY.vocabulary_size
        after = apply_model(model, changed, positions, segments)
        np.testing.assert_array_equal(after[:, kept], logits[:, kept])
        assert np.abs(after[:, start:stop] - logits[:, start:stop]).max() > 0.1


def test_gradients_finite_with_padding():
    """Rows of padding alone give finite logits and gradients."""
    ids, positions, segments = batch()
    graphdef, state = nnx.split(noisy_model(TINY))

    def loss(state):
        logits = nnx.merge(graphdef, state)(ids, positions, segments * np.array([[1], [0]]))
        return jax.nn.logsumexp(logits, axis=-1).mean()

    value, gradients = jax.jit(jax.value_and_grad(loss))(state)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


def test_rotation_sees_only_differences():
    """A query and a key meet at an angle of their difference in position, in each coordinate."""
    config = VARIANTS["pre rms"]
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, config.head_dim))
    place = lambda *position: rotation(config, jnp.array([[position]]))  # noqa: E731
    score = lambda a, b: float((rotate(query, place(*a)) * rotate(key, place(*b))).sum())  # noqa: E731
    near = score((3, 5, 2), (1, 1, 1))
    assert near == pytest.approx(score((13, 25, 32), (11, 21, 31)), abs=1e-4)
    for moved in ((4, 5, 2), (3, 6, 2), (3, 5, 3)):
        assert abs(near - score(moved, (1, 1, 1))) > 1e-3


def test_remat_changes_nothing():
    """Recomputation gives the same loss and gradients."""
    ids, positions, segments = batch()
    state = nnx.state(noisy_model(TINY))

    @partial(jax.jit, static_argnums=(1, 2))
    @jax.value_and_grad
    def gradient(state, remat, saved=()):
        config = dataclasses.replace(TINY, remat=remat, saved=saved)
        model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
        nnx.update(model, state)
        return jnp.square(model(ids, positions, segments)).mean()

    plain = gradient(state, "none")
    for remat in (("blocks",), ("dots",), ("blocks", ("attention",)), ("blocks", TENSORS)):
        close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6, err_msg=str(remat))
        jax.tree.map(close, gradient(state, *remat), plain)


def test_dropout_needs_a_key():
    """No key, no dropout; one key, one outcome; another key, another."""
    ids, positions, segments = batch()
    model = noisy_model(dataclasses.replace(TINY, dropout=0.5))
    call = lambda key: np.asarray(apply_model(model, ids, positions, segments, dropout_key=key))  # noqa: E731
    np.testing.assert_array_equal(call(None), apply_model(noisy_model(TINY), ids, positions, segments))
    np.testing.assert_array_equal(call(jax.random.key(1)), call(jax.random.key(1)))
    assert np.abs(call(jax.random.key(1)) - call(jax.random.key(2))).max() > 0.1
    assert np.abs(call(jax.random.key(1)) - call(None)).max() > 0.1


def test_bfloat16_compute():
    """bfloat16 is a policy of use: parameters and logits stay float32, and the logits come near."""
    ids, positions, segments = batch()
    model = noisy_model(dataclasses.replace(TINY, compute_dtype="bfloat16"))
    logits = apply_model(model, ids, positions, segments)
    expected = apply_model(noisy_model(TINY), ids, positions, segments)
    assert logits.dtype == jnp.float32
    assert {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(model))} == {"float32"}
    difference = np.abs(logits - expected).max()
    assert 1e-4 < difference < 0.1 * np.abs(expected).max()


def test_initial_scale():
    """At the start logits are of order one, and residual outputs shrink with depth."""
    config = dataclasses.replace(TINY, dim=128, depth=8)
    model = Transformer(config, rngs=nnx.Rngs(0))
    ids, positions, segments = batch(rows=4)
    assert 0.5 < float(jnp.std(apply_model(model, ids, positions, segments))) < 2
    weights = model.blocks.weights()
    deviation = lambda name, inputs: float(jnp.std(weights[name])) * np.sqrt(inputs)  # noqa: E731
    assert deviation("gate", 128) == pytest.approx(0.88, abs=0.05)
    assert deviation("down", config.mlp_dim) == pytest.approx(0.88 / 4, abs=0.03)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_parameters_name_their_axes(config):
    """Every parameter, abstract ones too, has a logical axis per dimension, "layers" first where stacked.

    None is weakly typed: the first update would change its type and compile the step again.
    """
    abstract = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    state = nnx.state(abstract, nnx.Param)
    for path, variable in nnx.to_flat_state(state):
        assert len(variable.get_metadata()["axes"]) == len(variable.get_value().shape), path
        assert (variable.get_metadata()["axes"][0] == "layers") == (path[0] == "blocks"), path
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
    assert not jax.tree.leaves(nnx.state(abstract, nnx.Not(nnx.Param)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"heads": 3}, "no multiple"),
        ({"head_dim": 7}, "odd"),
        ({"rope": "spiral"}, "choose one of time, time_row_column"),
        ({"depth": 0}, "at least 1"),
        ({"dropout": 1.0}, "below 1"),
    ],
)
def test_bad_configuration(change, said):
    """A configuration that cannot be built is refused in one line."""
    with pytest.raises(UsageError, match=said):
        dataclasses.replace(TINY, **change)
