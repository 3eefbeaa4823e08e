"""One device and eight, however they are laid out, are the same run within float32's rounding."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from host_devices import host_devices

DENSE = ["data=8", "fsdp=8", "data=1,tensor=8", "data=1,context=8", "data=2,fsdp=2,tensor=2", "slice=2,data=1,fsdp=4"]
MIXED = ["data=2,expert=4", "data=1,fsdp=2,expert=2,tensor=2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Directories of npz files of 50 steps on each mesh: of a dense transformer, and of one with four experts."""
    root = tmp_path_factory.mktemp("meshes")
    environment = host_devices(8)
    for name, experts, meshes in (("dense", 0, DENSE), ("mixed", 4, MIXED)):
        (root / name).mkdir()
        command = [sys.executable, str(Path(__file__).parent / "meshes.py"), str(root / name), "50", str(experts)]
        done = subprocess.run([*command, "one", *meshes], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.mark.multiprocess
@pytest.mark.parametrize(("kind", "mesh"), [*(("dense", mesh) for mesh in DENSE), *(("mixed", mesh) for mesh in MIXED)])
def test_every_mesh_is_the_same_run(runs, kind, mesh):
    """50 losses under a peak learning rate of 1e-3 and the first step's gradient, within 1e-5 of one device's."""
    one, several = (np.load(runs / kind / f"{name}.npz") for name in ("one", mesh))
    assert one["losses"].shape == (50,) and one["losses"][-1] < one["losses"][0] - 0.3
    np.testing.assert_allclose(several["losses"], one["losses"], atol=1e-5)
    gradients = [name for name in one.files if name.startswith("gradient.")]
    assert len(gradients) > 10 and all(np.abs(one[name]).max() > 1e-4 for name in gradients)
    for name in gradients:
        np.testing.assert_allclose(several[name], one[name], atol=1e-5, err_msg=name)
