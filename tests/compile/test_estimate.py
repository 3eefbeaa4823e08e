"""The arithmetic of a step's roofline."""

import dataclasses

import numpy as np
import pytest

from omni.accelerators import ACCELERATORS
from omni.compile.estimate import Estimate, estimate, recomputed_flops_per_token
from omni.compile.schedule import Program
from omni.model.config import TENSORS
from omni.model.presets import PRESETS, parameter_count, training_flops_per_token

NOTHING = "ENTRY %main () -> () {\n}\n"


def test_flops_of_a_token():
    """6 for each parameter but the embedding's, and half of attention's scores; experts count as many as are used."""
    config = PRESETS["7b"]
    used = parameter_count(config) - config.vocabulary_size * config.dim
    attention = 12 * config.depth * config.heads * config.head_dim * 4096 / 2
    assert training_flops_per_token(config, 4096) == 6 * used + attention
    mixed = dataclasses.replace(config, experts=8, experts_per_token=1)
    router = 6 * config.depth * config.dim * 8
    assert training_flops_per_token(mixed, 4096) == training_flops_per_token(config, 4096) + router


def test_what_is_computed_anew():
    """With nothing kept a forward pass of the blocks, less the product that ends each; with all kept the logits."""
    config = dataclasses.replace(PRESETS["7b"], remat="blocks")
    logits = 2 * config.vocabulary_size * config.dim
    forward = training_flops_per_token(config, 4096) / 3 - logits
    ends = 2 * config.depth * config.mlp_dim * config.dim
    norms = (
        2 * (parameter_count(config) - config.depth * (4 * config.dim**2 + 3 * config.dim * config.mlp_dim))
        - 2 * logits
    )
    scores = config.depth * config.heads * config.head_dim * 4096
    assert recomputed_flops_per_token(config, 4096) == pytest.approx(forward - ends + logits - norms + scores)
    for kept in ({"saved": TENSORS}, {"remat": "none"}):
        assert recomputed_flops_per_token(dataclasses.replace(config, **kept), 4096) == logits + scores


def test_rows_that_are_split():
    """Of c stretches of a row the last has (2 - 1 / c) times the mean to look back at, and the others wait for it."""
    config = dataclasses.replace(PRESETS["7b"], remat="blocks", saved=("attention",))
    one, four = (
        estimate(Program(NOTHING, 4), config, 6e10, 100, 4096, [0] * 4, ACCELERATORS["v5p"], stretches)
        for stretches in (1, 4)
    )
    seen = np.arange(1, 4097).reshape(4, -1).mean(axis=1)
    attention = 100 * 7 * config.depth * config.heads * config.head_dim * 4096
    assert four.hardware_flops - one.hardware_flops == pytest.approx(attention * (seen[-1] / seen.mean() - 1), rel=1e-3)
    assert four.model_flops == one.model_flops == 6e12 and four.mfu() < one.mfu()


def test_utilisation():
    """What is sent beside computation costs nothing up to its length; the rest is waited for; memory in one end."""
    device = dataclasses.replace(
        ACCELERATORS["v5p"], flops=100.0, memory_rate=100.0, link_rate=100.0, network_rate=10.0
    )
    whole = Estimate(600.0, 800.0, 200.0, 100.0, 10.0, 0.5, device)
    assert whole.seconds() == {"matrix": 8.0, "memory": 2.0, "interconnect": 2.0}
    assert whole.mfu() == (6 / 11, 6 / 9)
    assert whole.to_json()["binds"] == "matrix"
