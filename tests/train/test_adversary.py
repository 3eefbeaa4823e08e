"""Training against a critic: what each gradient is, when it begins, and that a run resumes with it."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizer_cases import TASKS, tokenizer_run
from training_cases import Duel, Regression, regression

from omni.data.loader import stack
from omni.train.loop import train
from omni.train.metrics import read_metrics
from omni.train.optimizer import OptimizerConfig
from omni.train.step import TrainState, accumulate_both, make_critic, make_state, make_train_step
from omni.train.task import Adversary
from omni.train.tokenizers import ImageAdversary
from omni_tokenizers.discriminators import PatchDiscriminatorConfig
from omni_tokenizers.errors import UsageError
from omni_tokenizers.losses.adversarial import deception, feature_matching, hinge
from omni_tokenizers.quantizers import FSQConfig

PATCH = PatchDiscriminatorConfig(channels=32, layers=1)
SCALARS = dataclasses.replace(  # nothing in it depends on what else is in a batch
    TASKS["image_vq"].tokenizer, codebook_size=512, code_dim=16, quantizer=FSQConfig(levels=(5, 5, 5))
)
IMAGE = dataclasses.replace(
    TASKS["image_vq"], tokenizer=SCALARS, adversary=ImageAdversary(features=0.3, discriminator=PATCH)
)


def started(task):
    """(configuration, structures of net and critic, state, batch) of a run's beginning."""
    config = tokenizer_run("unused", task, steps=10)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: task.build(nnx.Rngs(0))))
    critic = jax.eval_shape(lambda: make_critic(task, 10, 0))[0]
    state = jax.jit(lambda: make_state(task, config.optimizer, 10, 0)[1])()
    examples = task.dataset(0)
    return config, (graphdef, critic), state, stack([examples[index] for index in range(8)])


def both(task, microbatches=1):
    _, structures, state, batch = started(task)
    key = jax.random.key(0)
    result = jax.jit(lambda s, b: accumulate_both(*structures, task, microbatches, s, b, key))(state, batch)
    return structures, state, batch, result


def without_critic(state):
    """The state of a task without an adversary."""
    return TrainState(*(getattr(state, field.name) for field in dataclasses.fields(TrainState)))


def norm(tree):
    return float(np.sqrt(sum(np.square(np.asarray(x, np.float64)).sum() for x in jax.tree.leaves(tree))))


def assert_close(first, second, **tolerance):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


def assert_same_bits(first, second):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_gradients_are_of_the_losses_written_out():
    """The net's gradient is that of its own losses, the features' and the adversarial one under a constant weight: 0.8
    times the ratio of two gradients at the last kernel, taken apart; the critic's is that of the hinge loss."""
    (graphdef, critic_graphdef), state, batch, (gradient, _, critic_gradient, _, metrics) = both(IMAGE)
    image = jnp.asarray(batch["image"], jnp.float32) / 127.5 - 1
    critic = nnx.merge(critic_graphdef, state.critic.params, state.critic.rest)

    def outcomes(params):
        net = nnx.merge(graphdef, params, state.rest, copy=True)
        estimate, quantized = net.autoencode(image, None, training=True)
        own = IMAGE.chosen_losses(estimate, image, quantized)[0] / 8
        logits, features = critic(estimate)
        return own, deception(logits).mean(), feature_matching(critic(image)[1], features).mean(), estimate

    gradients = [jax.grad(lambda params, part=part: outcomes(params)[part]) for part in range(3)]
    parts = jax.jit(lambda params: [gradient(params) for gradient in gradients])(state.params)
    ratio = norm(parts[0]["head"]["kernel"]) / (norm(parts[1]["head"]["kernel"]) + 1e-4)
    total, weight = metrics["adversarial_weight"]
    assert 0.01 < 0.8 * ratio < 1e3 and float(total / weight) == pytest.approx(0.8 * ratio, rel=1e-4)
    expected = jax.tree.map(lambda own, adversarial, features: own + 0.8 * ratio * adversarial + 0.3 * features, *parts)
    assert_close(gradient, expected, rtol=1e-3, atol=1e-5)

    estimate = jax.lax.stop_gradient(outcomes(state.params)[3])

    def told(params):
        critic = nnx.merge(critic_graphdef, params, state.critic.rest)
        return hinge(critic(image)[0], critic(estimate)[0]).mean()

    value, expected = jax.jit(jax.value_and_grad(told))(state.critic.params)
    assert_close(critic_gradient, expected, rtol=1e-3, atol=1e-6)
    assert float(metrics["critic/loss"][0] / metrics["critic/loss"][1]) == pytest.approx(float(value), rel=1e-5)


