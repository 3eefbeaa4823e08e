"""A transformer's training that is killed at random moments, ten times and some of them in a save, ends the same."""

import pytest
from killed_trainings import kill_loop


@pytest.mark.slow
def test_kills_change_nothing(tmp_path):
    """Parameters, moments, averages, data position and every line of the log have the bits of an undisturbed run's,
    and SIGTERM besides the kills has code 75."""
    settings = ("steps=1500", "log_every=1", "checkpoint_every=25", "dropout=0.1")
    result = kill_loop(tmp_path, settings, kills=10)
    assert all(result["same"].values()), result
    assert sum(stop["inside a save"] for stop in result["stops"]) >= 2, result["stops"]
    assert all(stop["code"] == -9 for stop in result["stops"][:-1])
