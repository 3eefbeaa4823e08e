"""Lets the tests of this folder import `training_cases` and `documents`, and keeps what they compile."""

import sys
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "data")]


@pytest.fixture(scope="package", autouse=True)
def compiled_once(tmp_path_factory):
    """Many tests train the same net: its step is compiled once."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
