"""Discriminators and the perceptual distance against torch, written from their papers, on random weights."""

import jax
import numpy as np
import pytest
from flax import nnx

from omni_tokenizers.discriminators import PatchDiscriminatorConfig, STFTDiscriminatorConfig
from omni_tokenizers.losses.perceptual import PerceptualDistance

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity
RANDOM = np.random.default_rng(0)
NUMBERS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
WIDTHS = (4, 6, 8, 5, 7)


def randomised(net):
    """All parameters random, lengths of weight norm positive."""
    for path, variable in nnx.to_flat_state(nnx.state(net)):
        value = RANDOM.normal(size=variable.get_value().shape).astype(np.float32) * 0.3
        variable[...] = np.abs(value) + 0.5 if path[-1] in ("length", "scale") else value
    return net


def close(ours, theirs):
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * max(1, np.abs(theirs).max()))


def channels_last(x):
    return x.permute(0, 2, 3, 1)


def spectrum_discriminator(x, scale, dilations):
    """One window of EnCodec's discriminator in torch, from our parameters: (logits, features)."""
    window = torch.hann_window(scale.window)
    z = torch.stft(x, scale.window, scale.window // 4, window=window, center=False, return_complex=True)
    z = z / window.square().sum().sqrt()
    z = torch.stack([z.real, z.imag], 1).transpose(2, 3)  # [batch, 2, time, frequency]
    features = []
    for layer, dilation in zip([*scale.layers, scale.head], (None, *dilations, None, None), strict=True):
        _, _, inputs, outputs = layer.direction.shape
        size, step = layer.direction.shape[:2], dilation or 1
        convolution = torch.nn.Conv2d(
            *(inputs, outputs, size),
            stride=(1, 1) if dilation is None else (1, 2),
            dilation=(step, 1),
            padding=((size[0] - 1) * step // 2, (size[1] - 1) // 2),
        )
        convolution = torch.nn.utils.parametrizations.weight_norm(convolution)
        direction = torch.tensor(np.asarray(layer.direction[...]).transpose(3, 2, 0, 1))
        convolution.parametrizations.weight.original1.data = direction
        convolution.parametrizations.weight.original0.data = torch.tensor(np.array(layer.length[...]))[
            :, None, None, None
        ]
        convolution.bias.data = torch.tensor(np.array(layer.bias[...]))
        z = convolution(z)
        if layer is not scale.head:
            z = torch.nn.functional.leaky_relu(z, 0.2)
            features.append(z)
    return z[:, 0], features


def test_stft_discriminator():
    """Logits and features of every window, at EnCodec's five windows and at odd lengths."""
    config = STFTDiscriminatorConfig(channels=4)
    net = randomised(config.make(rngs=nnx.Rngs(0)))
    audio = RANDOM.normal(size=(2, 5001)).astype(np.float32)
    logits, features = nnx.jit(lambda net, x: net(x))(net, audio)
    expected = [spectrum_discriminator(torch.tensor(audio), scale, config.dilations) for scale in net.scales]
    assert len(logits) == 5 and len(features) == 25
    for ours, (theirs, _) in zip(logits, expected, strict=True):
        close(ours, theirs)
    for ours, theirs in zip(features, [x for _, layers in expected for x in layers], strict=True):
        close(ours, channels_last(theirs))


def test_patch_discriminator():
    """Logits and features of PatchGAN with group norm."""
    net = randomised(PatchDiscriminatorConfig(channels=32).make(rngs=nnx.Rngs(0)))
    image = RANDOM.normal(size=(2, 40, 48, 3)).astype(np.float32)
    (logits,), features = nnx.jit(lambda net, x: net(x))(net, image)
    x, expected = torch.tensor(image).permute(0, 3, 1, 2), []
    functional = torch.nn.functional

    def convolved(x, layer, stride):
        kernel = torch.tensor(np.asarray(layer.kernel[...]).transpose(3, 2, 0, 1))
        return functional.conv2d(x, kernel, torch.tensor(np.array(layer.bias[...])), stride=stride, padding=1)

    for index, layer in enumerate(net.layers):
        x = convolved(x, layer, 2 if index < 3 else 1)
        if index:
            scale, bias = (
                torch.tensor(np.array(v[...])) for v in (net.norms[index - 1].scale, net.norms[index - 1].bias)
            )
            x = functional.group_norm(x, 32, scale, bias, eps=1e-6)
        x = functional.leaky_relu(x, 0.2)
        expected.append(x)
    close(logits, convolved(x, net.head, 1)[:, 0])
    for ours, theirs in zip(features, expected, strict=True):
        close(ours, channels_last(theirs))


def vgg_tensors(heads):
    tensors, channels = {}, 3
    for stage, numbers in enumerate(NUMBERS):
        for number in numbers:
            tensors[f"features.{number}.weight"] = RANDOM.normal(size=(WIDTHS[stage], channels, 3, 3)) / channels**0.5
            channels = WIDTHS[stage]
            tensors[f"features.{number}.bias"] = RANDOM.normal(size=channels) * 0.1
        if heads:
            tensors[f"lin{stage}.model.1.weight"] = RANDOM.uniform(size=(1, channels, 1, 1))
    return {name: value.astype(np.float32) for name, value in tensors.items()}


@pytest.mark.parametrize("heads", [True, False])
def test_perceptual_distance(heads):
    """LPIPS on narrow VGG16 weights: value and gradient, with channel weights and without."""
    tensors = vgg_tensors(heads)
    first, second = RANDOM.uniform(-1, 1, (2, 3, 32, 48, 3)).astype(np.float32)
    net = PerceptualDistance(tensors, "random")
    value, gradient = nnx.jit(lambda net, x, y: (net(x, y), jax.grad(lambda x: net(x, y).sum())(x)))(net, first, second)
    estimate = torch.tensor(first, requires_grad=True)

    def features(x):
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        x, result = ((x - shift) / scale).permute(0, 3, 1, 2), []
        for stage, numbers in enumerate(NUMBERS):
            x = torch.nn.functional.max_pool2d(x, 2) if stage else x
            for number in numbers:
                kernel, bias = (torch.tensor(tensors[f"features.{number}.{kind}"]) for kind in ("weight", "bias"))
                x = torch.relu(torch.nn.functional.conv2d(x, kernel, bias, padding=1))
            result.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return result

    distance = torch.zeros(3)
    for stage, (a, b) in enumerate(zip(features(estimate), features(torch.tensor(second)), strict=True)):
        head = torch.tensor(tensors.get(f"lin{stage}.model.1.weight", np.ones((1, a.shape[1], 1, 1), np.float32)))
        distance = distance + ((a - b).square() * head).sum(1).mean((1, 2))
    distance.sum().backward()
    close(value, distance)
    close(gradient, estimate.grad)
    assert np.abs(np.asarray(gradient)).max() > 1e-4
