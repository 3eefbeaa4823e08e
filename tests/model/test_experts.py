"""A mixture of experts against one token after another."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from transformer_cases import TINY, batch, noisy_model

from omni.model import TransformerConfig, apply_decoder, init_cache, make_decoder
from omni.model.experts import Routing, mixture, routing
from omni.model.files import settings_of_the_model
from omni_tokenizers.base import config_from_dict
from omni_tokenizers.errors import UsageError

EXPERTS = dataclasses.replace(TINY, experts=5, experts_per_token=2)
GROUPED = dataclasses.replace(EXPERTS, expert_groups=((0, 2), (30, 3)))
EVERY = Routing(jnp.ones((3, 7), bool), None)


def layer(config):
    return {name: weight[0] for name, weight in noisy_model(config).blocks.weights().items()}


def one_by_one(config, weights, x):
    """The mixture of each token, in float64, and the routers' terms, of a model without groups."""
    weights = {name: np.asarray(weight, np.float64) for name, weight in weights.items()}
    y, used, logits = np.zeros(x.shape), np.zeros(config.experts), []
    for place in np.ndindex(x.shape[:2]):
        token = np.float64(x[place])
        logits.append(token @ weights["router"])
        probabilities = np.exp(logits[-1]) / np.exp(logits[-1]).sum()
        chosen = np.argsort(-probabilities)[: config.experts_per_token]
        for expert in chosen:
            gate, up = (token @ weights[name][expert] for name in ("gate", "up"))
            read = gate / (1 + np.exp(-gate)) * up @ weights["down"][expert]
            y[place] += probabilities[expert] / probabilities[chosen].sum() * read
            used[expert] += 1 / config.experts_per_token / np.prod(x.shape[:2])
    logits = np.array(logits)
    mean = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).mean(0)
    terms = {"balance": config.experts * (used * mean).sum(), "router_z": (np.log(np.exp(logits).sum(1)) ** 2).mean()}
    return y, terms


@pytest.mark.parametrize("per_token", [1, 2, 5])
def test_every_token_goes_through_its_experts(per_token):
    """No token is dropped, however unevenly the experts are used."""
    config = dataclasses.replace(EXPERTS, experts_per_token=per_token)
    weights = layer(config)
    weights["router"] = weights["router"].at[:, 0].add(0.5)
    x = np.random.default_rng(1).normal(size=(3, 7, TINY.dim)).astype(np.float32)
    y, terms = jax.jit(lambda x: mixture(config, weights, x, EVERY))(x)
    expected, expected_terms = one_by_one(config, weights, x)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    for name, value in expected_terms.items():
        assert float(terms[name]) == pytest.approx(value, rel=1e-5), name


def test_groups_and_padding():
    """A token goes through experts of its modality's group alone, as in a loop over groups that know nothing of one
    another; the balance is that of each group by its share of the tokens, and padding has no part in it."""
    weights, random = layer(GROUPED), np.random.default_rng(3)
    x = random.normal(size=(3, 7, TINY.dim)).astype(np.float32)
    ids = random.integers(0, TINY.vocabulary_size, (3, 7))
    segments = np.array([[1] * 7, [1] * 4 + [0] * 3, [0] * 7])
    y, terms = jax.jit(lambda x: mixture(GROUPED, weights, x, routing(GROUPED, ids, segments)))(x)
    balance = z = 0.0
    for of_group, experts in ((ids < 30, [0, 1]), (ids >= 30, [2, 3, 4])):
        config = dataclasses.replace(EXPERTS, experts=len(experts))
        own = {name: np.asarray(weights[name])[experts] for name in ("gate", "up", "down")}
        own["router"] = np.asarray(weights["router"])[:, experts]
        expected, _ = one_by_one(config, own, x[of_group][None])
        np.testing.assert_allclose(np.asarray(y)[of_group], expected[0], atol=1e-5)
        there = of_group & (segments > 0)
        _, of_there = one_by_one(config, own, x[there][None])
        balance += of_there["balance"] * there.sum() / (segments > 0).sum()
        z += of_there["router_z"] * there.sum() / (segments > 0).sum()
    assert float(terms["balance"]) == pytest.approx(balance, rel=1e-5)
    assert float(terms["router_z"]) == pytest.approx(z, rel=1e-5)


def test_a_batch_without_a_modality_has_finite_terms():
    """And so has one of padding alone, forward and backward."""
    weights = layer(GROUPED)
    x = jnp.asarray(np.random.default_rng(4).normal(size=(1, 5, TINY.dim)), jnp.float32)
    for segments in (np.ones((1, 5)), np.zeros((1, 5))):
        tokens = routing(GROUPED, np.full((1, 5), 40), segments)

        def terms(router, tokens=tokens):
            return sum(mixture(GROUPED, weights | {"router": router}, x, tokens)[1].values())

        value, gradient = jax.jit(jax.value_and_grad(terms))(weights["router"])
        assert np.isfinite(value) and np.isfinite(gradient).all()


def test_gradients():
    """Along random directions, those of finite differences, the router's too."""
    weights, random = layer(EXPERTS), np.random.default_rng(2)
    x = jnp.asarray(random.normal(size=(1, 6, TINY.dim)), jnp.float32)

    @jax.jit
    def loss(weights):
        y, terms = mixture(EXPERTS, weights, x, Routing(jnp.ones((1, 6), bool), None))
        return jnp.sum(jnp.sin(y)) + terms["balance"] + terms["router_z"]

    with jax.enable_x64(True):
        weights = {name: jnp.asarray(weight, jnp.float64) for name, weight in weights.items()}
        gradient = jax.grad(loss)(weights)
        for name in ("router", "gate", "up", "down"):
            direction, step = random.normal(size=weights[name].shape), 1e-4
            ends = [float(loss(weights | {name: weights[name] + sign * step * direction})) for sign in (1, -1)]
            expected = (ends[0] - ends[1]) / (2 * step)
            assert float(jnp.sum(gradient[name] * direction)) == pytest.approx(expected, rel=2e-3), name


@pytest.mark.parametrize("config", [EXPERTS, GROUPED], ids=["all", "grouped"])
def test_decoding_routes_too(config):
    """A cached decoder gives the logits of the whole sequence."""
    ids, positions, _ = batch()
    model = noisy_model(config)
    expected = nnx.jit(lambda model: model(ids, positions, None))(model)
    decoder = make_decoder(model)
    empty = init_cache(config, 2, 16)
    found, _ = jax.jit(apply_decoder)(decoder, ids, positions, jnp.zeros(2, jnp.int32), empty)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_groups_that_do_not_fit():
    """They are refused with the numbers that would; those that fit are written to model.json and read from it."""
    written = json.loads(json.dumps(settings_of_the_model(GROUPED)))
    assert config_from_dict(TransformerConfig, written, "model.json") == dataclasses.replace(GROUPED)
    with pytest.raises(UsageError, match="each must have 2 or more, and all together 5"):
        dataclasses.replace(EXPERTS, expert_groups=((0, 1), (30, 4)))
    with pytest.raises(UsageError, match=r"begin with the ids \(0, 64\); they must begin with 0 and rise, below 64"):
        dataclasses.replace(EXPERTS, expert_groups=((0, 2), (64, 3)))


def test_more_choices_than_experts():
    """It is refused."""
    with pytest.raises(UsageError, match="experts_per_token is 3, of 2 experts"):
        dataclasses.replace(TINY, experts=2, experts_per_token=3)
