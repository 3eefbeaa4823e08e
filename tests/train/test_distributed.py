"""How a process of several is told of the others."""

import jax
import pytest

from omni.train import distributed
from omni_tokenizers.errors import OmniError, UsageError

ALL = {"OMNI_COORDINATOR": "10.0.0.1:8000", "OMNI_PROCESSES": "4", "OMNI_PROCESS": "3"}


@pytest.fixture
def joined(monkeypatch):
    """What jax is asked to join."""
    calls = []
    monkeypatch.setattr(distributed, "initialize", lambda *arguments: calls.append(arguments))
    return calls


@pytest.mark.parametrize(
    "said, environment, expected",
    [
        ({}, {}, []),
        ({}, ALL, [("10.0.0.1:8000", 4, 3)]),
        ({"process": 0, "coordinator": "[::1]:1"}, ALL, [("[::1]:1", 4, 0)]),
        ({"detect": True}, ALL, [("10.0.0.1:8000", 4, 3)]),
        ({"detect": True}, {}, [(None, None, None)]),
        ({}, {"OMNI_DISTRIBUTED": "1"}, [(None, None, None)]),
    ],
)
def test_joins_what_it_is_told_of(joined, said, environment, expected):
    """Arguments come before the environment, both before detection, and a process that is told nothing is alone."""
    distributed.join(**said, environment=environment)
    assert joined == expected


@pytest.mark.parametrize(
    "change, message",
    [
        ({"OMNI_PROCESS": None}, "--process (OMNI_PROCESS) missing"),
        ({"OMNI_PROCESSES": "four"}, "whole numbers"),
        ({"OMNI_PROCESS": "4"}, "numbered from 0 to 3"),
        ({"OMNI_COORDINATOR": "10.0.0.1"}, "host:port"),
    ],
)
def test_what_does_not_fit_together(joined, change, message):
    """Half a description of several processes is an error that names the rest."""
    environment = {name: value for name, value in (ALL | change).items() if value is not None}
    with pytest.raises(UsageError) as error:
        distributed.join(environment=environment)
    assert message in str(error.value) and not joined


@pytest.mark.parametrize(
    "detect, environment, expected, asked",
    [
        (False, {}, (1, 0), []),
        (False, {"OMNI_PROCESSES": "4", "OMNI_PROCESS": "3"}, (4, 3), []),
        (True, ALL | {"OMNI_DISTRIBUTED": "1"}, (4, 3), []),
        (False, {"OMNI_DISTRIBUTED": "1"}, (5, 2), [(None, None, None), "parted"]),
        (True, {}, (5, 2), [(None, None, None), "parted"]),
    ],
)
def test_shares_of_a_work(joined, monkeypatch, detect, environment, expected, asked):
    """Numbers that are said are taken as they are; where jax has to find them, the run is left at once."""
    monkeypatch.setattr(jax, "process_count", lambda: 5)
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: joined.append("parted"))
    assert distributed.share(detect, environment) == expected
    assert joined == asked


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"OMNI_PROCESS": "0"}, "OMNI_PROCESSES and OMNI_PROCESS one is missing"),
        ({"OMNI_PROCESSES": "2", "OMNI_PROCESS": "2"}, "numbered from 0 to 1"),
        ({"OMNI_PROCESSES": "2", "OMNI_PROCESS": "one"}, "whole numbers"),
    ],
)
def test_shares_that_are_none(joined, environment, message):
    """Half of the numbers, or numbers of no process, are an error, whatever there would be to find."""
    with pytest.raises(UsageError, match=message):
        distributed.share(True, environment)
    assert not joined


def test_nothing_to_detect(monkeypatch):
    """--distributed on a machine that belongs to no cluster says so."""
    for name in ("SLURM_JOB_ID", "KUBERNETES_SERVICE_HOST", "OMPI_COMM_WORLD_SIZE", "JAX_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # this process is not to change
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    with pytest.raises(UsageError, match="no TPU pod, Slurm job"):
        distributed.join(detect=True, environment={})


def test_too_late(monkeypatch):
    """An experiment that has used a device before the processes are joined is an error of one line."""
    jax.devices()
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    with pytest.raises(OmniError, match="could not be joined"):
        distributed.join(environment=ALL)