def test_accumulation_equals_one_batch():
    """Gradients of net and critic and all metrics of microbatches of unequal weight are those of the whole batch."""
    *_, (whole, _, critic_whole, _, metrics) = both(Duel(statistics=False))
    *_, batch, (parts, _, critic_parts, _, parts_metrics) = both(Duel(statistics=False), microbatches=4)
    assert len(set(batch["weight"].reshape(-1, 4).sum(0).tolist())) > 1
    assert_close(whole, parts, rtol=1e-4, atol=1e-6)
    assert_close(critic_whole, critic_parts, rtol=1e-4, atol=1e-6)
    for name in ("loss", "deceiving", "critic/loss"):
        np.testing.assert_allclose(parts_metrics[name], metrics[name], rtol=1e-5)


def test_what_is_frozen_of_net_and_critic():
    """Both gradients are those of all parameters without the frozen ones, which keep their bits; norms and clipping are
    of what moves."""
    task, optimizer = Duel(statistics=False, adversary=Adversary(start=2)), OptimizerConfig(clip_norm=1e-3)
    (graphdef, critic_graphdef), _, batch, (whole, _, critic_whole, _, _) = both(task)
    frozen = dataclasses.replace(optimizer, frozen=("up.*",))
    critic = dataclasses.replace(optimizer, frozen=("down.kernel", "up.bias"))
    task = dataclasses.replace(task, adversary=Adversary(start=2, optimizer=critic))
    state = jax.jit(lambda: make_state(task, frozen, 10, 0)[1])()
    key = jax.random.fold_in(jax.random.key(0), state.step)
    arguments = (graphdef, critic_graphdef, task, 2, state, batch, key, frozen.frozen)
    gradient, _, critic_gradient, _, _ = jax.jit(lambda: accumulate_both(*arguments))()
    assert set(nnx.to_pure_dict(gradient)) == {"down"} and len(jax.tree.leaves(critic_gradient)) == 2
    assert_close(gradient["down"], whole["down"], rtol=1e-4, atol=1e-6)
    assert_close(critic_gradient["up"]["kernel"], critic_whole["up"]["kernel"], rtol=1e-4, atol=1e-6)
    assert_close(critic_gradient["down"]["bias"], critic_whole["down"]["bias"], rtol=1e-4, atol=1e-6)

    step = jax.jit(make_train_step(graphdef, task, frozen, 10, 0, adversarial=True))
    after, metrics = step(state, batch)
    assert_same_bits(after.params["up"], state.params["up"])
    assert_same_bits(after.critic.params["down"]["kernel"], state.critic.params["down"]["kernel"])
    for name, moving, moments in (
        ("gradient_norm", gradient, after.optimizer),
        ("critic/gradient_norm", critic_gradient, after.critic.optimizer),
    ):
        assert metrics[name][0] == pytest.approx(norm(moving), rel=1e-4)
        assert norm(moments[0].mu) == pytest.approx(0.1 * 1e-3, rel=1e-4)
    assert norm(gradient) < 0.95 * norm(whole) and norm(critic_gradient) < 0.95 * norm(critic_whole)


