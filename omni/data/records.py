"""Documents from array_record files: bare ones, of `tf.train.Example`s, and tfds datasets; none needs TensorFlow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath
from grain.sources import ArrayRecordDataSource

from omni.data.fields import Field, FieldSamples
from omni.data.sources import Samples, Source, files_of, sizes_of
from omni.storage import asked, local_copy
from omni_tokenizers.errors import OmniError


@dataclass(frozen=True)
class Records(Source):
    """`tf.train.Example`s of array_record files, whose features are files or texts as bytes, or samples of sounds."""

    path: str
    """An .array_record file, or a directory that holds some."""
    fields: tuple[Field, ...]
    """Parts of a document in order, by feature."""

    def open(self) -> Samples:
        """The records of all files, in the order of their names."""
        return _Examples(self)


class _RecordSamples(FieldSamples):
    """Samples that are records of array_record files, by number over all of them."""

    def open_files(self, files: Sequence[epath.Path], parts: Sequence[Any], firsts: Sequence[int]) -> None:
        """Opens files for reading, from disks alone.

        Args:
          parts: what `ArrayRecordDataSource` takes for each file: the path of its copy, or which records of that.
          firsts: the number in its file of each part's first record.

        Raises:
          OSError, RuntimeError, ValueError: no such files, or damaged ones, or none at all.
        """
        if not parts:
            raise ValueError("no file holds any of it")
        self._files, self._firsts = files, firsts
        self._parts = [ArrayRecordDataSource([part]) for part in parts]
        self._ends = np.cumsum([len(part) for part in self._parts], dtype=int)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def where(self, index: int) -> tuple[epath.Path, int]:
        part, place = self._place(index)
        return self._files[part], self._firsts[part] + place

    def bytes_of(self, index: int) -> bytes:
        """A record as it is."""
        part, place = self._place(index)
        return self._parts[part][place]

    def _place(self, index: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return part, index - int(self._ends[part - 1] if part else 0)


class _Examples(_RecordSamples):
    """Records of `tf.train.Example`s."""

    def __init__(self, source: Records):
        super().__init__(source.fields)
        files = files_of(source.path, ".array_record")
        self._sizes = sizes_of(files)
        copies = [local_copy(file, self._sizes[file.name]) for file in files]
        try:
            self.open_files(files, copies, [0] * len(files))
        except (OSError, ValueError, RuntimeError) as error:
            raise OmniError(f"{source.path}: no array_record files, or damaged ones ({error})") from None
        if not len(self):
            raise OmniError(f"{source.path}: there are no records in it")
        self.check_names(self.name(0), self.record(0))

    @property
    def description(self) -> dict[str, Any]:
        return {"kind": "records", "files": self._sizes}

    def record(self, index: int) -> Mapping[str, Any]:
        from google.protobuf.message import DecodeError
        from tensorflow_datasets.proto import tf_example_pb2

        try:
            example = tf_example_pb2.Example.FromString(self.bytes_of(index))
        except DecodeError:
            raise OmniError("not a tf.train.Example") from None
        return {name: _value(feature) for name, feature in example.features.feature.items()}


def _value(feature) -> Any:
    """What a feature holds: its only bytes, or its numbers."""
    kind = feature.WhichOneof("kind")
    values = getattr(feature, kind).value if kind else []
    if kind == "bytes_list":
        return values[0] if len(values) == 1 else None
    return list(values) or None


@dataclass(frozen=True)
class TfdsDataset(Source):
    """A split of a dataset that tfds wrote with file_format="array_record"."""

    directory: str
    """The directory of its version: the one that holds features.json."""
    split: str
    """As tfds writes it: "train", "test[:10%]"."""
    fields: tuple[Field, ...]
    """Parts of a document in order, by feature."""

    def open(self) -> Samples:
        """The examples of the split."""
        return _TfdsExamples(self)


class _TfdsExamples(_RecordSamples):
    """Examples by number; pictures stay the files they are until their sizes are known."""

    def __init__(self, source: TfdsDataset):
        import tensorflow_datasets as tfds

        super().__init__(source.fields)
        self._directory = epath.Path(source.directory)
        with asked(self._directory):
            if not (self._directory / "features.json").exists():
                raise OmniError(
                    f"{self._directory}: no features.json there, so this is not the version of a tfds dataset"
                )
        try:
            info = tfds.builder_from_directory(self._directory).info
            self._features = info.features
            self.check_names(source.directory, list(self._features))
            pictures = [name for name, each in self._features.items() if isinstance(each, tfds.features.Image)]
            self._decoders = dict.fromkeys(pictures, tfds.decode.SkipDecoding())
            if info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
                raise OmniError(f"{self._directory}: holds {info.file_format.value}; array_record alone can be read")
            chosen = info.splits[source.split].file_instructions
            files = [epath.Path(each.filename) for each in chosen]
            sizes = sizes_of(files)
            copies = [local_copy(file, sizes[file.name]) for file in files]
            parts = [dataclasses.replace(each, filename=copy) for each, copy in zip(chosen, copies, strict=True)]
            self.open_files(files, parts, [each.skip for each in chosen])
        except OmniError:
            raise
        except Exception as error:  # of its own kinds, for a wrong split and for files that are damaged
            line = " ".join(str(error).split())
            raise OmniError(f"{self._directory}: split {source.split!r} cannot be read ({line[:200]})") from None

    @property
    def description(self) -> dict[str, Any]:
        with asked(self._directory):
            files = sorted(each for each in self._directory.iterdir() if "array_record" in each.name)
        return {"kind": "tfds", "files": sizes_of(files)}

    def record(self, index: int) -> Mapping[str, Any]:
        try:
            return self._features.deserialize_example_np(self.bytes_of(index), decoders=self._decoders)
        except Exception as error:  # whatever tfds makes of damaged bytes
            raise OmniError(f"cannot be read ({' '.join(str(error).split())[:200]})") from None
