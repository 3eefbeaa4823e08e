"""Paths on disks and in buckets (`gs://`), for what `etils.epath` leaves to its users.

Google's client libraries and their emulators agree on two variables of the environment by which a bucket is looked for
elsewhere: STORAGE_EMULATOR_HOST (epath, by way of gcsfs) and TENSORSTORE_GCS_HTTP_URL (the arrays of checkpoints).
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from etils import epath

from omni_tokenizers.errors import OmniError

CACHE = "OMNI_CACHE"
"""Variable of the environment: the directory for local copies of what can be read from disks only."""
_AHEAD = 1 << 20  # bytes that one request to a bucket asks for at least


class StorageError(OmniError):
    """A bucket does not give what it holds. It says nothing about the file, which may be good."""


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path leads into a bucket."""
    return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """A path that does not depend on the working directory; that of a bucket never does."""
    path = epath.Path(path)
    return path if is_remote(path) else path.resolve()


@contextmanager
def asked(path: epath.PathLike) -> Iterator[None]:
    """What a bucket refuses within becomes a `StorageError` of one line; a file that is not there stays what it is."""
    try:
        yield
    except (OmniError, FileNotFoundError, IsADirectoryError):
        raise
    except Exception as error:  # clients of buckets have exceptions of their own
        if not is_remote(path):
            raise
        raise _refused(path, error) from error


@contextmanager
def reading(path: epath.PathLike) -> Iterator[BinaryIO]:
    """Opens a file for reading bytes at any place; of a bucket, each request gets what is asked for, or 1 MiB.

    Raises:
      FileNotFoundError, IsADirectoryError: as for a disk.
      StorageError: the bucket refuses, at the end of the `with` block also where whoever read took that for the end
        of the file, as decoders do.
    """
    if not is_remote(path):
        with epath.Path(path).open("rb") as stream:
            yield stream
        return
    with asked(path):
        file = _RemoteFile(path)
    try:
        yield io.BufferedReader(file, _AHEAD)
    finally:
        if file.failure is not None:
            raise _refused(path, file.failure) from file.failure


class _RemoteFile(io.RawIOBase):
    """A file of a bucket, by requests for ranges, which gcsfs makes again after a while where they fail.

    Attributes:
      failure: why the file seemed to end before its end, if it did.
    """

    def __init__(self, path: epath.PathLike):
        import fsspec

        self._path = os.fspath(path)
        self._bucket = fsspec.filesystem(self._path.partition("://")[0])
        found = self._bucket.info(self._path)
        if found["type"] == "directory":
            raise IsADirectoryError(self._path)
        self._size, self._place = found["size"], 0
        self.failure: Exception | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        if place < 0:
            raise OSError(f"{self._path}: no place {place}")
        self._place = place
        return place

    def readinto(self, buffer) -> int:
        end = min(self._place + len(buffer), self._size)
        if end <= self._place or self.failure is not None:
            return 0
        try:
            found = self._bucket.cat_file(self._path, self._place, end)
            if len(found) != end - self._place:
                raise OSError(f"{len(found)} bytes arrived instead of {end - self._place}")
        except Exception as error:  # raised by `reading`: decoders in C swallow it, or print it
            self.failure = error
            return 0
        buffer[: len(found)] = found
        self._place = end
        return len(found)


def _refused(path: epath.PathLike, error: Exception) -> StorageError:
    return StorageError(f"{os.fspath(path)}: cannot be read ({' '.join(str(error).split()) or type(error).__name__})")


def local_copy(path: epath.PathLike, size: int) -> str:
    """A file's path on a disk: its own, or that of a copy in OMNI_CACHE, which is made if it is not there yet.

    Args:
      size: bytes of the whole file.

    Raises:
      OmniError: what was copied has another size.
      StorageError: the bucket refuses.
    """
    path = epath.Path(path)
    if not is_remote(path):
        return os.fspath(path)
    root = Path(os.environ.get(CACHE) or Path(tempfile.gettempdir()) / f"omni-{os.getuid()}")
    with asked(path):
        written_at = path.stat().mtime
    name = hashlib.sha256(f"{os.fspath(path)} {written_at}".encode()).hexdigest()[:32]
    copy = root / f"{name}-{path.name}"
    if not (copy.exists() and copy.stat().st_size == size):
        root.mkdir(parents=True, exist_ok=True)
        partial = root / f"{copy.name}.{os.getpid()}"
        with reading(path) as source, partial.open("wb") as target:
            while chunk := source.read(1 << 24):
                target.write(chunk)
        if partial.stat().st_size != size:
            raise OmniError(f"{path}: {partial.stat().st_size} bytes arrived instead of {size}; run again")
        partial.replace(copy)
    return os.fspath(copy)


@contextmanager
def written(path: epath.PathLike) -> Iterator[str]:
    """Yields where to write a file with what writes to disks only; afterwards it is at `path`."""
    path = epath.Path(path)
    if not is_remote(path):
        yield os.fspath(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / path.name
        yield os.fspath(file)
        upload(file, path)


def upload(file: Path, path: epath.Path) -> None:
    """Copies a file of a disk to a path, in pieces."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with file.open("rb") as source, path.open("wb") as target:
        while chunk := source.read(1 << 24):
            target.write(chunk)
