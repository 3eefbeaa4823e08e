"""Generation on a mesh of devices is generation on one."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from host_devices import host_devices

WORKER = Path(__file__).with_name("sharded_worker.py")


def launch(devices: int, *others: str) -> subprocess.Popen:
    command = [sys.executable, str(WORKER), *others]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=host_devices(devices), stdout=pipe, stderr=pipe, text=True)


def printed(process: subprocess.Popen) -> dict:
    out, error = process.communicate(timeout=600)
    assert process.returncode == 0, error[-3000:]
    return json.loads(next(line for line in out.splitlines() if line.startswith("{")))  # gloo prints, too


@pytest.fixture(scope="module")
def found() -> dict:
    """By eight devices of one process."""
    return printed(launch(8))


@pytest.mark.slow
def test_same_replies_on_every_mesh(found):
    """Tokens, greedy and drawn, with guidance and without, are those of one device on every mesh, where each device
    holds its part of the weights alone."""
    one = found["one device"]
    meshes = ("one device", "tensor 4 x data 2", "tensor 2 x fsdp 4", "data 8")
    plain = {name: found[name] for name in found if "held" not in name and "int8" not in name}
    assert plain == dict.fromkeys(meshes, one)
    assert found["data 8, share held"] == 1
    assert found["tensor 2 x fsdp 4, share held"] < 0.2 and found["tensor 4 x data 2, share held"] < 0.4


@pytest.mark.slow
def test_same_replies_in_int8(found):
    """So they are with weights and cache in int8, other replies than in float32."""
    one = found["int8, one device"]
    assert found["int8, tensor 4 x data 2"] == found["int8, tensor 2 x fsdp 4"] == one != found["one device"]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_same_replies_of_two_processes(found):
    """Four devices each, tensor 4 x data 2 over both, and a sliced head: each has all replies, those of one device."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [launch(4, address, "2", str(number)) for number in range(2)]
    for process in processes:
        theirs = printed(process)
        assert theirs["tensor 4 x data 2"] == found["one device"]
        assert theirs["int8, tensor 4 x data 2"] == found["int8, one device"]
