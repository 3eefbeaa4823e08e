"""Lets the tests of this folder import `evaluation_fakes`."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import evaluation_fakes


@pytest.fixture(scope="session")
def data():
    """A small world of five classes."""
    return evaluation_fakes.make_data()
