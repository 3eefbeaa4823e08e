"""Video tokenizer: boxes and causal convolutions by hand, exact lengths, causal time, pictures, learning, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import video_cases
from flax import nnx

import omni_tokenizers
from omni_tokenizers import video_streaming
from omni_tokenizers.errors import OmniError, UsageError
from omni_tokenizers.image_metrics import psnr
from omni_tokenizers.quantizers import VectorQuantizerConfig
from omni_tokenizers.video import (
    TemporalBlock,
    VideoAutoencoder,
    VideoTokenizer,
    VideoTokenizerConfig,
    from_patches,
    patches,
)

NAMES = tuple(video_cases.CONFIGS)
CASES = [pytest.param(name, marks=[] if name == "one stage" else pytest.mark.slow, id=name) for name in NAMES]


def by_the_net(tokenizer, video):
    """Codes and pixels of one video by the net alone, without steps, padded by hand to whole frames of codes."""
    stride, time = tokenizer.config.temporal_downsampling, video.shape[1]
    frames = 1 + -(-(time - 1) // stride)
    before = np.repeat(video[:, :1], stride - 1, 1)
    after = np.repeat(video[:, -1:], (frames - 1) * stride + 1 - time, 1)
    counts, net = np.full(len(video), frames), (tokenizer.graphdef, tokenizer.state)
    codes = np.asarray(video_cases.encoded_whole(*net, np.concatenate([before, video, after], 1), counts))
    pixels = np.asarray(video_cases.decoded_whole(*net, codes, counts))
    return codes, pixels[:, stride - 1 :][:, :time]


def test_patches_are_boxes_of_space_and_time():
    """Boxes are cut where they lie and put back there."""
    x = jnp.arange(2 * 6 * 4 * 6 * 3).reshape(2, 6, 4, 6, 3)
    deep = patches(x, 3, 2)
    assert deep.shape == (2, 2, 2, 3, 36)
    np.testing.assert_array_equal(deep[1, 1, 0, 2], x[1, 3:6, 0:2, 4:6].reshape(-1))
    np.testing.assert_array_equal(from_patches(deep, 3, 2), x)


def test_temporal_block_is_a_causal_convolution():
    """It equals XLA's convolution over time, padded with two frames of zeros before the first."""
    block = TemporalBlock(3, 2, rngs=nnx.Rngs(0))
    block.out.kernel[...] = jax.random.normal(jax.random.key(1), (3, 3))
    x = jax.random.normal(jax.random.key(0), (2, 5, 2, 2, 3))
    kernel = block.mix.kernel[...].reshape(3, 1, 1, 3, 3)
    mixed = jax.lax.conv_general_dilated(
        nnx.silu(block.norm(x)),
        kernel,
        (1, 1, 1),
        [(2, 0), (0, 0), (0, 0)],
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )
    np.testing.assert_allclose(nnx.jit(block)(x, jnp.full(2, 5)), x + block.out(nnx.silu(mixed)), atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_lengths_are_exact(name):
    """Any number of frames comes back, after one frame of codes for the first and one for each stride begun; a length
    that does not fit goes on with its last frame."""
    tokenizer = video_cases.tokenizer(name)
    stride = tokenizer.config.strides[0]
    for time in range(1, stride + 2):
        video = video_cases.videos(time)
        codes = tokenizer.encode(video)
        frames = 1 + -(-(time - 1) // stride)
        assert codes.ids.dtype == np.int32 and codes.shape == (1, frames, *tokenizer.grid)
        assert (codes.sizes is None) == (time == 1 + (frames - 1) * stride)
        decoded = tokenizer.decode(codes)
        assert decoded.shape == video.shape and decoded.dtype == np.uint8
        expected, pixels = by_the_net(tokenizer, video)
        np.testing.assert_array_equal(codes.ids, expected)
        assert np.abs(decoded.astype(int) - pixels).max() <= 1
        whole = tokenizer.decode(codes.ids.astype(np.int64))
        assert whole.shape[1] == 1 + (frames - 1) * stride
        np.testing.assert_array_equal(whole[:, :time], decoded)


def test_codes_and_pixels_vary():
    """The nets of these tests are no constants, or none of them would show anything."""
    codes = video_cases.tokenizer().encode(video_cases.videos(9, 4))
    assert len(np.unique(codes.ids)) > 20 and video_cases.tokenizer().decode(codes).std() > 10


def test_a_picture_is_a_video_of_one_frame():
    """Its codes and pixels are those of that video, without the axis of time; and the first of any longer one."""
    tokenizer, video = video_cases.tokenizer(), video_cases.videos(6, 3)
    codes = tokenizer.encode(video[:, 0])
    assert codes.shape == (3, 2, 2)
    np.testing.assert_array_equal(codes.ids, tokenizer.encode(video[:, :1]).ids[:, 0])
    np.testing.assert_array_equal(codes.ids, tokenizer.encode(video).ids[:, 0])
    decoded = tokenizer.decode(codes)
    assert decoded.shape == (3, 8, 8, 3)
    np.testing.assert_array_equal(decoded, tokenizer.decode(codes.ids[:, None])[:, 0])


@pytest.mark.parametrize("name", CASES)
def test_time_is_causal(name):
    """A change in frame t changes nothing before the codes of t, and these; decoding likewise, with codes."""
    tokenizer = video_cases.tokenizer(name)
    stride = tokenizer.config.strides[0]
    video = video_cases.videos(1 + 3 * stride)
    ids = tokenizer.encode(video).ids
    decoded = tokenizer.decode(ids)
    for time in range(1, video.shape[1]):
        other, frame = video.copy(), -(-time // stride)
        other[:, time] = 255 - other[:, time]
        changed = tokenizer.encode(other).ids
        np.testing.assert_array_equal(changed[:, :frame], ids[:, :frame])
        assert (changed[:, frame] != ids[:, frame]).any()
    for frame in range(1, ids.shape[1]):
        other, first = ids.copy(), 1 + (frame - 1) * stride
        other[:, frame] = (other[:, frame] + 60) % 125
        changed = tokenizer.decode(other)
        np.testing.assert_array_equal(changed[:, :first], decoded[:, :first])
        assert all((changed[:, at] != decoded[:, at]).any() for at in range(first, first + stride))
        after = slice(first + stride, first + 2 * stride)
        assert (changed[:, after] != decoded[:, after]).any((0, 2, 3, 4)).all(), "what follows remembers it"


@pytest.mark.parametrize("together", [1, 3 * 4 * 64, 1 << 19])
def test_long_videos_go_through_a_few_frames_at_a_time(monkeypatch, together):
    """However few frames and rows the net sees together, codes and pixels are those of the whole in one piece."""
    monkeypatch.setattr(video_streaming, "PIXELS", together)
    tokenizer, video = video_cases.tokenizer(), video_cases.videos(23, 3)
    codes = tokenizer.encode(video)
    expected, pixels = by_the_net(tokenizer, video)
    np.testing.assert_array_equal(codes.ids, expected)
    decoded = tokenizer.decode(codes)
    assert decoded.shape == video.shape and np.abs(decoded.astype(int) - pixels).max() <= 1


def test_an_empty_batch_has_empty_codes():
    """Nothing gives nothing."""
    tokenizer = video_cases.tokenizer()
    codes = tokenizer.encode(video_cases.videos(5, 0))
    assert codes.shape == (0, 2, 2, 2) and tokenizer.decode(codes).shape == (0, 5, 8, 8, 3)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (np.zeros((1, 3, 8, 8, 3), np.float32), "uint8"),
        (np.zeros((8, 8, 3), np.uint8), "must be"),
        (np.zeros((1, 2, 8, 16, 3), np.uint8), r"got \[1, 2, 8, 16, 3\]"),
        (np.zeros((1, 0, 8, 8, 3), np.uint8), "not empty"),
        (np.zeros((1, 8, 8, 4), np.uint8), "must be"),
    ],
)
def test_wrong_videos_are_refused(video, message):
    """Types and shapes that do not fit are errors for people."""
    with pytest.raises(OmniError, match=message):
        video_cases.tokenizer().encode(video)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.full((1, 1, 2, 2), 125), "code 125 is outside"),
        (np.full((1, 2, 2), -1), "outside"),
        (np.zeros((1, 1, 2, 3), int), "must be"),
        (np.zeros((1, 0, 2, 2), int), "not empty"),
        (np.zeros((2, 2), int), "axes"),
        (np.zeros((1, 1, 2, 2)), "integers"),
        (omni_tokenizers.Codes(np.zeros((1, 2, 2, 2), int), sizes=np.array([[6, 8, 8]])), "sizes must lie in 1 to"),
    ],
)
def test_wrong_codes_are_refused(codes, message):
    """Codes out of range, of another shape or type, or with a length that they do not have are errors for people."""
    with pytest.raises(OmniError, match=message):
        video_cases.tokenizer().decode(codes)


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": 18},
        {"channels": 0},
        {"multipliers": ()},
        {"temporal_downsampling": 0},
        {"temporal_downsampling": 1 << 21},
        {"residual_blocks": 1000},
    ],
)
def test_impossible_settings_are_refused(change):
    """A net that cannot be built is a usage error before anything is built."""
    with pytest.raises(UsageError):
        dataclasses.replace(video_cases.CONFIGS["one stage"], **change)


