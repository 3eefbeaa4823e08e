"""Who is missing, as the coordination service says it; what really happens is in tests/multiprocess."""

import jax
import pytest

from omni.train.lost import missing

TIMED_OUT = """DEADLINE_EXCEEDED: Barrier timed out. Id: omni: step 5::0. This usually happens because a task triggered
the barrier too early or too slowly.
# of tasks that reached the barrier: 1/16.
The first task at the barrier: {first}. Some timed out task names:
{names}


RPC: /xla.coordination.CoordinationService/Barrier [type.googleapis.com/tensorflow.CoordinationServiceError='']"""


@pytest.mark.parametrize("prefix", ["", "/job:jax_worker/replica:0/task:"])
def test_the_missing_are_named(monkeypatch, prefix):
    """One or several, as a number or as a longer name, and no other number of the message."""
    monkeypatch.setattr(jax, "process_count", lambda: 16)
    for ranks in (["3"], ["3", "11"]):
        message = TIMED_OUT.format(first=f"{prefix}2", names="\n".join(prefix + rank for rank in ranks))
        assert missing(message) == f"process {', '.join(ranks)} of 16 is lost or hangs"
    assert missing("UNAVAILABLE: failed to connect to all addresses") == ""
