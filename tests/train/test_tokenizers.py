"""The tasks that train tokenizers: every net learns in the one loop, and what is saved is the tokenizer."""

import dataclasses
import hashlib
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx
from network_weights import lpips_tensors
from tokenizer_cases import TASKS, tokenizer_run

import omni_tokenizers
import omni_tokenizers.checkpoints
from omni.data.loader import stack
from omni.recipes.digits_examples import SpokenDigits
from omni.train import tokenizers
from omni.train.loop import train
from omni.train.metrics import read_metrics
from omni.train.tokenizers import ImageAdversary
from omni_tokenizers import weights
from omni_tokenizers.discriminators import PatchDiscriminatorConfig
from omni_tokenizers.errors import OmniError, UsageError
from omni_tokenizers.losses.image import ImageLosses

CAUSAL = dataclasses.replace(TASKS["audio_spectral"].tokenizer, causal=True)
HALVED = {name: TASKS[name] for name in ("image_vq", "video", "audio_spectral")}
HALVED["causal"] = dataclasses.replace(TASKS["audio_spectral"], tokenizer=CAUSAL)


def first_step(task):
    """(loss, gradient by name, net's other variables) of a training step from the start."""
    examples = task.dataset(0)
    batch = stack([examples[index] for index in range(8)])

    @jax.jit
    def step(batch):
        graphdef, params, rest = nnx.split(task.build(nnx.Rngs(0)), nnx.Param, ...)
        # A kernel of 0, as blocks begin with, hides what is before it.
        params = jax.tree.map(lambda p: p + 0.02, params)

        def loss(params):
            net = nnx.merge(graphdef, params, rest, copy=True)
            total, weight, _ = task.loss(net, batch, jax.random.key(0), training=True)
            return total / weight, nnx.state(net, nnx.Not(nnx.Param))

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, rest), gradient = step(batch)
    named = {".".join(map(str, path)): np.asarray(value[...]) for path, value in nnx.to_flat_state(gradient)}
    return float(loss), named, rest


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vqgan", "encodec"])
def test_gradient_passes_the_quantizer(name):
    """Every parameter of encoder, decoder and a learned codebook has a gradient; a moving one has started to move."""
    _, gradient, rest = first_step(TASKS[name])
    for path, value in gradient.items():
        assert np.isfinite(value).all() and np.abs(value).max() > 0, path
    if name == "encodec":
        levels = rest["quantizer"]["quantizer"]["levels"]
        assert all(levels[index]["initialized"][...] for index in (0, 1))
    else:
        assert "quantizer.vectors" in gradient


@pytest.mark.slow
@pytest.mark.parametrize("name", HALVED)
def test_half_precision_keeps_what_needs_more(name):
    """bfloat16 products: the gradient is float32's within a few percent, the loss within one; states stay float32."""
    task = HALVED[name]
    loss, gradient, rest = first_step(task)
    half_loss, half_gradient, half_rest = first_step(dataclasses.replace(task, compute_dtype="bfloat16"))
    assert half_loss == pytest.approx(loss, rel=0.02) and half_loss != loss
    first, second = (np.concatenate([x.ravel() for x in each.values()]) for each in (gradient, half_gradient))
    assert first @ second > 0.9 * np.linalg.norm(first) * np.linalg.norm(second)
    assert {x.dtype for x in half_gradient.values()} == {np.dtype(np.float32)}
    dtypes = [[x.dtype for x in jax.tree.leaves(each)] for each in (rest, half_rest)]
    assert dtypes[0] == dtypes[1] and jnp.bfloat16 not in dtypes[1]