def test_saved_tokenizers_load_as_the_same(tmp_path):
    """Configuration, hash and codes come back; any weight and any setting changes the hash."""
    tokenizer, video = video_cases.tokenizer("two stages"), video_cases.videos(7)
    tokenizer.save(tmp_path)
    again = omni_tokenizers.load(tmp_path)
    assert type(again) is omni_tokenizers.VideoTokenizer and again.modality == "video"
    assert (again.hash, again.config) == (tokenizer.hash, tokenizer.config)
    np.testing.assert_array_equal(again.encode(video).ids, tokenizer.encode(video).ids)
    assert again.codebook_sizes == (125,) and again.code_vectors[0].shape == (125, 3)
    assert again.config.strides == (3, 4, 4) and again.grid == (2, 2) and again.image_size == 8
    assert len({video_cases.tokenizer(name).hash for name in NAMES}) == 3


def moving(number, generator):
    """Dark or light squares, which move to the right: uint8 [number, 5, 16, 16, 3]."""
    ground, colour = generator.integers(0, 2, (2, number, 1)) * 200 + 20
    video = np.broadcast_to(ground[:, None, None, None], (number, 5, 16, 16, 3)).copy()
    for frame in range(5):
        video[:, frame, 4:12, 2 * frame : 2 * frame + 8] = colour[:, None, None]
    return video.astype(np.uint8)


