"""Inception v3's features beside the net written out in torch, layer by layer, with the poolings of TensorFlow's.

The same features at the published widths were compared once, by hand, with torchvision 0.28.0's net (its poolings
replaced by those), on random weights: equal within 1e-4 of their level. torchvision is no dependency of the tests: it
imports beside its own build of torch alone.
"""

import numpy as np
import pytest
from network_weights import inception_tensors

from omni_tokenizers.inception import InceptionFeatures

torch = pytest.importorskip("torch", reason="needs torch")
F = torch.nn.functional

pytestmark = pytest.mark.parity


class Net:
    """Inception v3 up to the mean over positions."""

    def __init__(self, tensors):
        self.tensors = {name: torch.tensor(value) for name, value in tensors.items()}

    def conv(self, name, x, stride=1, padding=0):
        parts = {part: self.tensors[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")}
        x = F.conv2d(x, self.tensors[f"{name}.conv.weight"], stride=stride, padding=padding)
        return F.relu(F.batch_norm(x, **parts, eps=1e-3))

    def chain(self, block, x, *layers):
        for name, padding in layers:
            x = self.conv(f"{block}.{name}", x, padding=padding)
        return x

    def pooled(self, block, x):
        mean = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        return self.conv(f"{block}.branch_pool", mean)

    def five(self, block, x):
        wide = self.chain(block, x, ("branch5x5_1", 0), ("branch5x5_2", 2))
        double = self.chain(block, x, ("branch3x3dbl_1", 0), ("branch3x3dbl_2", 1), ("branch3x3dbl_3", 1))
        return torch.cat([self.conv(f"{block}.branch1x1", x), wide, double, self.pooled(block, x)], 1)

    def to_seventeen(self, block, x):
        double = self.chain(block, x, ("branch3x3dbl_1", 0), ("branch3x3dbl_2", 1))
        double = self.conv(f"{block}.branch3x3dbl_3", double, stride=2)
        return torch.cat([self.conv(f"{block}.branch3x3", x, stride=2), double, F.max_pool2d(x, 3, 2)], 1)

    def seven(self, block, x):
        once = self.chain(block, x, ("branch7x7_1", 0), ("branch7x7_2", (0, 3)), ("branch7x7_3", (3, 0)))
        along, down = (0, 3), (3, 0)
        paddings = (0, down, along, down, along)
        twice = self.chain(block, x, *((f"branch7x7dbl_{n}", padding) for n, padding in enumerate(paddings, 1)))
        return torch.cat([self.conv(f"{block}.branch1x1", x), once, twice, self.pooled(block, x)], 1)

    def to_eight(self, block, x):
        three = self.conv(f"{block}.branch3x3_2", self.conv(f"{block}.branch3x3_1", x), stride=2)
        seven = self.chain(block, x, ("branch7x7x3_1", 0), ("branch7x7x3_2", (0, 3)), ("branch7x7x3_3", (3, 0)))
        seven = self.conv(f"{block}.branch7x7x3_4", seven, stride=2)
        return torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)

    def forked(self, block, x, last):
        def fork(x, name):
            return [self.conv(f"{block}.{name}a", x, padding=(0, 1)), self.conv(f"{block}.{name}b", x, padding=(1, 0))]

        three = fork(self.conv(f"{block}.branch3x3_1", x), "branch3x3_2")
        double = fork(self.chain(block, x, ("branch3x3dbl_1", 0), ("branch3x3dbl_2", 1)), "branch3x3dbl_3")
        pooled = self.conv(f"{block}.branch_pool", F.max_pool2d(x, 3, 1, 1)) if last else self.pooled(block, x)
        return torch.cat([self.conv(f"{block}.branch1x1", x), *three, *double, pooled], 1)

    def __call__(self, pictures):
        x = torch.tensor(pictures).permute(0, 3, 1, 2) / 255 * 2 - 1
        x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
        x = self.conv("Conv2d_2a_3x3", self.conv("Conv2d_1a_3x3", x, stride=2))
        x = F.max_pool2d(self.conv("Conv2d_2b_3x3", x, padding=1), 3, 2)
        x = F.max_pool2d(self.conv("Conv2d_4a_3x3", self.conv("Conv2d_3b_1x1", x)), 3, 2)
        for name in ("5b", "5c", "5d"):
            x = self.five(f"Mixed_{name}", x)
        x = self.to_seventeen("Mixed_6a", x)
        for name in ("6b", "6c", "6d", "6e"):
            x = self.seven(f"Mixed_{name}", x)
        x = self.to_eight("Mixed_7a", x)
        x = self.forked("Mixed_7c", self.forked("Mixed_7b", x, last=False), last=True)
        return x.mean((2, 3)).numpy()


@pytest.mark.parametrize("size", [(64, 96), (320, 296)], ids=["enlarged", "reduced"])
def test_features_are_those_of_the_published_net(size):
    """Every layer, pooling and branch in its place: features within 1e-4 of their level."""
    coarse = np.random.default_rng(0).integers(0, 256, (2, *(side // 8 for side in size), 3), np.uint8)
    pictures, tensors = coarse.repeat(8, 1).repeat(8, 2), inception_tensors(width=8)
    ours, theirs = InceptionFeatures(tensors, "random")(pictures), Net(tensors)(pictures)
    level = np.sqrt(np.square(theirs).mean())
    assert ours.shape == theirs.shape == (2, 48) and np.ptp(theirs, axis=0).max() > 0.01 * level
    assert np.abs(ours - theirs).max() < 1e-4 * level