@pytest.mark.parametrize("name", HALVED)
def test_half_precision_is_that_of_products(name, monkeypatch):
    """Under bfloat16 no linear layer of encoder or decoder is given anything wider, which would widen its product."""
    task, given, linear = dataclasses.replace(HALVED[name], compute_dtype="bfloat16"), [], nnx.Linear.__call__
    monkeypatch.setattr(nnx.Linear, "__call__", lambda self, x: given.append(x.dtype.name) or linear(self, x))
    batch = stack([task.dataset(0)[0]])
    jax.eval_shape(lambda: task.loss(task.build(nnx.Rngs(0)), batch, jax.random.key(0), training=True)[0])
    assert len(given) > 4 and set(given) == {"bfloat16"}


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_it_learns_and_loads(tmp_path, name):
    """Loss falls, held-out loss with it; what is saved encodes and decodes held-out examples."""
    task = TASKS[name]
    config = tokenizer_run(tmp_path / "run", task)
    train(config)
    lines = read_metrics(config.output)
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    assert lines[-1]["held_out/loss"] < lines[1]["held_out/loss"]
    tokenizer = omni_tokenizers.load(config.output)
    assert tokenizer.config == task.tokenizer
    (batch,) = task.validation()
    given = batch["audio"][:, None] if tokenizer.modality == "audio" else batch[tokenizer.modality]
    codes = tokenizer.encode(given)
    assert len(np.unique(codes)) > 1 and np.asarray(codes).max() < tokenizer.codebook_sizes[0]
    decoded = tokenizer.decode(codes)
    assert decoded.shape == given.shape
    mean = given.mean(tuple(range(1, given.ndim)), keepdims=True)
    assert np.square(decoded - 1.0 * given).mean() < 1.5 * np.square(given - mean).mean()
    assert tuple(len(vectors) for vectors in tokenizer.code_vectors) == tuple(tokenizer.codebook_sizes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["image_vq", "video", "audio_spectral"])
def test_page_shows_held_out_examples(tmp_path, name):
    """At every checkpoint the run's page has a row more, up to five, of held-out examples alone; a step that is taken
    again replaces its row."""
    task = TASKS[name]
    config = tokenizer_run(tmp_path / "run", task, steps=7, checkpoint_every=1, log_every=1)
    train(config)
    page = (tmp_path / "run" / "page.html").read_text()
    made = sorted(int(path.stem) for path in (tmp_path / "run" / "made").iterdir())
    assert made == [3, 4, 5, 6, 7] and all(f"step {step}</th>" in page for step in made)
    assert "step 2</th>" not in page and "After 7 steps" in page and page.count("<polyline") >= 2
    pictures, players = page.count("data:image/png;base64,"), page.count("data:audio/wav;base64,")
    assert pictures == 6 * 6 and players == (6 * 6 if name == "audio_spectral" else 0)
    assert "http" not in page
    rows = [json.loads((tmp_path / "run" / "made" / f"{step}.json").read_text()) for step in (6, 7)]
    assert rows[0] != rows[1]


def test_page_shows_how_loud_a_reconstruction_is():
    """The original's spectrogram has its loudest band brightest; that of the same sound 20 dB down is darker by it."""
    task = TASKS["audio_spectral"]
    (batch,) = task.validation()
    shown = [task.exhibits(gain * batch["audio"], batch)[0][0].pixels.sum(-1).max() for gain in (1.0, 0.1)]
    assert shown[0] == 252 + 255 + 164 and 4 < shown[1] < 0.8 * shown[0]


def test_page_shows_frames_of_a_video_side_by_side():
    """Four of the five, from the first to the last, for each held-out video."""
    task = TASKS["video"]
    (batch,) = task.validation()
    shown = task.exhibits(np.asarray(task.prepared(batch)["original"]), batch)
    frames = batch["video"][:, [0, 1, 3, 4]]
    assert len(shown) == 6
    for (picture,), video in zip(shown, frames, strict=True):
        np.testing.assert_array_equal(picture.pixels, np.concatenate(list(video), 1))


