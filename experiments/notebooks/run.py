"""Runs notebooks from top to bottom and keeps their outputs in them, but not the times at which cells ran.

python experiments/notebooks/run.py experiments/notebooks/*.ipynb
"""

import os
import sys
import tempfile

import nbclient
import nbformat


def run(path: str) -> None:
    """Runs one in a fresh kernel; it is left as it was where a cell fails.

    All that it writes is thrown away, also where the kernel is ended before it has done so itself.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as directory:
        resources, own = {"metadata": {"path": directory}}, os.environ | {"TMPDIR": directory}
        nbclient.NotebookClient(notebook, timeout=600, record_timing=False, resources=resources).execute(env=own)
    notebook.metadata["language_info"] = {"name": "python"}  # without the version that ran it
    nbformat.write(notebook, path)


for path in sys.argv[1:]:
    print(path, flush=True)
    run(path)
