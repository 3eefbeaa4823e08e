"""Lets the tests of this folder import `training_cases` and `documents`."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "data")]
