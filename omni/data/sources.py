"""Where documents come from, before they are tokens: samples by number, of whatever kind of files.

A `Source` is configuration, a `Samples` what stands behind it. Reading by number is what lets any number of processes
share a source, and go on in its middle, without agreeing on anything but its size.
"""

from __future__ import annotations

import abc
from pathlib import Path, PurePosixPath
from typing import Any

from etils import epath

from omni.parts import Part
from omni.storage import asked, is_remote
from omni_tokenizers.errors import OmniError

MAX_NAME = 1024
"""Bytes of the name of a bucket's object, as Google has it."""


class Samples(abc.ABC):
    """Documents by number, read by several threads at once."""

    @property
    @abc.abstractmethod
    def description(self) -> dict[str, Any]:
        """JSON from which one knows the same samples again: files and their sizes."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many there are, good and bad."""

    @abc.abstractmethod
    def where(self, index: int) -> tuple[epath.Path, int | str]:
        """The file of a sample and its place there: a line from 1, a row or record from 0, a name in an archive."""

    def name(self, index: int) -> str:
        """What a sample is called in messages: its file and the place there."""
        return "{}:{}".format(*self.where(index))

    def origin(self, index: int) -> str:
        """What token shards say of a sample: as `name`, without the folder, and in UTF-8."""
        file, place = self.where(index)
        return f"{file.name}:{place}".encode(errors="backslashreplace").decode()

    @abc.abstractmethod
    def __getitem__(self, index: int) -> list[Part]:
        """The parts of a document, context first; `OmniError` says what is wrong with a bad one."""

    @abc.abstractmethod
    def texts(self, index: int) -> list[str]:
        """The texts of a document alone, for which no picture and no sound is decoded; errors as for all of it."""


class Source(abc.ABC):
    """Which samples. Subclasses are frozen dataclasses, whose fields are the configuration."""

    @abc.abstractmethod
    def open(self) -> Samples:
        """The samples; `OmniError` where there are none."""


def check_document(parts: list[Part]) -> list[Part]:
    """The parts of a document, when they can be one; `OmniError` otherwise."""
    contexts = [part.context for part in parts]
    if all(contexts):
        raise OmniError("there is no part to learn: all are context" if parts else "there are no parts")
    if contexts != sorted(contexts, reverse=True):
        raise OmniError(f"part {contexts.index(False) + 2} or a later one is context; context comes before all else")
    return parts


def files_of(path: str, extension: str) -> list[epath.Path]:
    """The file of that name, or all files of a directory with the extension, by name; `OmniError` if there are none."""
    root = epath.Path(path)
    with asked(root):
        if not root.exists():
            raise OmniError(f"{root}: no such file or directory")
        if not root.is_dir():
            return [root]
        # Not glob, which lists all that is below a bucket's folder, pictures too.
        found = sorted(each for each in root.iterdir() if each.name.endswith(extension) and each.name[0] != ".")
    if not found:
        raise OmniError(f"{root}: no file with the extension {extension} there")
    return found


def sizes_of(files: list[epath.Path]) -> dict[str, int]:
    """Bytes of each file by name."""
    sizes = {}
    for file in files:
        with asked(file):
            sizes[file.name] = file.stat().length
    return sizes


def inside(folder: epath.Path, name: str) -> epath.Path:
    """The path of a file by its name relative to a folder; `OmniError` if it would lie outside, links followed.

    In a bucket there are no links to follow, and a name may also be the whole address of a file below the folder.
    """
    relative = name.removeprefix(f"{folder}/") if is_remote(folder) else name
    pure = PurePosixPath(relative)
    outside = f"{name!r} leads out of the folder of its document; write a path relative to it and below it"
    if pure.is_absolute() or ".." in pure.parts or "://" in relative or "\\" in relative or "\0" in relative:
        raise OmniError(outside)
    path = folder / relative
    try:
        if is_remote(folder):
            _check_address(path)
        elif not Path(path).resolve().is_relative_to(Path(folder).resolve()):
            raise OmniError(outside)
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name that the system cannot have
        raise OmniError(f"{name!r} is no file's name here ({error})") from None
    return path


def _check_address(path: epath.Path) -> None:
    """`ValueError` for a name that no object can have, about which a bucket is better not asked."""
    name = str(path).partition("://")[2].partition("/")[2]
    if len(name.encode()) > MAX_NAME or "\n" in name or "\r" in name:
        raise ValueError(f"in a bucket it is one line of at most {MAX_NAME} bytes")
