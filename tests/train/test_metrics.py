"""The log of a run, as its readers find it."""

import os
import struct
import subprocess
import sys
import time

import pytest

from omni.train.metrics import MetricsLog, read_metrics

LOG = """
import sys
from etils import epath
from omni.train.metrics import MetricsLog
directory = epath.Path(sys.argv[1])
directory.mkdir()
with MetricsLog(directory, 0) as log:
    log.write(1, {"loss": 0.5})
print("torch" in sys.modules)
"""


def events(directory) -> list:
    """What TensorBoard reads, in order."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted(directory.glob("events*")):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def test_tensorboard_gets_what_the_log_has(tmp_path):
    """After a run that went on from step 2, the log has each step once, and TensorBoard is told to forget those behind
    step 2."""
    for first in (1, 3):
        with MetricsLog(tmp_path, first - 1) as log:
            for step in range(first, first + 3):
                log.write(step, {"loss": 10.0 * first + step})
        time.sleep(1.1)  # events' files are named by the second
    assert [line["loss"] for line in read_metrics(tmp_path)] == [11, 12, 33, 34, 35]
    steps = [(x.step, x.summary.value[0].simple_value) for x in events(tmp_path / "tensorboard") if x.summary.value]
    assert steps == [(1, 11), (2, 12), (3, 13), (3, 33), (4, 34), (5, 35)]
    purged = [x.step for x in events(tmp_path / "tensorboard") if x.session_log.status]
    assert purged == [1, 3]


def test_an_installed_torch_is_left_alone(tmp_path):
    """Logging does not import torch where it is installed: that takes seconds of every start."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", LOG, str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr
    assert pytest.approx(0.5) == read_metrics(tmp_path / "run")[0]["loss"]
