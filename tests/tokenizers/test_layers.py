"""The layers of public codecs against slow versions in float64 that do one sum, one clip or one step at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx
from layer_cases import slow_conv_transpose1d

from omni_tokenizers.edges import PaddedConv1d, TimeGroupNorm, TrimmedConvTranspose1d, padded
from omni_tokenizers.layers import Conv1d, Conv2d, Conv3d, ConvTranspose1d
from omni_tokenizers.recurrent import LSTM
from omni_tokenizers.transformer import CausalTransformer, rotary, rotated, windowed_attention

LENGTHS = (12, 7, 2, 1)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def with_noise(make: Callable[[nnx.Rngs], nnx.Module]) -> nnx.Module:
    """The module with every parameter random, biases and norms too; never initialised, which would take its time."""
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    leaves, tree = jax.tree.flatten(abstract)
    state = jax.tree.unflatten(tree, [noise(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)])
    return nnx.merge(graphdef, state)


@nnx.jit
def called(module: nnx.Module, *arguments):
    """What a module gives."""
    return module(*arguments)


def values(variable) -> np.ndarray:
    return np.asarray(variable[...], np.float64)


def close(found, expected, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape and np.std(expected) > 0
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def slow_conv1d(x, kernel, stride: int, dilation: int = 1, groups: int = 1) -> np.ndarray:
    """[time, inputs] to [frames, outputs], each output of a group from the inputs of that group."""
    width, within, outputs = kernel.shape
    frames = (len(x) - (width - 1) * dilation - 1) // stride + 1
    y = np.zeros((frames, outputs))
    for frame in range(frames):
        for output in range(outputs):
            first = output // (outputs // groups) * within
            for k in range(width):
                y[frame, output] += x[frame * stride + k * dilation, first : first + within] @ kernel[k, :, output]
    return y


@pytest.mark.parametrize(
    ("width", "stride", "dilation", "groups", "bias"),
    [(1, 1, 1, 1, True), (5, 2, 1, 1, True), (3, 1, 3, 1, False), (4, 3, 2, 2, True)],
)
def test_conv1d_equals_its_sum(width, stride, dilation, groups, bias):
    """Widths, strides, dilations and groups, and `reach` samples under a kernel."""
    options = {"stride": stride, "dilation": dilation, "groups": groups, "use_bias": bias}
    layer, x = with_noise(lambda rngs: Conv1d(4, 8, width, **options, rngs=rngs)), noise(2, 19, 4)
    shift = values(layer.bias) if bias else 0
    close(
        called(layer, x),
        np.stack([slow_conv1d(clip, values(layer.kernel), stride, dilation, groups) for clip in x]) + shift,
    )
    assert layer.reach == (width - 1) * dilation + 1


@pytest.mark.parametrize(
    ("width", "stride", "groups", "bias"), [(7, 3, 1, True), (3, 3, 1, False), (2, 3, 1, True), (4, 2, 2, True)]
)
def test_transposed_conv1d_equals_its_sum(width, stride, groups, bias):
    """Kernels that overlap, touch and leave gaps; the bias is added once to every sample."""
    options = {"stride": stride, "groups": groups, "use_bias": bias}
    layer, x = with_noise(lambda rngs: ConvTranspose1d(4, 8, width, **options, rngs=rngs)), noise(2, 5, 4)
    shift = values(layer.bias) if bias else 0
    close(
        called(layer, x),
        np.stack([slow_conv_transpose1d(clip, values(layer.kernel), stride, groups) for clip in x]) + shift,
    )


def test_transposed_is_the_transpose():
    """<conv(x), y> = <x, transposed(y)> for one kernel, whose inputs and outputs change places."""
    forward = with_noise(lambda rngs: Conv1d(3, 5, 4, stride=2, use_bias=False, rngs=rngs))
    back = with_noise(lambda rngs: ConvTranspose1d(5, 3, 4, stride=2, use_bias=False, rngs=rngs))
    back.kernel[...] = values(forward.kernel).swapaxes(1, 2)
    x, y = noise(1, 12, 3), noise(1, 5, 5, seed=1)
    np.testing.assert_allclose(np.vdot(called(forward, x), y), np.vdot(x, called(back, y)), rtol=1e-5)


def test_conv2d_and_conv3d_equal_their_sums():
    """A sum over the pixels of a window, and over its frames, whose stride is the frames' alone."""
    image, video, stride = noise(2, 6, 5, 3), noise(2, 5, 4, 6, 3), 2
    flat = with_noise(lambda rngs: Conv2d(3, 4, 3, stride=stride, rngs=rngs))
    deep = with_noise(lambda rngs: Conv3d(3, 4, (3, 2, 3), time_stride=stride, rngs=rngs))
    rows, columns, frames = (6 - 3) // stride + 1, (5 - 3) // stride + 1, (5 - 3) // stride + 1
    expected = np.zeros((2, rows, columns, 4))
    for row, column in np.ndindex(rows, columns):
        window = image[:, row * stride : row * stride + 3, column * stride : column * stride + 3]
        expected[:, row, column] = np.tensordot(window, values(flat.kernel), 3)
    close(called(flat, image), expected + values(flat.bias))
    expected = np.zeros((2, frames, 3, 4, 4))
    for frame, row, column in np.ndindex(frames, 3, 4):
        window = video[:, frame * stride : frame * stride + 3, row : row + 2, column : column + 3]
        expected[:, frame, row, column] = np.tensordot(window, values(deep.kernel), 4)
    close(called(deep, video), expected + values(deep.bias))