@pytest.mark.slow
def test_it_learns():
    """A few steps reconstruct simple videos; every gradient is finite, and every parameter has one."""
    config = VideoTokenizerConfig(16, 2, 4, 16, (1, 2), 1, VectorQuantizerConfig(64, 8, decay=0.9))
    graphdef, params, rest = nnx.split(VideoAutoencoder(config, rngs=nnx.Rngs(0)), nnx.Param, ...)
    optimizer = optax.adam(3e-3)
    moments = optimizer.init(params)

    @jax.jit
    def step(params, rest, moments, video, key):
        def loss(params):
            net = nnx.merge(graphdef, params, rest, copy=True)
            pixels = video / 127.5 - 1
            estimate, quantized = net.autoencode(pixels, key, training=True)
            return jnp.square(estimate - pixels).mean() + quantized.commitment, nnx.state(net, nnx.Not(nnx.Param))

        (_, rest), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), rest, moments, gradients

    generator = np.random.default_rng(1)
    for index in range(150):
        video = moving(8, generator).astype(np.float32)
        params, rest, moments, gradients = step(params, rest, moments, video, jax.random.key(index))
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, path
    tokenizer = VideoTokenizer(config, nnx.merge(graphdef, params, rest))
    held_out = moving(16, np.random.default_rng(9))
    estimate = tokenizer.decode(tokenizer.encode(held_out))
    assert psnr(*(each.reshape(-1, 16, 16, 3) for each in (held_out, estimate))) > 20
