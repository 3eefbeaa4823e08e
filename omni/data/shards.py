"""Token shards: documents as ids, written once and read by number.

A shard directory holds `manifest.json`, `vocabulary.json`, `grammar.json`, `lengths.npy` (int32, a document each) and
`tokens-*.array_record`, whose records are safetensors: `ids` int32 and `target` uint8, and in the header, where it is
known, `origin`: "FILE:PLACE" of the document that became it. `codebooks.safetensors`, where there is one, holds the
tokenizers' vectors of the codes of vocabulary blocks, float32 `[codes, code_dim]` by block.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import safetensors
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from grain.sources import ArrayRecordDataSource
from jaxtyping import Float, Int

from omni.grammar import Grammar, Tokens
from omni.storage import local_copy, written
from omni.vocabulary import Vocabulary
from omni_tokenizers.base import fingerprint
from omni_tokenizers.errors import OmniError

FORMAT = 2
CODEBOOKS = "codebooks.safetensors"
DOCUMENTS_PER_SHARD = 1 << 16


def write_shards(
    directory: epath.PathLike,
    documents: Iterable[Tokens],
    vocabulary: Vocabulary,
    grammar: Grammar,
    provenance: dict[str, Any],
    codebooks: Mapping[str, Float[np.ndarray, "codes code_dim"]] | None = None,
) -> epath.Path:
    """Writes documents as a shard directory, which appears only when it is whole.

    Args:
      provenance: JSON that says where the documents come from (data, splits, hashes of the tokenizers ...).
      codebooks: vocabulary block -> the vectors of its codes, for models that begin with them.

    Raises:
      OmniError: the directory exists already, or there are no documents.
    """
    directory = epath.Path(directory)
    if directory.exists():
        raise OmniError(f"{directory}: exists already; remove it to write these shards anew")
    partial = partial_of(directory)
    if partial.exists():
        partial.rmtree()
    partial.mkdir(parents=True)
    shards, documents = [], iter(documents)
    while first := list(itertools.islice(documents, 1)):
        with ShardWriter(partial, len(shards)) as writer:
            for document in itertools.chain(first, itertools.islice(documents, DOCUMENTS_PER_SHARD - 1)):
                writer.write(document)
        shards.append(writer.shard)
    if not shards:
        partial.rmtree()
        raise OmniError(f"{directory}: there are no documents to write")
    write_manifest(partial, shards, vocabulary, grammar, provenance, codebooks)
    return partial.rename(directory)


def partial_of(directory: epath.Path) -> epath.Path:
    """Where a shard directory grows until it is whole."""
    return directory.parent / f"{directory.name}.partial"


@dataclass(frozen=True)
class Shard:
    """One finished file of a shard directory."""

    file: str
    """Its name."""
    bytes: int
    """Its size."""
    lengths: list[int]
    """Tokens of each document."""
    target_tokens: int
    """Tokens of target parts, of all documents."""


class ShardWriter:
    """Writes one file of a shard directory, which appears only when it is whole: at the end of the `with` block.

    Attributes:
      shard: what was written, once it is.
    """

    def __init__(self, directory: epath.Path, number: int):
        self._path = directory / f"tokens-{number:05d}.array_record"
        self._partial = directory / f"{self._path.name}.{uuid.uuid4().hex[:8]}.partial"  # this writer's own
        self._file = contextlib.ExitStack()
        self._writer = ArrayRecordWriter(self._file.enter_context(written(self._partial)), "group_size:1")
        self._lengths: list[int] = []
        self._targets = 0

    def __enter__(self) -> Self:
        return self

    def write(self, document: Tokens, origin: str | None = None) -> None:
        """Adds a document, with the file and the place that it comes from."""
        ids, target = document.ids.astype(np.int32), document.target.astype(np.uint8)
        header = None if origin is None else {"origin": origin}  # a second key would come in an order drawn by chance
        self._writer.write(safetensors.numpy.save({"ids": ids, "target": target}, header))
        self._lengths.append(ids.size)
        self._targets += int(target.sum())

    def __exit__(self, kind, *_) -> None:
        self._writer.close()
        self._file.close()
        if kind is not None:
            self._partial.unlink()
            return
        size = self._partial.stat().length
        self._partial.replace(self._path)
        self.shard = Shard(self._path.name, size, self._lengths, self._targets)


def write_manifest(
    directory: epath.Path,
    shards: Sequence[Shard],
    vocabulary: Vocabulary,
    grammar: Grammar,
    provenance: dict[str, Any],
    codebooks: Mapping[str, Float[np.ndarray, "codes code_dim"]] | None = None,
) -> None:
    """Writes what makes finished files a shard directory; the manifest comes last. Arguments as in `write_shards`."""
    lengths = [length for shard in shards for length in shard.lengths]
    with (directory / "lengths.npy").open("wb") as file:
        np.save(file, np.array(lengths, np.int32))
    arrays = {name: np.asarray(vectors, np.float32) for name, vectors in (codebooks or {}).items()}
    if arrays:
        (directory / CODEBOOKS).write_bytes(safetensors.numpy.save(arrays))
    manifest = {
        "format": FORMAT,
        "documents": len(lengths),
        "tokens": int(sum(lengths)),
        "target_tokens": sum(shard.target_tokens for shard in shards),
        "shards": [{"file": shard.file, "bytes": shard.bytes} for shard in shards],
        "vocabulary": vocabulary.hash,
        "grammar": grammar.hash,
        "codebooks": fingerprint({}, arrays) if arrays else None,
        "provenance": provenance,
    }
    for name, content in [("vocabulary", vocabulary.to_json()), ("grammar", grammar.to_json()), ("manifest", manifest)]:
        (directory / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


class TokenShards:
    """A shard directory, read by document number: `shards[i]` is `{"ids": int32 [n], "target": uint8 [n]}`.

    Attributes:
      lengths: int32 `[documents]`.
      vocabulary, grammar: those the documents were written with.
      manifest: the content of manifest.json.

    Raises:
      OmniError: not a shard directory, a damaged one, or one written with another vocabulary or grammar than given.
    """

    def __init__(self, directory: epath.PathLike, vocabulary: Vocabulary | None = None, grammar: Grammar | None = None):
        self.directory = epath.Path(directory)
        self.manifest = _read_json(self.directory, "manifest")
        if self.manifest.get("format") != FORMAT:
            raise OmniError(
                f"{directory}: shards of format {self.manifest.get('format')!r}; this version reads {FORMAT}"
            )
        self.grammar = read_grammar(self.directory)
        self.vocabulary = self.grammar.vocabulary
        self._check_hash("vocabulary", self.vocabulary.hash)
        self._check_hash("grammar", self.grammar.hash)
        if vocabulary is not None and vocabulary.hash != self.vocabulary.hash:
            raise OmniError(
                f"{directory}: written with another vocabulary ({'; '.join(vocabulary.difference(self.vocabulary))}); "
                "write the shards anew"
            )
        if grammar is not None and grammar.hash != self.grammar.hash:
            raise OmniError(f"{directory}: written with another grammar; write the shards anew")
        paths = [self._shard(entry) for entry in self.manifest["shards"]]
        self.lengths = _read_lengths(self.directory / "lengths.npy")
        self._records = ArrayRecordDataSource(paths)
        if not len(self._records) == len(self.lengths) == self.manifest["documents"]:
            raise OmniError(
                f"{directory}: the manifest counts {self.manifest['documents']} documents, the files do not"
            )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        try:
            return safetensors.numpy.load(self._records[index])
        except safetensors.SafetensorError as error:
            raise OmniError(f"{self.directory}: document {index} cannot be read ({error})") from None

    def origin(self, index: int) -> str | None:
        """Where a document comes from: "FILE:PLACE" in its source's folder; None where its record does not say."""
        record = self._records[index]
        header = json.loads(record[8 : 8 + int.from_bytes(record[:8], "little")])
        return header.get("__metadata__", {}).get("origin")

    @functools.cached_property
    def codebooks(self) -> dict[str, Float[np.ndarray, "codes code_dim"]]:
        """Vocabulary block -> the vectors of its codes, in the order of the names; empty where the shards hold none.

        Raises:
          OmniError: the file is missing, damaged or another than the manifest's, or a codebook does not fit its block.
        """
        path = self.directory / CODEBOOKS
        if self.manifest["codebooks"] is None:
            return {}
        try:
            codebooks = safetensors.numpy.load(path.read_bytes())
        except (OSError, safetensors.SafetensorError) as error:
            raise OmniError(f"{path}: cannot be read ({error}); write the shards anew") from None
        self._check_hash("codebooks", fingerprint({}, codebooks), CODEBOOKS)
        for name, vectors in codebooks.items():
            if vectors.ndim != 2 or len(vectors) != len(self.vocabulary.block(name)):
                raise OmniError(f"{path}: {name} has the shape {list(vectors.shape)}, which does not fit its block")
        return dict(sorted(codebooks.items()))  # a file is read in an order that differs from process to process

    def _check_hash(self, name: str, found: str, file: str = "") -> None:
        if found != self.manifest[name]:
            raise OmniError(
                f"{self.directory}: {file or name + '.json'} has the hash {found}, the manifest {self.manifest[name]}; "
                "the files do not belong together"
            )

    def _shard(self, entry: dict[str, Any]) -> str:
        path = self.directory / epath.Path(entry["file"]).name
        if not path.exists() or path.stat().length != entry["bytes"]:
            raise OmniError(f"{path}: missing or not of {entry['bytes']} bytes; write the shards anew")
        return local_copy(path, entry["bytes"])  # array_record reads from disks only


def read_grammar(directory: epath.PathLike) -> Grammar:
    """The grammar, with its vocabulary, of a directory of shards or of a model; `OmniError` where it has none."""
    directory = epath.Path(directory)
    vocabulary = Vocabulary.from_json(_read_json(directory, "vocabulary"))
    return Grammar(_read_json(directory, "grammar"), vocabulary)


def _read_lengths(path: epath.Path) -> Int[np.ndarray, " documents"]:
    try:
        with path.open("rb") as file:
            return np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise OmniError(f"{path}: cannot be read ({error}); write the shards anew") from None


def _read_json(directory: epath.Path, name: str) -> dict[str, Any]:
    path = directory / f"{name}.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise OmniError(f"{directory}: no {name}.json there, so this is not a directory of shards") from None
    except ValueError as error:
        raise OmniError(f"{path}: not valid JSON ({error})") from None
