"""Documents from parquet files, Hugging Face's among them: one row a document (extra: parquet)."""

from __future__ import annotations

import collections
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from omni.data.fields import Field, FieldSamples
from omni.data.sources import Samples, Source, files_of, sizes_of
from omni.storage import reading
from omni_tokenizers.errors import OmniError

MAX_GROUP_BYTES = 1 << 32
"""Of a row group, which is decoded as a whole."""
_KEPT = 4  # decoded row groups; threads that read ahead are in two at most


@dataclass(frozen=True)
class Parquet(Source):
    """Rows of parquet files."""

    path: str
    """A .parquet file, or a directory that holds some."""
    fields: tuple[Field, ...]
    """Parts of a document in order, by column: strings, files as bytes, or what Hugging Face stores in their place."""

    def open(self) -> Samples:
        """The rows of all files, in the order of their names."""
        return _Rows(self)


class _Rows(FieldSamples):
    """Rows by number."""

    def __init__(self, source: Parquet):
        super().__init__(source.fields)
        self._paths, self._lock = files_of(source.path, ".parquet"), threading.Lock()
        self._tables: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._groups, counts = [], []
        for number, path in enumerate(self._paths):
            with _opened(path) as file:
                metadata = file.metadata
            known = {metadata.schema.column(i).path.split(".")[0] for i in range(metadata.num_columns)}
            self.check_names(str(path), known)
            first = 0  # row of the file
            for group in range(metadata.num_row_groups):
                self._groups.append((number, group, first, metadata.row_group(group).total_byte_size))
                counts.append(metadata.row_group(group).num_rows)
                first += counts[-1]
        self._ends = np.cumsum(counts)
        if not sum(counts):
            raise OmniError(f"{source.path}: there are no rows in it")

    @property
    def description(self) -> dict[str, Any]:
        return {"kind": "parquet", "files": sizes_of(self._paths)}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def where(self, index: int) -> tuple[epath.Path, int]:
        group, row = self._place(index)
        number, _, first, _ = self._groups[group]
        return self._paths[number], first + row

    def record(self, index: int) -> Mapping[str, Any]:
        group, row = self._place(index)
        table = self._table(group)
        return {name: table.column(name)[row].as_py() for name in table.column_names}

    def _place(self, index: int) -> tuple[int, int]:
        group = int(np.searchsorted(self._ends, index, side="right"))
        return group, index - int(self._ends[group - 1] if group else 0)

    def _table(self, group: int) -> Any:
        """A decoded row group; the last few stay."""
        with self._lock:
            if group not in self._tables:
                number, group_of_file, _, size = self._groups[group]
                if size > MAX_GROUP_BYTES:
                    raise OmniError(f"a row group of {size} bytes is too large; write groups of fewer rows")
                wanted = {name for field in self._fields for name in field.names}
                with _opened(self._paths[number]) as file:
                    try:
                        self._tables[group] = file.read_row_group(group_of_file, sorted(wanted))
                    except (OSError, ValueError) as error:
                        raise OmniError(f"the row group cannot be read ({error})") from None
                if len(self._tables) > _KEPT:
                    self._tables.popitem(last=False)
            return self._tables[group]


@contextmanager
def _opened(path: epath.Path) -> Iterator[Any]:
    """A parquet file's reader; `OmniError` where there is none, or no pyarrow."""
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise OmniError(f"{path}: needs pyarrow: pip install 'omni-any-to-any[parquet]'") from None
    with reading(path) as stream:
        try:
            file = pyarrow.parquet.ParquetFile(stream)
        except (OSError, ValueError) as error:
            raise OmniError(f"{path}: no parquet file, or a damaged one ({error})") from None
        yield file