def test_videos_fit_the_net():
    """Another size of frames, or a length that has no whole number of codes, is refused with both."""
    task = TASKS["video"]
    good, short, small = (
        {"video": np.zeros((2, *shape, 3), np.uint8)} for shape in ((9, 16, 16), (4, 16, 16), (5, 8, 16))
    )
    assert task.prepared(good)["original"].shape == (18, 16, 16, 3)
    with pytest.raises(UsageError, match=r"task.data has videos of 4 frames.*temporal_downsampling 4"):
        task.prepared(short)
    with pytest.raises(UsageError, match=r"8 x 16, but task.tokenizer.* image_size 16"):
        task.prepared(small)
    with pytest.raises(UsageError, match="trains VideoTokenizerConfig, not EncodecConfig"):
        dataclasses.replace(task, tokenizer=TASKS["encodec"].tokenizer)


def test_a_discriminator_sees_the_frames_of_a_video():
    """One by one, as pictures, and each counts."""
    task = dataclasses.replace(TASKS["video"], adversary=ImageAdversary(discriminator=PatchDiscriminatorConfig(32, 1)))
    batch, seen = stack([task.dataset(0)[index] for index in range(2)]), []

    def losses():
        net, critic = task.build(nnx.Rngs(0)), task.build_critic(nnx.Rngs(1))
        (total, weight, metrics), shown = task.adversarial_loss(net, critic, batch, jax.random.key(0))
        seen.append({name: value.shape for name, value in shown.items()})
        return total, weight, task.critic_loss(critic, shown)[0], metrics["adversarial"][0]

    assert {value.shape for value in jax.eval_shape(losses)} == {()}
    assert seen == [{"original": (10, 16, 16, 3), "estimate": (10, 16, 16, 3), "counts": (10,)}]


def test_losses_of_a_video_are_those_of_its_frames():
    """The loss is a mean over frames, and the weight counts them."""
    task = TASKS["video"]
    batch = stack([task.dataset(0)[index] for index in range(2)])
    net = nnx.jit(lambda: task.build(nnx.Rngs(0)))()
    total, weight, metrics = nnx.jit(lambda net: task.loss(net, batch, None, training=False))(net)
    estimate, _ = nnx.jit(lambda net: net.autoencode(batch["video"] / np.float32(127.5) - 1, None, training=False))(net)
    error = np.asarray(estimate) - (batch["video"] / 127.5 - 1)
    expected = np.square(error).mean() + 0.1 * np.abs(error).mean()
    assert float(weight) == 10 and float(metrics["reconstruction"][0]) / 10 == pytest.approx(expected, rel=1e-4)
    assert float(total) > float(metrics["reconstruction"][0])


@pytest.mark.parametrize("name", ["vqgan", pytest.param("encodec", marks=pytest.mark.slow)])
def test_public_family_without_a_quantizer(tmp_path, name):
    """A codebook that does not learn is refused in one line; with a quantizer there is no export, which is said."""
    task = TASKS[name]
    settings = {"encodec": {"bandwidths": (3.0,)}}.get(name, {})
    tokenizer = dataclasses.replace(task.tokenizer, quantizer=None, **settings)
    frozen = dataclasses.replace(task, tokenizer=tokenizer)
    batch = {key: jnp.asarray(value) for key, value in task.dataset(0)[0].items()}
    batch = jax.tree.map(lambda x: x[None], batch)
    with pytest.raises(UsageError, match="a quantizer; set"):
        jax.eval_shape(lambda: frozen.loss(frozen.build(nnx.Rngs(0)), batch, None, training=True)[0])
    graphdef, state = jax.jit(lambda: nnx.split(task.build(nnx.Rngs(0))))()
    made = task.tokenizer_class(task.tokenizer, nnx.merge(graphdef, state))
    with pytest.raises(OmniError, match=f"no {name} with a"):
        omni_tokenizers.checkpoints.export_checkpoint(made, tmp_path)


def test_what_cannot_be_trained():
    """A tokenizer of the other modality and an unknown type of products are usage errors that name the choices."""
    with pytest.raises(UsageError, match="trains ImageTokenizerConfig and VQGANConfig, not EncodecConfig"):
        dataclasses.replace(TASKS["vqgan"], tokenizer=TASKS["encodec"].tokenizer)
    with pytest.raises(UsageError, match="float32 or bfloat16"):
        dataclasses.replace(TASKS["vqgan"], compute_dtype="float16")


