"""Data that a recipe makes once: a directory that appears when it is whole."""

from __future__ import annotations

from collections.abc import Callable

from etils import epath

from omni.train.run_directory import read_json, write_json
from omni_tokenizers.errors import OmniError

MANIFEST = "manifest.json"


def make_once(directory: epath.PathLike, what: str, manifest: dict, fill: Callable[[epath.Path], dict]) -> epath.Path:
    """Lets `fill` write data into a directory that is absent or empty; data of the same manifest is left alone.

    Args:
      what: what it is, for messages.
      manifest: "format", "seed" and whatever else the data is a function of; manifest.json begins with them. What came
        later than some data is null there unless it is chosen.
      fill: writes the data into the directory that it is given, and returns the rest of the manifest.

    Raises:
      OmniError: the directory holds something else, or data of another format or seed.
    """
    directory = epath.Path(directory)
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        if not (directory / MANIFEST).exists():
            raise OmniError(f"{directory}: holds something else than {what}; remove it or choose another directory")
        found = read_json(directory / MANIFEST)
        for name, wanted in manifest.items():
            there = found.get(name) if isinstance(found, dict) else None
            if there != wanted:
                raise OmniError(
                    f"{directory}: made with {name} {there}, not {wanted}; remove it or choose another directory"
                )
        return directory
    partial = directory.parent / f"{directory.name}.partial"
    if partial.exists():
        partial.rmtree()
    partial.mkdir(parents=True)
    write_json(partial / MANIFEST, manifest | fill(partial))
    if directory.exists():
        directory.rmdir()  # it was empty, and a directory is not renamed onto another
    return partial.rename(directory)
