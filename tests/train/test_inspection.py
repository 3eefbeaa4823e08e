"""`omni inspect RUN --verify`: every damaged file of every checkpoint is named."""

import json

import pytest
from test_checkpoints import flip, np
from training_cases import regression

from omni.train.loop import train


@pytest.fixture
def trained(tmp_path):
    """A directory in which two trainings have checkpoints at steps 2 and 4."""
    for name in ("a", "b"):
        train(regression(tmp_path / "training" / name, steps=4, checkpoint_every=2))
    return tmp_path


def test_verify(trained, run):
    """Whole checkpoints are said to be whole; a flipped bit in one is named, by people's words and by a program's,
    and fails; a missing manifest does not."""
    code, out, _ = run("inspect", trained, "--verify")
    assert code == 0 and out.count(": whole") == 4
    step = trained / "training" / "b" / "checkpoints" / "4"
    file = next((step / "state").glob("ocdbt*/d/*"))
    flip(file, np.random.default_rng(0))
    (trained / "training" / "a" / "checkpoints" / "2" / "manifest.sha256").unlink()
    code, out, _ = run("inspect", trained, "--verify")
    assert code == 1 and f"{step}: {file.relative_to(step)} is damaged" in out
    assert "a/checkpoints/2: not verified" in out and out.count(": whole") == 2
    code, out, _ = run("inspect", trained, "--verify", "--json")
    assert code == 1 and json.loads(out)[str(step)] == [f"{file.relative_to(step)} is damaged"]


def test_what_has_no_checkpoints_is_one_line(tmp_path, run):
    """A directory without any is an error that says what to name."""
    code, _, err = run("inspect", tmp_path, "--verify")
    assert code == 1 and "no checkpoints to verify" in err and err.count("\n") == 1
