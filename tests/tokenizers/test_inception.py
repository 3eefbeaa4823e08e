"""The Fréchet distance, and what is said of weights that are none."""

import numpy as np
import pytest
import scipy.linalg
from network_weights import inception_tensors

from omni_tokenizers.errors import OmniError, UsageError
from omni_tokenizers.inception import InceptionFeatures, frechet_distance


@pytest.mark.parametrize("pictures", [20, 200], ids=["few", "many"])
def test_frechet_distance_is_its_formula(pictures):
    """As equation 6 has it, with scipy's root of a matrix, for fewer and for more pictures than features."""
    rng = np.random.default_rng(0)
    first = rng.normal(size=(200, 30)) @ rng.normal(size=(30, 30))
    second = 0.5 + rng.normal(size=(pictures, 30)) @ rng.normal(size=(30, 30))
    one, two = np.cov(first.T), np.cov(second.T)
    root = scipy.linalg.sqrtm(one @ two).real
    expected = np.square(first.mean(0) - second.mean(0)).sum() + np.trace(one + two - 2 * root)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-5)
    assert abs(frechet_distance(first, first)) < 1e-8 * expected
    with pytest.raises(UsageError, match="two pictures"):
        frechet_distance(first[:1], second)


def test_features_do_not_depend_on_company():
    """A picture alone, among others, and beyond what goes through the net together."""
    net = InceptionFeatures(inception_tensors(), "narrow")
    pictures = np.random.default_rng(0).integers(0, 256, (18, 2, 3, 3), np.uint8).repeat(10, 1).repeat(10, 2)
    features = net(pictures)
    assert features.shape == (18, 24) and np.ptp(features, axis=0).max() > 1e-3
    np.testing.assert_allclose(net(pictures[17:]), features[17:], atol=1e-5)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda tensors: tensors.pop("Mixed_6b.branch7x7_2.bn.bias"), "'Mixed_6b.branch7x7_2.bn.bias'.*missing"),
        (lambda tensors: tensors["Mixed_7c.branch_pool.bn.weight"].fill(np.nan), "'Mixed_7c.branch_pool.bn.weight'"),
        (lambda tensors: tensors.update({"Conv2d_2a_3x3.bn.bias": np.zeros(3)}), r"Conv2d_2a_3x3.bn.bias.*\(4,\)"),
        (lambda tensors: tensors.update({"Conv2d_2a_3x3.conv.weight": np.zeros((4, 9))}), "four axes"),
        (lambda tensors: tensors.update({"Conv2d_2a_3x3.conv.weight": np.zeros((4, 9, 3, 3))}), "do not fit"),
    ],
    ids=["missing", "not a number", "size", "axes", "channels"],
)
def test_damaged_weights_are_named(damage, complaint):
    """Missing, not finite, or of another shape."""
    tensors = inception_tensors()
    damage(tensors)
    with pytest.raises(OmniError, match=f"narrow: .*{complaint}"):
        InceptionFeatures(tensors, "narrow")
