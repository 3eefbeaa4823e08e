"""The step: accumulation is exact, what the forward pass changes comes back, decay and averages are right."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from training_cases import Net, language, regression

from omni.data.loader import stack
from omni.train.optimizer import OptimizerConfig, decay_mask, make_optimizer
from omni.train.step import accumulate, make_state, make_train_step


def first_batch(config):
    examples = config.task.dataset(config.seed)
    return stack([examples[i] for i in range(config.batch_size)])


def started(config):
    """Structure and first state."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: config.task.build(nnx.Rngs(0))))
    state = jax.jit(lambda: make_state(config.task, config.optimizer, config.steps, config.seed)[1])()
    return graphdef, state


def gradient(config, microbatches, batch):
    graphdef, state = started(config)
    key = jax.random.key(0)
    return jax.jit(lambda s, b: accumulate(graphdef, config.task, microbatches, s, b, key))(state, batch)


def test_accumulation_equals_one_batch(tmp_path):
    """Gradient and metrics of microbatches of unequal weight are those of the whole batch."""
    config, microbatches = language(tmp_path / "run"), 4
    batch = first_batch(config)
    weights = batch["target"].sum(1).reshape(-1, microbatches).sum(0)
    assert len(set(weights.tolist())) > 1
    whole, _, metrics = gradient(config, 1, batch)
    parts, _, parts_metrics = gradient(config, microbatches, batch)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    for name, (total, weight) in metrics.items():
        np.testing.assert_allclose(parts_metrics[name][0], total, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(parts_metrics[name][1], weight, rtol=1e-6)


def test_gradient_is_of_the_weighted_mean():
    """The total is divided by the weights: weighing every example double changes nothing."""
    config = regression("unused")
    batch = first_batch(config)
    once, _, _ = gradient(config, 1, batch)
    twice, _, _ = gradient(config, 1, batch | {"weight": 2 * batch["weight"]})
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_what_the_forward_pass_changes_comes_back():
    """Statistics that are no parameters are updated by every step, once a microbatch."""
    for accumulation in (1, 2):
        config = regression("unused", accumulation=accumulation)
        graphdef, state = started(config)
        step = jax.jit(make_train_step(graphdef, config.task, config.optimizer, config.steps, config.seed))
        batch = first_batch(config)
        after, _ = step(state, batch)
        model = nnx.merge(graphdef, state.params, state.rest)
        expected = np.zeros(16)
        for start in range(accumulation):
            hidden = np.tanh(np.asarray(model.up(jnp.array(batch["x"][start::accumulation]))))
            expected = 0.9 * expected + 0.1 * hidden.mean(0)
        np.testing.assert_allclose(after.rest["mean"][...], expected, atol=1e-6)


def test_clipping_bounds_the_update():
    """The gradient that the optimizer sees has at most the largest norm; the logged norm is the one before."""
    config = regression("unused")
    graphdef, state = started(config)
    batch = first_batch(config)

    def moments(clip):
        optimizer = OptimizerConfig(clip_norm=clip, warmup_steps=0)
        after, metrics = jax.jit(make_train_step(graphdef, config.task, optimizer, 10, 0))(state, batch)
        return after.optimizer[0].mu, float(metrics["gradient_norm"][0])

    (free, norm), (clipped, same_norm) = moments(0.0), moments(0.01)
    assert norm == same_norm > 0.01
    for a, b in zip(jax.tree.leaves(free), jax.tree.leaves(clipped), strict=True):
        np.testing.assert_allclose(a * 0.01 / norm, b, rtol=1e-4, atol=1e-9)


def test_running_mean_follows():
    """The averaged parameters move towards the parameters, and by the decay when it is below the early bound."""
    config = regression("unused")
    optimizer = OptimizerConfig(ema_decay=0.05, warmup_steps=0)
    graphdef, state = make_state(config.task, optimizer, 10, 0)
    after, _ = jax.jit(make_train_step(graphdef, config.task, optimizer, 10, 0))(state, first_batch(config))
    for old, new, mean in zip(*map(jax.tree.leaves, (state.params, after.params, after.ema)), strict=True):
        np.testing.assert_allclose(mean, 0.05 * old + 0.95 * new, atol=1e-6)


def test_only_matrices_decay(tmp_path):
    """Kernels and tables decay; biases and scales do not, stacked over layers or not."""
    net = decay_mask(nnx.state(Net(8, nnx.Rngs(0)), nnx.Param))
    assert net["up"]["kernel"].get_value() is True
    assert net["up"]["bias"].get_value() is False
    config = language(tmp_path / "run")
    _, state = jax.eval_shape(lambda: make_state(config.task, config.optimizer, 10, 0))
    mask = decay_mask(state.params)
    assert mask["embedding"].get_value() is True
    assert mask["blocks"]["gate"].get_value() is True
    assert mask["blocks"]["mlp_norm"].get_value() is False
    assert mask["blocks"]["query_norm"].get_value() is False


def test_muon_orthogonalises_matrices_and_leaves_the_rest_to_adam(tmp_path):
    """A first step moves each layer's matrix, its axes but "embed" joined, evenly in all directions of its gradient and
    as far as AdamW would; embeddings, whose moves AdamW makes all of one size, are left to it."""
    config = language(tmp_path / "run", dim=64)
    optimizer = make_optimizer(OptimizerConfig(name="muon", learning_rate=1.0, warmup_steps=1, weight_decay=0.0), 10)
    _, state = started(config)
    random = np.random.default_rng(0)
    gradient = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32), state.params)
    moves = optimizer.update(gradient, optimizer.init(state.params), state.params)[0]
    blocks = nnx.to_pure_dict(moves)["blocks"]
    assert {"query", "output", "gate", "down"} <= set(blocks)
    for name in ("query", "key", "value", "output", "gate", "up", "down"):
        for layer in np.asarray(blocks[name]):
            embed = -1 if name in ("output", "down") else 0
            matrix = np.moveaxis(layer, embed, 0).reshape(layer.shape[embed], -1)
            sizes = np.linalg.svd(matrix, compute_uv=False) / (0.2 * np.sqrt(max(matrix.shape)))
            assert sizes.min() > 0.6 and sizes.max() < 1.3, name
    embedding = np.abs(np.asarray(nnx.to_pure_dict(moves)["embedding"]))
    assert embedding.std() < 0.1 * embedding.mean()
