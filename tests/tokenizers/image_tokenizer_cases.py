"""Recorded image tokenizers: what `tests/fixtures/image_tokenizers.py` wrote, as the files that people have.

Weights are not stored but for the codebooks: they come again from the seed, by numpy's generator whose numbers are
promised to stay.
"""

import json
from pathlib import Path

import numpy as np

from omni_tokenizers import weights

FIXTURES = Path(__file__).parents[1] / "fixtures"
DIRECTORIES = ("chameleon", "janus", "emu3")
"""Cases that are directories of transformers; the others are single files."""


def recorded() -> tuple[dict, dict[str, np.ndarray]]:
    """For each case its configuration and its tensors' shapes; and the arrays, "case/name" each."""
    description = json.loads((FIXTURES / "image_tokenizers.json").read_text())
    with np.load(FIXTURES / "image_tokenizers.npz") as arrays:
        return description, dict(arrays)


def random_tensors(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Norms about 1, biases about 0, matrices that keep the size of what they map; pictures that fit into 0 to 255.

    Running variances are about 0.01, so that the epsilon beside them counts, and the scales after them 0.1.
    """
    generator, tensors = np.random.RandomState(0), {}
    for name, shape in shapes.items():
        noise = generator.standard_normal(shape)
        if len(shape) > 1:
            value = noise / np.sqrt(np.prod(shape[1:]))
        elif name.endswith("running_var"):
            value = 0.01 * np.square(1 + 0.3 * noise)
        else:
            value = 0.3 * noise + ("norm" in name and name.endswith("weight"))
        if name.startswith("decoder.conv_out."):
            value *= 0.3
        if name.endswith("weight") and name.replace("weight", "running_var") in shapes:
            value *= 0.1
        tensors[name] = value.astype(np.float32)
    return tensors


def pictures() -> np.ndarray:
    """uint8 [2, 9, 11, 3]: no multiple of any stride."""
    return np.random.RandomState(1).randint(0, 256, (2, 9, 11, 3)).astype(np.uint8)


def videos() -> np.ndarray:
    """uint8 [1, 7, 9, 11, 3], no multiple of the stride in time either."""
    return np.random.RandomState(2).randint(0, 256, (1, 7, 9, 11, 3)).astype(np.uint8)


def tensors_of(case: str) -> dict[str, np.ndarray]:
    """All tensors of a case under their names there."""
    description, arrays = recorded()
    return random_tensors(description[case]["shapes"]) | {"quantize.embedding.weight": arrays[f"{case}/codebook"]}


def write(case: str, directory: Path, tensors: dict[str, np.ndarray] | None = None) -> Path:
    """The checkpoint of a case, a directory or a file in it; `tensors` in place of its own."""
    tensors = tensors_of(case) if tensors is None else tensors
    if case not in DIRECTORIES:
        weights.write(directory / f"{case}.safetensors", tensors)
        return directory / f"{case}.safetensors"
    weights.write(directory / "model.safetensors", tensors)
    (directory / "config.json").write_text(json.dumps(recorded()[0][case]["config"]))
    return directory