def padded_alone(clip: np.ndarray, left: int, right: int, stride: int, padding: str) -> np.ndarray:
    """One clip [time, channels], padded by numpy; too short for a reflection, it first gets zeros that go again."""
    right += -len(clip) % stride
    lacking = max(0, max(left, right) + 1 - len(clip)) if padding == "reflect" else 0
    clip = np.pad(clip, ((0, lacking), (0, 0)))
    mode = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}[padding]
    clip = np.pad(clip, ((left, right), (0, 0)), mode)
    return clip[: len(clip) - lacking]


def batch_of(lengths, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Clips of these lengths in one array, with noise after their ends."""
    return noise(len(lengths), max(lengths), channels), np.array(lengths)


@pytest.mark.parametrize("padding", ["constant", "reflect", "replicate"])
@pytest.mark.parametrize(("left", "right", "stride"), [(4, 0, 2), (2, 2, 4), (6, 5, 3), (0, 3, 1)])
def test_each_clip_is_padded_at_its_own_edges(left, right, stride, padding):
    """In a batch, each clip is padded as numpy pads it alone, up to what completes its last stride."""
    x, lengths = batch_of(LENGTHS, 2)
    found = np.asarray(jax.jit(padded, static_argnums=(2, 3, 4, 5))(x, lengths, left, right, stride, padding))
    assert found.shape == (len(LENGTHS), left + 12 + right, 2)
    for row, length in enumerate(lengths):
        expected = padded_alone(x[row, :length], left, right, stride, padding)
        np.testing.assert_array_equal(found[row, : len(expected)], expected)


def slow_group_norm(x: np.ndarray, scale, bias) -> np.ndarray:
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * scale + bias


def test_group_norm_sees_a_clip_and_no_more():
    """Mean and variance over a clip's own frames and channels."""
    norm, (x, lengths) = with_noise(lambda rngs: TimeGroupNorm(3, rngs=rngs)), batch_of((9, 4), 3)
    found = called(norm, x, lengths)
    for row, length in enumerate(lengths):
        expected = slow_group_norm(x[row, :length].astype(np.float64), values(norm.scale), values(norm.bias))
        close(found[row, :length], expected)


@pytest.mark.parametrize(
    ("width", "stride", "dilation", "causal", "group_norm"),
    [(5, 1, 2, True, False), (4, 2, 1, False, True), (7, 3, 1, True, True), (6, 3, 1, False, False)],
)
def test_padded_convolution_of_each_clip_alone(width, stride, dilation, causal, group_norm):
    """ceil(n / stride) frames for n, all the padding on the left if causal, else the larger half of it."""
    options = {"stride": stride, "dilation": dilation, "causal": causal, "group_norm": group_norm}
    layer = with_noise(lambda rngs: PaddedConv1d(2, 3, width, **options, padding="reflect", rngs=rngs))
    x, lengths = batch_of(LENGTHS, 2)
    found, total = called(layer, x, lengths), (width - 1) * dilation + 1 - stride
    right = 0 if causal else total // 2
    for row, length in enumerate(lengths):
        clip = padded_alone(x[row, :length], total - right, right, stride, "reflect")
        expected = slow_conv1d(clip, values(layer.kernel), stride, dilation) + values(layer.bias)
        assert len(expected) == -(-length // stride) == layer.frames(lengths)[row]
        if group_norm:
            expected = slow_group_norm(expected, values(layer.norm.scale), values(layer.norm.bias))
        close(found[row, : len(expected)], expected)


@pytest.mark.parametrize(
    ("width", "stride", "causal", "group_norm"), [(4, 2, True, False), (6, 3, False, True), (5, 2, True, True)]
)
def test_trimmed_transposed_convolution_of_each_clip_alone(width, stride, causal, group_norm):
    """n * stride samples for n frames: what hangs over is cut on the right if causal, else the larger half on the left.

    Where it is normalised, then before it is cut.
    """
    options = {"stride": stride, "causal": causal, "group_norm": group_norm}
    layer = with_noise(lambda rngs: TrimmedConvTranspose1d(2, 3, width, **options, rngs=rngs))
    x, lengths = batch_of(LENGTHS, 2)
    found, left = called(layer, x, lengths), 0 if causal else -(-(width - stride) // 2)
    assert found.shape == (len(LENGTHS), 12 * stride, 3)
    for row, length in enumerate(lengths):
        expected = slow_conv_transpose1d(x[row, :length], values(layer.kernel), stride) + values(layer.bias)
        if group_norm:
            expected = slow_group_norm(expected, values(layer.norm.scale), values(layer.norm.bias))
        close(found[row, : length * stride], expected[left : left + length * stride])


def test_lstm_equals_its_equations_step_by_step():
    """Two layers, from states of zeros, with gates in the order i, f, g, o."""
    layer, x = with_noise(lambda rngs: LSTM(3, 2, rngs=rngs)), noise(2, 6, 3)
    expected = np.asarray(x, np.float64)
    for cell in layer.layers:
        hidden, memory, outputs = np.zeros((2, 3)), np.zeros((2, 3)), []
        for step in range(6):
            drive = expected[:, step] @ values(cell.input_kernel) + hidden @ values(cell.hidden_kernel)
            i, f, g, o = np.split(drive + values(cell.input_bias) + values(cell.hidden_bias), 4, 1)
            memory = scipy.special.expit(f) * memory + scipy.special.expit(i) * np.tanh(g)
            hidden = scipy.special.expit(o) * np.tanh(memory)
            outputs.append(hidden)
        expected = np.stack(outputs, 1)
    close(called(layer, x, np.full(2, 6)), expected)


def slow_rotation(x: np.ndarray, theta: float) -> np.ndarray:
    """[time, heads, dim]: the halves of a head are real and imaginary parts, turned by position * theta^(-2i / dim)."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None, None] * theta ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], -1)


def slow_attention(query, key, value, window: int) -> np.ndarray:
    """[time, heads, dim], one position after the other."""
    result = np.zeros_like(value, np.float64)
    for time, head in np.ndindex(query.shape[:2]):
        seen = slice(max(0, time - window + 1), time + 1)
        weights = scipy.special.softmax(key[seen, head] @ query[time, head] / np.sqrt(query.shape[2]))
        result[time, head] = weights @ value[seen, head]
    return result


def test_rotation_turns_halves_as_complex_numbers():
    """Rotary positions are a multiplication by e^(i angle), and leave the first position as it is."""
    x = noise(2, 7, 3, 8)
    found = jax.jit(lambda x: rotated(x, rotary(jnp.arange(7), 8, 50.0)))(x)
    close(found, np.stack([slow_rotation(clip.astype(np.float64), 50.0) for clip in x]))
    np.testing.assert_array_equal(found[:, 0], x[:, 0])


@pytest.mark.parametrize("window", [1, 4, 5, 100])
def test_attention_sees_its_window(window):
    """Windows that divide the time and that do not, of one position, and wider than all of it."""
    query, key, value = (noise(2, 10, 2, 4, seed=seed) for seed in range(3))
    found = jax.jit(windowed_attention, static_argnums=3)(query, key, value, window)
    close(found, np.stack([slow_attention(*one, window) for one in zip(query, key, value, strict=True)]))


def slow_layer(layer, x: np.ndarray, theta: float) -> np.ndarray:
    """One clip [time, dim] through a layer."""

    def normed(norm, x):
        y = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-3)
        return y * values(norm.scale) + values(norm.bias)

    inner = normed(layer.attention_norm, x)
    query, key, value = (
        (inner @ values(part.kernel)).reshape(len(x), 2, 4) for part in (layer.query, layer.key, layer.value)
    )
    mixed = slow_attention(slow_rotation(query, theta), slow_rotation(key, theta), value, 3).reshape(len(x), -1)
    x = x + values(layer.attention_scale) * (mixed @ values(layer.output.kernel))
    inner = normed(layer.mlp_norm, x) @ values(layer.mlp_in.kernel)
    inner = inner * (1 + scipy.special.erf(inner / np.sqrt(2))) / 2
    return x + values(layer.mlp_scale) * (inner @ values(layer.mlp_out.kernel))


def test_transformer_equals_its_equations():
    """Two layers: norm, rotary attention in a window, scale; norm, exact GELU, scale."""
    sizes = {"heads": 2, "head_dim": 4, "mlp_dim": 7, "window": 3, "rope_theta": 50.0, "norm_epsilon": 1e-3}
    net, x = with_noise(lambda rngs: CausalTransformer(6, 2, **sizes, rngs=rngs)), noise(2, 8, 6)
    expected = []
    for clip in x.astype(np.float64):
        for layer in net.layers:
            clip = slow_layer(layer, clip, 50.0)
        expected.append(clip)
    close(called(net, x, np.full(len(x), x.shape[1])), np.stack(expected))
