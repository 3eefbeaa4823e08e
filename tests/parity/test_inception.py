"""Inception v3's features beside torchvision's net, with the poolings that the published weights were trained with."""

import types

import numpy as np
import pytest

from omni_tokenizers.inception import InceptionFeatures

torch = pytest.importorskip("torch", reason="needs torch")
try:
    inception = pytest.importorskip("torchvision.models.inception", reason="needs torchvision")
except RuntimeError:
    # Its compiled operators belong to another build of torch; its nets need none of them, only their declarations.
    operators = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    inception = pytest.importorskip("torchvision.models.inception", reason="needs torchvision")

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def net():
    """torchvision's net with random weights and statistics that keep the size of what passes through."""
    torch.manual_seed(0)
    net = inception.Inception3(aux_logits=False, init_weights=False).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                torch.nn.init.uniform_(tensor, 0.7, 1.3)
            for tensor in (module.bias, module.running_mean):
                torch.nn.init.normal_(tensor, std=0.1)
    return net


def their_features(net, pictures, monkeypatch):
    """What the classifier is given."""
    F, in_last = torch.nn.functional, []

    def pooled(x, kernel_size, stride, padding):
        if in_last:
            return F.max_pool2d(x, kernel_size, stride, padding)
        return F.avg_pool2d(x, kernel_size, stride, padding, count_include_pad=False)

    kept = types.SimpleNamespace(**{name: getattr(F, name) for name in ("relu", "max_pool2d")}, avg_pool2d=pooled)
    monkeypatch.setattr(inception, "F", kept)
    features = []
    hooks = [
        net.Mixed_7c.register_forward_pre_hook(lambda *_: in_last.append(True)),
        net.avgpool.register_forward_hook(lambda _, __, output: features.append(output.flatten(1))),
    ]
    x = torch.tensor(pictures).permute(0, 3, 1, 2) / 255 * 2 - 1
    with torch.no_grad():
        net(F.interpolate(x, (299, 299), mode="bilinear", align_corners=False))
    for hook in hooks:
        hook.remove()
    return features[0].numpy()


@pytest.mark.parametrize("size", [(64, 96), (320, 296)], ids=["enlarged", "reduced"])
def test_features_are_those_of_the_published_net(net, size, monkeypatch):
    """Every layer, pooling and branch in its place: features within 1e-4 of their level."""
    coarse = np.random.default_rng(0).integers(0, 256, (2, *(side // 8 for side in size), 3), np.uint8)
    pictures = coarse.repeat(8, 1).repeat(8, 2)
    tensors = {name: value.numpy() for name, value in net.state_dict().items()}
    ours = InceptionFeatures(tensors, "random")(pictures)
    theirs = their_features(net, pictures, monkeypatch)
    level = np.sqrt(np.square(theirs).mean())
    assert ours.shape == (2, 2048) and np.ptp(theirs, axis=0).max() > 0.01 * level
    assert np.abs(ours - theirs).max() < 1e-4 * level
