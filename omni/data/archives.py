"""Documents from tar files as webdataset writes them: the files of a sample follow one another and share a name.

Nothing is unpacked to a disk, so names in an archive lead nowhere.
"""

from __future__ import annotations

import itertools
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from etils import epath

from omni.data.fields import MAX_BYTES, Field, FieldSamples
from omni.data.sources import Samples, Source, files_of, sizes_of
from omni.storage import reading
from omni_tokenizers.errors import OmniError


@dataclass(frozen=True)
class Archives(Source):
    """Samples of uncompressed tar files."""

    path: str
    """A .tar file, or a directory that holds some."""
    fields: tuple[Field, ...]
    """Parts of a document in order, by extension: all behind the first dot of a file's name."""

    def open(self) -> Samples:
        """The samples of all archives, in the order of their names."""
        return _Members(self)


@dataclass(frozen=True)
class _Member:
    """Where a file of an archive is."""

    name: str
    extension: str
    start: int
    size: int


class _Members(FieldSamples):
    """Files of archives, read where they lie."""

    def __init__(self, source: Archives):
        super().__init__(source.fields)
        wanted = {name for field in source.fields for name in field.names}
        self._files = files_of(source.path, ".tar")
        self._samples: list[tuple[epath.Path, str, list[_Member]]] = []
        known = set()
        for file in self._files:
            members = _members(file)
            known |= {member.extension for member in members}
            for name, group in itertools.groupby(members, key=lambda member: member.name):
                self._samples.append((file, name, [member for member in group if member.extension in wanted]))
        if not self._samples:
            raise OmniError(f"{source.path}: there are no files in the archives")
        self.check_names(source.path, known)

    @property
    def description(self) -> dict[str, Any]:
        return {"kind": "archives", "files": sizes_of(self._files)}

    def __len__(self) -> int:
        return len(self._samples)

    def where(self, index: int) -> tuple[epath.Path, str]:
        file, name, _ = self._samples[index]
        return file, name

    def record(self, index: int) -> Mapping[str, bytes]:
        file, _, members = self._samples[index]
        record = {}
        with reading(file) as stream:
            for member in members:
                if member.size > MAX_BYTES:
                    raise OmniError(f"{member.extension}: {member.size} bytes are more than {MAX_BYTES}")
                stream.seek(member.start)
                record[member.extension] = stream.read(member.size)
        return record


def _members(path: epath.Path) -> list[_Member]:
    """The ordinary files of an archive, in their order; `OmniError` for one that is damaged or cut off."""
    members = []
    try:
        with reading(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for entry in archive:
                if not entry.isreg() or entry.issparse():
                    continue
                folder, slash, base = entry.name.rpartition("/")
                stem, _, extension = base.partition(".")
                members.append(_Member(f"{folder}{slash}{stem}", extension, entry.offset_data, entry.size))
    except tarfile.TarError as error:
        raise OmniError(f"{path}: no uncompressed tar file, or a damaged one ({error})") from None
    return members
