"""Narrow random weights of Inception v3, with the names and sizes of kernels that the published ones have."""

import numpy as np

_SIZES = {
    "Conv2d_1a_3x3": (3, 3),
    "Conv2d_2a_3x3": (3, 3),
    "Conv2d_2b_3x3": (3, 3),
    "Conv2d_3b_1x1": (1, 1),
    "Conv2d_4a_3x3": (3, 3),
    "branch1x1": (1, 1),
    "branch3x3": (3, 3),
    "branch5x5_1": (1, 1),
    "branch5x5_2": (5, 5),
    "branch3x3_1": (1, 1),
    "branch3x3_2": (3, 3),
    "branch3x3_2a": (1, 3),
    "branch3x3_2b": (3, 1),
    "branch3x3dbl_1": (1, 1),
    "branch3x3dbl_2": (3, 3),
    "branch3x3dbl_3": (3, 3),
    "branch3x3dbl_3a": (1, 3),
    "branch3x3dbl_3b": (3, 1),
    "branch7x7_1": (1, 1),
    "branch7x7_2": (1, 7),
    "branch7x7_3": (7, 1),
    "branch7x7dbl_1": (1, 1),
    "branch7x7dbl_2": (7, 1),
    "branch7x7dbl_3": (1, 7),
    "branch7x7dbl_4": (7, 1),
    "branch7x7dbl_5": (1, 7),
    "branch7x7x3_1": (1, 1),
    "branch7x7x3_2": (1, 7),
    "branch7x7x3_3": (7, 1),
    "branch7x7x3_4": (3, 3),
    "branch_pool": (1, 1),
}
_STEM = [name for name in _SIZES if name.startswith("Conv2d")]
_A = "branch1x1 branch5x5_1 branch5x5_2 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3 branch_pool"
_B = "branch3x3 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3"
_C = (
    "branch1x1 branch7x7_1 branch7x7_2 branch7x7_3 "
    + " ".join(f"branch7x7dbl_{n}" for n in range(1, 6))
    + " branch_pool"
)
_D = "branch3x3_1 branch3x3_2 branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4"
_E = (
    "branch1x1 branch3x3_1 branch3x3_2a branch3x3_2b branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a branch3x3dbl_3b "
    "branch_pool"
)
_BLOCKS = {"5b": _A, "5c": _A, "5d": _A, "6a": _B, "6b": _C, "6c": _C, "6d": _C, "6e": _C, "7a": _D, "7b": _E, "7c": _E}
_OUTPUTS = {_A: 4, _B: 2, _C: 4, _D: 2, _E: 6}  # convolutions whose results leave a block


def inception_tensors(width: int = 4) -> dict[str, np.ndarray]:
    """Every convolution has `width` channels; a block gives as many for each of its branches."""
    rng, tensors, inputs = np.random.default_rng(0), {}, 3

    def add(name: str, size: tuple[int, int], inputs: int) -> None:
        tensors[f"{name}.conv.weight"] = rng.normal(0, (2 / inputs / size[0] / size[1]) ** 0.5, (width, inputs, *size))
        for part in ("weight", "running_var"):
            tensors[f"{name}.bn.{part}"] = rng.uniform(0.7, 1.3, width)
        tensors[f"{name}.bn.running_mean"] = rng.normal(0, 0.1, width)
        tensors[f"{name}.bn.bias"] = rng.uniform(0.2, 0.6, width)  # so that few channels are 0 everywhere

    for name in _STEM:
        add(name, _SIZES[name], inputs)
        inputs = width
    for block, names in _BLOCKS.items():
        for name in names.split():
            first = name in ("branch1x1", "branch3x3", "branch_pool") or name.endswith("_1")
            add(f"Mixed_{block}.{name}", _SIZES[name], inputs if first else width)
        passed = inputs if names in (_B, _D) else 0  # the maximum of what came in
        inputs = _OUTPUTS[names] * width + passed
    return {name: value.astype(np.float32) for name, value in tensors.items()}