def test_before_its_start_there_is_no_critic():
    """Until then a step is that of the task without an adversary, bit for bit, and the critic keeps every bit; from
    then on both move, the critic as its own optimizer says, whose schedule begins there."""
    task = Duel(noise=0.0, adversary=Adversary(start=2))
    config, (graphdef, _), state, batch = started(task)
    plain = jax.jit(make_train_step(graphdef, Regression(noise=0.0), config.optimizer, 10, 0))
    step = jax.jit(make_train_step(graphdef, task, config.optimizer, 10, 0))
    first, expected = state, without_critic(state)
    for _ in range(2):
        (state, metrics), (expected, _) = step(state, batch), plain(expected, batch)
    assert_same_bits(without_critic(state), expected)
    assert_same_bits(state.critic, first.critic)
    assert not any(name.startswith("critic") or name == "deceiving" for name in metrics)
    after, metrics = jax.jit(make_train_step(graphdef, task, config.optimizer, 10, 0, adversarial=True))(state, batch)
    for name in ("params", "rest"):
        before, now = (getattr(each.critic, name) for each in (first, after))
        assert norm(jax.tree.map(jnp.subtract, now, before)) > 1e-4
    assert float(metrics["critic/learning_rate"][0]) == pytest.approx(3e-4)  # the schedule's first
    assert int(after.critic.optimizer[0].count) == 1 and int(after.optimizer[0].count) == 3
    assert not np.array_equal(*(each.params["up"]["kernel"][...] for each in (after, plain(expected, batch)[0])))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(configuration, final state) of a run of 12 steps whose critic starts after 5."""
    config = regression(tmp_path_factory.mktemp("adversary") / "run", log_every=1, keep=9)
    config = dataclasses.replace(config, task=Duel())
    return config, train(config)


@pytest.mark.parametrize("cut", [4, 8])
def test_resumed_equals_undisturbed(tmp_path, undisturbed, cut):
    """A run that is cut, before the critic's start or after, ends with the bits of an undisturbed one: net, critic,
    both optimizers' moments, averages, statistics and log."""
    config, expected = undisturbed
    lines = read_metrics(config.output)
    assert [("critic/loss" in line) for line in lines] == [False] * 5 + [True] * 7
    part = dataclasses.replace(config, output=str(tmp_path / "run"))
    shutil.copytree(config.output, part.output)
    for later in range(cut + 4, 13, 4):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(later))
    (tmp_path / "run" / "finished.json").unlink()
    assert_same_bits(train(part), expected)
    assert [line["loss"] for line in read_metrics(part.output)] == [line["loss"] for line in lines]


@pytest.mark.slow
def test_resumed_tokenizer_equals_undisturbed(tmp_path):
    """So does a tokenizer with a discriminator, a moving codebook and an adaptive weight."""
    task = dataclasses.replace(TASKS["image_vq"], adversary=dataclasses.replace(IMAGE.adversary, start=3))
    config = tokenizer_run(tmp_path / "run", task, steps=6, checkpoint_every=2, log_every=1, keep=9)
    expected = train(config)
    for later in (4, 6):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(later))
    (tmp_path / "run" / "finished.json").unlink()
    assert_same_bits(train(config), expected)


def test_what_a_critic_cannot_have():
    """Averages and microbatches of its own, and a start before the first step, are usage errors."""
    for fields in (
        {"start": -1},
        {"optimizer": OptimizerConfig(ema_decay=0.9)},
        {"optimizer": OptimizerConfig(accumulation=2)},
    ):
        with pytest.raises(UsageError):
            Adversary(**fields)


def test_a_critic_must_start_within_the_run():
    """A start that the run never reaches is a usage error; the run's last step is the latest that there is."""
    config = tokenizer_run("unused", dataclasses.replace(IMAGE, adversary=ImageAdversary(start=9)), steps=10)
    assert config.task.adversary.start == 9
    with pytest.raises(UsageError, match=r"start is 9.* 9 steps"):
        dataclasses.replace(config, steps=9)