@pytest.mark.parametrize(("name", "size", "fitting"), [("image_vq", 12, 24), ("vqgan", 15, 18)])
def test_pictures_fit_the_net(name, size, fitting):
    """All multiples of a net's stride can be trained on; what would come out as another size is refused with both."""
    task = TASKS[name]
    good, bad = ({"image": np.zeros((1, height, 16, 3), np.uint8)} for height in (fitting, size))
    assert task.prepared(good)["original"].shape == (1, fitting, 16, 3)
    with pytest.raises(UsageError, match=f"task.data .* {size} x 16, but task.tokenizer.* image_size 16"):
        task.prepared(bad)


def test_sounds_have_the_tokenizers_sample_rate():
    """Examples that say another rate are refused with both, those that say none are not."""
    task = TASKS["encodec"]
    assert task.data.sample_rate is None
    with pytest.raises(UsageError, match=r"task.data .* 16000 Hz, but task.tokenizer.sample_rate is 8000"):
        dataclasses.replace(task, data=SpokenDigits("unused"))


def test_losses_are_set_in_one_place():
    """Loss settings of the tokenizer that the task's own would silence are refused."""
    task = TASKS["image_vq"]
    other = dataclasses.replace(task.tokenizer, absolute_weight=0.5)
    assert dataclasses.replace(task, tokenizer=other).chosen_losses == ImageLosses(absolute=0.5)
    with pytest.raises(UsageError, match="would do nothing"):
        dataclasses.replace(task, tokenizer=other, losses=ImageLosses())


def vgg(path, seed=0):
    """Writes the weights of a narrow LPIPS, and returns the path."""
    weights.write(path, lpips_tensors(seed))
    return str(path)


@pytest.mark.slow
def test_perceptual_loss_is_the_users_network(tmp_path, caplog):
    """With weights it moves the net, the result is signed with their hash and holds none of them, and other weights do
    not go on with the run; without, one line says that it is off."""
    path = vgg(tmp_path / "vgg.safetensors")
    task = dataclasses.replace(TASKS["image_vq"], losses=ImageLosses(perceptual_weights=path))
    config = tokenizer_run(tmp_path / "run", task, steps=2, checkpoint_every=1)
    train(config)
    assert read_metrics(config.output)[-1]["perceptual"] > 0
    signed = json.loads((tmp_path / "run" / "perceptual.json").read_text())
    assert signed["sha256"] == hashlib.sha256((tmp_path / "vgg.safetensors").read_bytes()).hexdigest()
    assert omni_tokenizers.load(config.output).config == task.tokenizer
    vgg(tmp_path / "vgg.safetensors", seed=1)
    with pytest.raises(OmniError, match="another perceptual"):
        train(dataclasses.replace(config, steps=3))
    plain, weighted = first_step(TASKS["image_vq"]), first_step(task)
    assert weighted[0] > plain[0] and not np.array_equal(plain[1]["head.kernel"], weighted[1]["head.kernel"])
    tokenizers._say_once.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            nnx.eval_shape(lambda: TASKS["image_vq"].build(nnx.Rngs(0)))
    assert caplog.text.count("perceptual loss: off (no weights given)") == 1


def test_a_result_is_signed_with_the_weights_that_were_read(tmp_path):
    """Weights that are replaced or gone when a training ends change nothing in what its result says of them."""
    path = vgg(tmp_path / "vgg.safetensors")
    task = dataclasses.replace(TASKS["image_vq"], losses=ImageLosses(perceptual_weights=path))
    (tmp_path / "made").mkdir()
    net, expected = task.build(nnx.Rngs(0)), task.metadata()["perceptual"]
    (tmp_path / "vgg.safetensors").unlink()
    task.save(nnx.merge(*nnx.split(net)), epath.Path(tmp_path / "made"))
    assert json.loads((tmp_path / "made" / "perceptual.json").read_text()) == expected
