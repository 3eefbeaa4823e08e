"""Generation on a mesh of devices is generation on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_same_replies_on_every_mesh():
    """Tokens, greedy and drawn, with guidance and without, are those of one device on every mesh, where each device
    holds its part of the weights alone."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    worker = Path(__file__).with_name("sharded_worker.py")
    done = subprocess.run([sys.executable, str(worker)], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    one = found.pop("one device")
    assert {name: found[name] for name in found if "held" not in name} == dict.fromkeys(
        ("tensor 4 x data 2", "tensor 2 x fsdp 4", "data 8"), one
    )
    assert found["data 8, share held"] == 1
    assert found["tensor 2 x fsdp 4, share held"] < 0.2 and found["tensor 4 x data 2, share held"] < 0.4
