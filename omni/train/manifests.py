"""Manifests of checkpoints: the SHA-256 of every file, so that a damaged one is found before anything is made of it.

A manifest has the lines of `sha256sum`, which checks it too, and a last one with the hash of the lines before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from etils import epath

MANIFEST = "manifest.sha256"
_CHUNK = 1 << 22
_THREADS = 8
_LAST = "# these lines: "


def write_manifest(directory: epath.Path) -> None:
    """Writes the manifest of a directory whose files will not change any more; `OSError` if that fails."""
    files = _files(directory)
    with ThreadPoolExecutor(_THREADS) as pool:
        hashes = pool.map(lambda file: _hash(directory / file), files)
        lines = "".join(f"{hash_}  {file}\n" for hash_, file in zip(hashes, files, strict=True))
    partial = directory / f"{MANIFEST}.partial"
    partial.write_text(f"{lines}{_LAST}{_hash_text(lines)}\n")
    partial.replace(directory / MANIFEST)


def has_manifest(directory: epath.Path) -> bool:
    """Whether a directory can be verified; one that was written by an earlier version cannot."""
    return (directory / MANIFEST).exists()


def verify(directory: epath.Path, share: tuple[int, int] = (0, 1)) -> list[str]:
    """What is wrong with the files of a directory, a line with the name for each; empty if they are the manifest's.

    Args:
      share: (i, n) reads the contents of every n-th file from the i-th on, so that n processes read each once.
    """
    text = (directory / MANIFEST).read_bytes()
    lines, _, last = text.rpartition(_LAST.encode())
    if last != f"{_hash_text(lines)}\n".encode():
        return [f"{MANIFEST} is damaged"]
    expected = {file: hash_ for hash_, file in (line.split("  ", 1) for line in lines.decode().splitlines())}
    found = _files(directory)
    wrong = [f"{file} is missing" for file in sorted(expected.keys() - set(found))]
    wrong += [f"{file} is not in the manifest" for file in sorted(set(found) - expected.keys())]
    present = sorted(expected.keys() & set(found))
    return wrong + _changed(directory, present[share[0] :: share[1]], expected)


def _changed(directory: epath.Path, files: Sequence[str], expected: dict[str, str]) -> list[str]:
    with ThreadPoolExecutor(_THREADS) as pool:
        hashes = pool.map(lambda file: _hash(directory / file), files)
        return [f"{file} is damaged" for file, hash_ in zip(files, hashes, strict=True) if hash_ != expected[file]]


def _files(directory: epath.Path) -> list[str]:
    """The names of all files of a directory and those below it but for the manifest, sorted."""
    names, pending = [], [""]
    while pending:
        folder = pending.pop()
        for path in (directory / folder).iterdir():
            name = f"{folder}{path.name}"
            if path.is_dir():
                pending.append(f"{name}/")
            elif name != MANIFEST:
                names.append(name)
    return sorted(names)


def _hash(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _hash_text(text: str | bytes) -> str:
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()
