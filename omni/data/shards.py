"""Token shards: documents as ids, written once and read by number.

A shard directory holds `manifest.json`, `vocabulary.json`, `grammar.json`, `lengths.npy` (int32, a document each) and
`tokens-*.array_record`, whose records are safetensors: `ids` int32 and `target` uint8. `codebooks.safetensors`, where
there is one, holds the tokenizers' vectors of the codes of vocabulary blocks, float32 `[codes, code_dim]` by block.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from grain.sources import ArrayRecordDataSource
from jaxtyping import Float, Int

from omni.grammar import Grammar, Tokens
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
    partial = directory.parent / f"{directory.name}.partial"
    if partial.exists():
        partial.rmtree()
    partial.mkdir(parents=True)
    lengths, targets, files = [], 0, []
    writer = None
    for document in documents:
        if len(lengths) % DOCUMENTS_PER_SHARD == 0:
            if writer:
                writer.close()
            files.append(f"tokens-{len(files):05d}.array_record")
            writer = ArrayRecordWriter(os.fspath(partial / files[-1]), "group_size:1")
        ids, target = document.ids.astype(np.int32), document.target.astype(np.uint8)
        writer.write(safetensors.numpy.save({"ids": ids, "target": target}))
        lengths.append(ids.size)
        targets += int(target.sum())
    if writer is None:
        partial.rmtree()
        raise OmniError(f"{directory}: there are no documents to write")
    writer.close()
    with (partial / "lengths.npy").open("wb") as file:
        np.save(file, np.array(lengths, np.int32))
    arrays = {name: np.asarray(vectors, np.float32) for name, vectors in (codebooks or {}).items()}
    if arrays:
        (partial / CODEBOOKS).write_bytes(safetensors.numpy.save(arrays))
    manifest = {
        "format": FORMAT,
        "documents": len(lengths),
        "tokens": int(sum(lengths)),
        "target_tokens": targets,
        "shards": [{"file": name, "bytes": (partial / name).stat().length} for name in files],
        "vocabulary": vocabulary.hash,
        "grammar": grammar.hash,
        "codebooks": fingerprint({}, arrays) if arrays else None,
        "provenance": provenance,
    }
    for name, content in [("vocabulary", vocabulary.to_json()), ("grammar", grammar.to_json()), ("manifest", manifest)]:
        (partial / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    return partial.rename(directory)


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
        self.vocabulary = Vocabulary.from_json(_read_json(self.directory, "vocabulary"))
        self.grammar = Grammar(_read_json(self.directory, "grammar"), self.vocabulary)
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
        return os.fspath(path)


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
        raise OmniError(f"{directory}: no {name}.json there, so this is not a shard directory") from None
    except ValueError as error:
        raise OmniError(f"{path}: not valid JSON ({error})") from None
