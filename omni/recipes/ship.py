"""Puts a trained run of the digits recipe into the package: float16 weights, measured as they are shipped.

    python -m omni.recipes.ship runs/digits omni/recipes/models/digits

Beside the weights stands made.json: the commands, the seconds of each stage, the matrix and all else that was measured
on the shipped files, and the SHA-256 of each of them. To measure them again: `omni eval runs/digits --model digits
--output out/`.
"""

import argparse
import hashlib
import json
import shutil
import tempfile
from pathlib import Path

from etils import epath

import omni
from omni.exits import exits
from omni.recipes.digits import Stages, evaluate_run

LARGEST = 4_500_000


def main() -> None:
    """Exports, measures, and writes made.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--trained-by", default="omni train experiments/digits.py", help="the command to note down")
    options = parser.parse_args()
    if options.directory.exists() and not (options.directory / "made.json").exists():
        parser.error(f"{options.directory} is there and was not made by this script; it would be replaced")
    with tempfile.TemporaryDirectory() as scratch:
        exported = Path(scratch) / "exported"
        with exits():
            omni.load(options.run).save(exported, dtype="float16")
        files = sorted(path for path in exported.rglob("*") if path.is_file())
        weight = sum(path.stat().st_size for path in files)
        if weight > LARGEST:
            parser.error(f"the files take {weight:,} bytes, the package has room for {LARGEST:,}")
        results = evaluate_run(options.run, Path(scratch) / "measured", model=exported)
        made = {
            "commands": [options.trained_by, f"python -m omni.recipes.ship {options.run} {options.directory}"],
            "training_seconds": Stages(epath.Path(options.run)).seconds(),
            "sha256": {str(f.relative_to(exported)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files},
            "results": results,
        }
        (exported / "made.json").write_text(json.dumps(made, indent=1) + "\n")
        if options.directory.exists():
            shutil.rmtree(options.directory)
        shutil.copytree(exported, options.directory)
    print(f"wrote {options.directory} ({weight / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()
