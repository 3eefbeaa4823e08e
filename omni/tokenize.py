"""`omni tokenize`: documents of parts to token shards, by any number of processes.

Shard n holds what comes of samples n * samples_per_shard onwards, and nothing else decides its content: not how many
processes there are, nor whether they were interrupted. A finished shard has a mark beside it, so one that was killed
begins with the first shard that has none; whoever finds all marks there makes the directory whole.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import logging
import operator
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

import omni_tokenizers
from omni.data.layouts import code_vectors, make_grammar
from omni.data.reading import Read, read_ahead
from omni.data.shards import Shard, ShardWriter, TokenShards, partial_of, read_grammar, write_manifest
from omni.data.sources import Source
from omni.grammar import Grammar, Span, Tokens
from omni.parts import Audio, Part
from omni.processor import Processor
from omni.sharding import MeshConfig, ShardingRules, batch_sharding, make_mesh
from omni.train.run_directory import claim, differences, read_json, to_json, write_json
from omni_tokenizers.base import NetTokenizer
from omni_tokenizers.errors import OmniError, UsageError

SKIPPED = "skipped.jsonl"
"""In a shard directory: number, name and mistake of every sample that is not in it."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizeConfig:
    """Which documents become token shards, by which tokenizers."""

    output: str
    """Shard directory to write."""
    source: Source
    """The documents."""
    tokenizers: dict[str, str]
    """Directory of the tokenizer of each modality: "text", and any of "image" and "audio"."""
    ids_of: str | None = None
    """Directory of shards or of a model whose vocabulary and grammar are used; None makes them for the tokenizers."""
    longest_sound: float = 10.0
    """Seconds of the longest sound of a grammar that is made."""
    samples_per_shard: int = 4096
    """Documents of a file, good and bad ones: what is lost at most when a process is killed."""
    batch_size: int = 64
    """Pictures or sounds that go through a tokenizer together."""
    most_skipped: int = 100
    """Bad samples that are left out; one more stops."""
    threads: int = 8
    """Samples that are read and decoded at once by a process."""
    processes: int = 1
    """How many processes share the work, where they are started by hand."""
    process: int = 0
    """Which of them this is, from 0."""

    def __post_init__(self) -> None:
        for name in ("samples_per_shard", "batch_size", "threads", "processes"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.process < self.processes:
            raise UsageError(f"process is {self.process}; of {self.processes} processes it lies in 0 to below that")
        if self.most_skipped < 0 or not self.longest_sound > 0:
            raise UsageError("most_skipped is at least 0, and longest_sound above 0")

    def run(self) -> None:
        """Writes the shards."""
        tokenize(self)


def tokenize(config: TokenizeConfig) -> dict[str, Any] | None:
    """Writes this process's share of the shards, or goes on with it; whoever is last makes the directory whole.

    Returns the manifest of the shard directory; None where shards of other processes are still missing.

    Raises:
      OmniError: the output holds other shards, a tokenizer or the source is not there, too many samples are bad.
      UsageError: tokenizers that do not fit one another or their modality.
      KeyboardInterrupt: after Ctrl-C, with what is done.
    """
    return Work(config).run()


def validate(config: TokenizeConfig) -> dict[str, Any]:
    """Reads every sample, without any tokenizer: how many there are, of which parts, and what is wrong with the others.

    Returns {"samples", "parts": {modality: number}, "bad": [{"sample", "name", "mistake"}]}.
    """
    samples = config.source.open()
    parts: collections.Counter[str] = collections.Counter()
    bad = []
    order = range(len(samples))
    for read in tqdm(read_ahead(samples, order, config.threads), "validate", len(order), unit="sample", delay=2):
        parts.update(part.modality for part in read.parts)
        if read.mistake is not None:
            bad.append({"sample": read.index, "name": samples.name(read.index), "mistake": read.mistake})
    return {"samples": len(samples), "parts": dict(parts), "bad": bad}


def as_text(found: dict[str, Any]) -> str:
    """What `validate` found: a line for each bad sample, and the counts."""
    lines = [f"{entry['name']}: {entry['mistake']}" for entry in found["bad"]]
    parts = ", ".join(f"{count} of {name}" for name, count in found["parts"].items()) or "none"
    return "\n".join([*lines, f"{found['samples']} documents, {len(lines)} of them bad; parts of the others: {parts}"])


class Work:
    """One run of `tokenize`, and what it needs: samples, tokenizers, grammar."""

    def __init__(self, config: TokenizeConfig):
        self.config, self.output = config, epath.Path(config.output)
        self.samples = config.source.open()
        self.processor = make_processor(config)
        self.partial = partial_of(self.output)
        self.count = -(-len(self.samples) // config.samples_per_shard)
        self.processes, self.process = config.processes, config.process
        if jax.process_count() > 1:
            self.processes, self.process = jax.process_count(), jax.process_index()

    @property
    def provenance(self) -> dict[str, Any]:
        """What decides the content of all shards, besides the grammar; in other batches rounding may differ."""
        return {
            "source": to_json(self.config.source),
            "files": self.samples.description,
            "samples": len(self.samples),
            "samples_per_shard": self.config.samples_per_shard,
            "batch_size": self.config.batch_size,
            "tokenizers": {name: each.hash for name, each in self.processor.tokenizers.items()},
        }

    def run(self) -> dict[str, Any] | None:
        """As `tokenize`."""
        grammar = self.processor.grammar
        hashes = {"vocabulary": grammar.vocabulary.hash, "grammar": grammar.hash}
        if self.output.exists():
            return self._found_whole(hashes)
        claim(self.partial, self.provenance | hashes | {"origins": True})  # no record of it is to be without one
        own = range(self.process, self.count, self.processes)
        todo = [number for number in own if not self._mark(number).exists()]
        if len(todo) < len(own):
            logger.info("%s: goes on; %d of %d shards are there", self.output, len(own) - len(todo), len(own))
        try:
            if todo:
                self.write(todo)
        except KeyboardInterrupt:
            done = sum(self._mark(number).exists() for number in own)
            line = f"interrupted; {done} of {len(own)} shards are written: the same command goes on"
            raise KeyboardInterrupt(line) from None
        return self._finish()

    def _found_whole(self, hashes: dict[str, str]) -> dict[str, Any]:
        """The manifest of an output that is there, when it is what this would write."""
        manifest = TokenShards(self.output).manifest
        found = {name: manifest[name] for name in hashes} | manifest["provenance"]
        for name in ("skipped", "folder"):
            found.pop(name, None)
        if lines := differences(self.provenance | hashes, found):
            raise OmniError(
                f"{self.output} holds other shards ({'; '.join(lines)}); choose another output, or remove it"
            )
        self._remove_marks(self.output)
        logger.info("%s: written before", self.output)
        return manifest

    # From samples to shards

    def write(self, numbers: Sequence[int]) -> None:
        """Writes shards one after the other, each with its mark, into `partial`, which is there."""
        skipped = sum(len(self._skipped(number)) for number in range(self.process, self.count, self.processes))
        total = sum(len(self._range(number)) for number in numbers)
        slow = 0.2 if sys.stderr.isatty() else 10
        with tqdm(total=total, desc="tokenize", unit="sample", mininterval=slow, delay=2) as progress:
            for number, groups in itertools.groupby(self._encoded(numbers), key=operator.itemgetter(0)):
                bad = []
                with ShardWriter(self.partial, number) as writer:
                    for _, results in groups:
                        for index, result in results:
                            if isinstance(result, Tokens):
                                writer.write(result, self.samples.origin(index))
                            else:
                                bad.append(self._skip(index, result, skipped + len(bad)))
                        progress.update(len(results))
                skipped += len(bad)
                write_json(self._mark(number), dataclasses.asdict(writer.shard) | {"skipped": bad})

    def _encoded(self, numbers: Sequence[int]) -> Iterator[tuple[int, list[tuple[int, Tokens | str]]]]:
        """(shard, results of some of its samples), in order; a result is a document, or what is wrong with a sample."""
        pending: collections.deque = collections.deque()
        # While one group is on an accelerator, another is stacked or packed; a CPU's cores are all taken by one.
        workers = 1 if jax.default_backend() == "cpu" else 2
        with ThreadPoolExecutor(workers) as pool:
            for number, group in self._groups(numbers):
                pending.append((number, pool.submit(self._encode, group)))
                if len(pending) > workers:
                    number, future = pending.popleft()
                    yield number, future.result()
            for number, future in pending:
                yield number, future.result()

    def _groups(self, numbers: Sequence[int]) -> Iterator[tuple[int, list[Read]]]:
        """Samples that are encoded together, all of one shard."""
        order = np.concatenate([np.array(self._range(number)) for number in numbers])
        samples = read_ahead(self.samples, order, self.config.threads, self.processor)
        for number in numbers:
            for group in _batched(self._range(number), 2 * self.config.batch_size):
                yield number, list(itertools.islice(samples, len(group)))

    def _encode(self, group: Sequence[Read]) -> list[tuple[int, Tokens | str]]:
        """Documents of samples, whose pictures go through the tokenizer together, and sounds of like lengths."""
        places = [(read.index, part) for read in group for part in read.parts]
        order = sorted(range(len(places)), key=lambda place: _kind_and_length(places[place][1]))
        encoded: dict[int, Span | str] = {}
        for _, same in itertools.groupby(order, key=lambda place: places[place][1].modality):
            for batch in _batched(list(same), self.config.batch_size):
                encoded |= zip(batch, self._spans([places[place][1] for place in batch]), strict=True)
        documents: dict[int, list[Span | str]] = {read.index: [] for read in group}
        for place, (index, _) in enumerate(places):
            documents[index].append(encoded[place])
        return [(read.index, read.mistake or self._pack(documents[read.index])) for read in group]

    def _spans(self, parts: Sequence[Part]) -> list[Span | str]:
        """Codes of parts; of one that its tokenizer refuses, what it says, and the others alone."""
        try:
            return [span for (span,) in self.processor.spans([[part] for part in parts])]
        except OmniError as error:
            return [str(error)] if len(parts) == 1 else [self._spans([part])[0] for part in parts]

    def _pack(self, spans: Sequence[Span | str]) -> Tokens | str:
        if mistakes := [span for span in spans if isinstance(span, str)]:
            return mistakes[0]
        try:
            return self.processor.grammar.pack(spans)
        except OmniError as error:
            return str(error)

    def _skip(self, index: int, mistake: str, before: int) -> dict[str, Any]:
        """Lists a bad sample; `OmniError` where there were as many as may be skipped before it."""
        name = self.samples.name(index)
        if before >= self.config.most_skipped:
            raise OmniError(
                f"{name}: {mistake}; {before} skipped before it are as many as most_skipped allows. "
                "Mend them (--validate lists all), or raise it: the same command goes on"
            )
        logger.warning("skipped %s: %s", name, mistake)
        return {"sample": index, "name": name, "mistake": mistake}

    # From shards to a directory

    def _finish(self) -> dict[str, Any] | None:
        missing = sum(not self._mark(number).exists() for number in range(self.count))
        if missing and not self.output.exists():
            logger.info("%s: this share is done; %d shards of other processes are missing", self.output, missing)
            return None
        try:
            return self._make_whole()
        except (FileNotFoundError, OmniError):
            if not self.output.exists():
                raise
            return TokenShards(self.output).manifest  # another process was as far, and renamed the directory

    def _make_whole(self) -> dict[str, Any]:
        shards, skipped = [], []
        for number in range(self.count):
            mark = read_json(self._mark(number))
            skipped += mark.pop("skipped")
            shards.append(Shard(**mark))
        if len(skipped) > self.config.most_skipped:
            most = self.config.most_skipped
            raise OmniError(f"{self.output}: {len(skipped)} samples are bad, and most_skipped is {most}; raise it")
        if not any(shard.lengths for shard in shards):
            raise OmniError(f"{self.output}: none of {len(self.samples)} samples is good; --validate lists why")
        for left in self.partial.glob("*.partial"):  # by processes that were killed
            left.unlink(missing_ok=True)
        (self.partial / SKIPPED).write_text("".join(json.dumps(line) + "\n" for line in skipped))
        for name, tokenizer in self.processor.tokenizers.items():
            tokenizer.save(self.partial / "tokenizers" / name)
        grammar, folder = self.processor.grammar, str(self.samples.where(0)[0].parent)
        provenance = self.provenance | {"skipped": len(skipped), "folder": folder}
        vectors = code_vectors(grammar, self.processor.tokenizers)
        write_manifest(self.partial, shards, grammar.vocabulary, grammar, provenance, vectors)
        self.partial.rename(self.output)
        self._remove_marks(self.output)
        manifest = TokenShards(self.output).manifest
        logger.info(
            "%s: %d documents, %d tokens of a vocabulary of %d ids; %d of %d samples skipped",
            *(self.output, manifest["documents"], manifest["tokens"], grammar.vocabulary.size),
            *(len(skipped), len(self.samples)),
        )
        return manifest

    def _range(self, number: int) -> range:
        """The samples of a shard."""
        size = self.config.samples_per_shard
        return range(number * size, min((number + 1) * size, len(self.samples)))

    def _mark(self, number: int) -> epath.Path:
        return self.partial / f"tokens-{number:05d}.json"

    def _skipped(self, number: int) -> list[dict[str, Any]]:
        return read_json(self._mark(number))["skipped"] if self._mark(number).exists() else []

    def _remove_marks(self, directory: epath.Path) -> None:
        for number in range(self.count):
            (directory / self._mark(number).name).unlink(missing_ok=True)
        (directory / "config.json").unlink(missing_ok=True)


def make_processor(config: TokenizeConfig) -> Processor:
    """The tokenizers, spread over all devices of this process, with the grammar that they write.

    Raises:
      OmniError: a tokenizer is not there, or does not fit the grammar.
      UsageError: a directory holds a tokenizer of another modality than it is named for.
    """
    tokenizers = {name: omni_tokenizers.load(directory) for name, directory in config.tokenizers.items()}
    rows = batch_sharding(ShardingRules(), make_mesh(MeshConfig(), jax.local_devices()))
    for name, tokenizer in tokenizers.items():
        if name not in tokenizer.modalities:
            raise UsageError(
                f"tokenizers names {config.tokenizers[name]} for {name}; it is one of {tokenizer.modality}"
            )
        if isinstance(tokenizer, NetTokenizer):
            tokenizer.spread(rows)
    grammar = _grammar(config, tokenizers)
    return Processor(grammar.vocabulary, grammar, tokenizers)


def _grammar(config: TokenizeConfig, tokenizers: Mapping[str, omni_tokenizers.Tokenizer]) -> Grammar:
    if config.ids_of is None:
        rate = tokenizers["audio"].sample_rate if "audio" in tokenizers else 0
        return make_grammar(tokenizers, round(config.longest_sound * rate))
    grammar = read_grammar(config.ids_of)
    if absent := [name for name in grammar.modalities if name not in tokenizers]:
        raise UsageError(f"the grammar of {config.ids_of} has {', '.join(absent)}; tokenizers names none of that")
    return grammar


def _kind_and_length(part: Part) -> tuple[str, int]:
    return part.modality, part.samples.shape[1] if isinstance(part, Audio) else 0


def _batched(items: Sequence, size: int) -> Iterator[Sequence]:
    return (items[start : start + size] for start in range(0, len(items), size))
