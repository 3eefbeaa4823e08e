"""`omni tokenize`: what is written, that neither kills, processes nor devices change it, what is said of bad input."""

import dataclasses
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from host_devices import host_devices
from loopback_storage import BUCKET, Faults, bucket_of_this_process, loopback_bucket, upload
from tokenizing import BAD, DOCUMENTS, make_config, make_folder

import omni_tokenizers
from omni.data import json_lines
from omni.data.archives import Archives
from omni.data.fields import Field
from omni.data.json_lines import JsonLines
from omni.data.shards import TokenShards
from omni.parts import Image, Text, read_part
from omni.processor import Processor
from omni.storage import CACHE, StorageError
from omni.tokenize import SKIPPED, tokenize, validate
from omni_tokenizers.errors import OmniError, UsageError

WORKER = Path(__file__).parent / "fixtures" / "tokenizing.py"


@pytest.fixture(scope="module")
def folder(tiny_tokenizers, tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenize")
    for name, tokenizer in tiny_tokenizers.items():
        tokenizer.save(root / "tokenizers" / name)
    make_folder(root / "documents")
    return root / "documents"


@pytest.fixture(scope="module")
def whole(folder):
    """The shards of an undisturbed run of one process."""
    output = folder.parent / "whole"
    tokenize(make_config(folder, output))
    return output


def digests(directory: Path) -> dict[str, str]:
    """What stands for every file's bytes."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def launch(folder, output, *settings: str, devices: int = 1, log=None, variables=None) -> subprocess.Popen:
    environment = host_devices(devices) | (variables or {})
    with Path(log or f"{output}.log").open("a") as log:
        command = [sys.executable, str(WORKER), str(folder), str(output), *settings]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def test_documents_are_those_of_the_processor(folder, whole, tiny_tokenizers):
    """Every good sample, in its order, as it would be encoded alone; what trained models need lies beside."""
    shards = TokenShards(whole)
    processor = Processor(shards.vocabulary, shards.grammar, tiny_tokenizers)
    good = [number for number in range(DOCUMENTS) if number not in BAD]
    lines = (folder / "documents.jsonl").read_text().splitlines()
    assert len(shards) == len(good)
    for document, number in enumerate(good):
        parts = []
        for entry in json.loads(lines[number])["parts"]:
            name = next(iter(entry))
            part = Text(entry[name]) if name == "text" else read_part(folder / entry[name])
            parts.append(dataclasses.replace(part, context=entry.get("context", False)))
        expected = processor.tokens(parts)
        np.testing.assert_array_equal(shards[document]["ids"], expected.ids)
        np.testing.assert_array_equal(shards[document]["target"], expected.target)
    assert shards.codebooks.keys() == {"image", "audio0", "audio1"}
    hashes = shards.manifest["provenance"]["tokenizers"]
    for name, tokenizer in tiny_tokenizers.items():
        assert omni_tokenizers.load(whole / "tokenizers" / name).hash == tokenizer.hash == hashes[name]


def test_bad_samples_are_listed(whole):
    """With number, place and mistake; the manifest counts them; no mark is left."""
    listed = [json.loads(line) for line in (whole / SKIPPED).read_text().splitlines()]
    assert [entry["sample"] for entry in listed] == list(BAD)
    assert listed[0]["name"].endswith("documents.jsonl:8") and "absent.png: no such file" in listed[0]["mistake"]
    assert "not JSON" in listed[1]["mistake"]
    assert TokenShards(whole).manifest["provenance"]["skipped"] == len(BAD)
    assert not [path.name for path in whole.iterdir() if path.name.startswith("tokens-") and path.suffix == ".json"]


def test_a_limit_stops(folder, tmp_path):
    """One bad sample too many ends the work, which goes on when the limit is raised."""
    config = make_config(folder, tmp_path / "tokens", most_skipped=1)
    with pytest.raises(
        OmniError, match=r"documents.jsonl:32: not JSON.*1 skipped before it are as many as most_skipped allows"
    ):
        tokenize(config)
    assert not (tmp_path / "tokens").exists()
    written = sorted(path.name for path in (tmp_path / "tokens.partial").glob("*.array_record"))
    assert written == [f"tokens-{number:05d}.array_record" for number in range(3)]
    tokenize(dataclasses.replace(config, most_skipped=2))
    assert (tmp_path / "tokens").exists()


def test_validate_lists_all(folder):
    """All bad samples, and what the good ones hold, without any tokenizer."""
    config = dataclasses.replace(make_config(folder, folder / "nowhere"), tokenizers={})
    found = validate(config)
    assert found["samples"] == DOCUMENTS and [entry["sample"] for entry in found["bad"]] == list(BAD)
    assert found["parts"].keys() == {"text", "image", "audio"}


def test_killed_and_run_again(folder, whole, tmp_path):
    """After kill -9 in the middle of a shard the same bytes come out, and finished shards are not written again."""
    output = tmp_path / "tokens"
    partial = Path(f"{output}.partial")
    for shards in (1, 4):
        process = launch(folder, output, "pause=0.1")
        while len(list(partial.glob("tokens-*.json"))) < shards or not list(partial.glob("*.array_record.*.partial")):
            assert process.poll() is None, Path(f"{output}.log").read_text()[-2000:]
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not output.exists()
        if shards == 1:
            before = {path: path.stat().st_mtime_ns for path in partial.glob("*.array_record")}
    assert launch(folder, output).wait(timeout=300) == 0, Path(f"{output}.log").read_text()[-2000:]
    assert before and all((output / path.name).stat().st_mtime_ns == time for path, time in before.items())
    assert digests(output) == digests(whole) and not partial.exists()


def test_from_a_bucket(folder, whole, tmp_path, monkeypatch):
    """Though one request in ten goes wrong, the shards are those of the same files on a disk, to the byte; a bucket
    that refuses for good ends the work, skips nothing, and the same command goes on."""
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    faults = Faults()
    with bucket_of_this_process(faults):
        address = upload(folder, "documents")
        config = make_config(folder, tmp_path / "tokens", source=JsonLines(address))
        faults.chance = 0.1

        def read(path):
            if path.name == "20.png":
                faults.chance = 1.0
            return Image.read(path)

        with monkeypatch.context() as patch:
            patch.setitem(json_lines._READERS, "image", read)
            with pytest.raises(StorageError, match=rf"^{address}/\d+\.(png|wav): cannot be read \(.*\)$"):
                tokenize(config)
        faults.chance = 0.1
        tokenize(config)
    found, expected = digests(tmp_path / "tokens"), digests(whole)
    assert {name for name in found if found[name] != expected[name]} == {"manifest.json", SKIPPED}
    assert found.keys() == expected.keys()
    lines = (tmp_path / "tokens" / SKIPPED).read_text()
    assert lines.replace(address, str(folder)) == (whole / SKIPPED).read_text()
    assert min(faults.counts[kind] for kind in ("busy", "broken", "truncated")) >= 1, faults.counts


@pytest.mark.slow
def test_into_a_bucket(folder, whole, tmp_path):
    """In a bucket where one request in twenty goes wrong, two processes, one of them killed and run again, write the
    bytes that one writes to a disk; nothing of the killed one is left."""
    output, log = f"gs://{BUCKET}/tokens", tmp_path / "log"
    faults = Faults(0.05)

    def names() -> set[str]:
        return set(storage.objects.get(BUCKET, {}))

    with loopback_bucket(faults) as (environment, storage):
        settings = {"log": log, "variables": environment | {"OMNI_CACHE": str(tmp_path / "cache")}}
        killed = launch(folder, output, "processes=2", "process=0", "pause=0.1", **settings)
        while not any(name.endswith("00.json") for name in names()):
            assert killed.poll() is None, log.read_text()[-2000:]
            time.sleep(0.01)
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
        assert launch(folder, output, "processes=2", "process=1", **settings).wait(timeout=300) == 0
        assert not any(name.startswith("tokens/") for name in names())
        assert launch(folder, output, "processes=2", "process=0", **settings).wait(timeout=300) == 0, log.read_text()
        found = {
            name.removeprefix("tokens/"): hashlib.sha256(storage.get_file(BUCKET, name)).hexdigest()
            for name in names()
            if not name.endswith("/")
        }
    assert found == digests(whole)
    assert min(faults.counts[kind] for kind in ("busy", "broken")) >= 1, faults.counts


@pytest.mark.slow
def test_processes_share_the_work(folder, whole, tmp_path):
    """Three processes at once write what one writes; so do two of which one comes when the other is done."""
    output = tmp_path / "three"
    processes = [launch(folder, output, "processes=3", f"process={process}") for process in range(3)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0, 0], Path(f"{output}.log").read_text()[-2000:]
    assert digests(output) == digests(whole)
    config = make_config(folder, tmp_path / "two", processes=2)
    assert tokenize(dataclasses.replace(config, process=1)) is None
    assert tokenize(config)["documents"] == DOCUMENTS - len(BAD)
    assert digests(tmp_path / "two") == digests(whole)


@pytest.mark.multiprocess
def test_processes_that_jax_finds_part_at_once(folder, whole, tmp_path):
    """In a Slurm job each process knows its share; one that is lost ends no other, and can be started again alone."""
    output = tmp_path / "tokens"
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    first, second = (
        launch(
            *(folder, output, "distributed=True", "pause=0.1"),
            log=tmp_path / str(task),
            variables=job | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
        )
        for task in range(2)
    )
    while not (tmp_path / "tokens.partial" / "tokens-00000.json").exists():
        assert first.poll() is None, (tmp_path / "0").read_text()[-2000:]
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert second.wait(timeout=300) == 0, (tmp_path / "1").read_text()[-2000:]
    written = {int(path.stem[-5:]) % 2 for path in (tmp_path / "tokens.partial").glob("tokens-*.json")}
    assert written == {0, 1} and not output.exists()
    assert launch(folder, output, "processes=2", "process=0").wait(timeout=300) == 0
    assert digests(output) == digests(whole)


@pytest.mark.slow
def test_devices_share_the_work(folder, whole, tmp_path):
    """On four devices the documents are the same."""
    process = launch(folder, tmp_path / "four", "devices=4", devices=4)
    assert process.wait(timeout=300) == 0, (tmp_path / "four.log").read_text()[-2000:]
    shards, expected = TokenShards(tmp_path / "four"), TokenShards(whole)
    for document in range(len(expected)):
        np.testing.assert_array_equal(shards[document]["ids"], expected[document]["ids"])


def test_what_is_there_is_left_alone(folder, whole):
    """Written before: nothing happens; other settings or another source are refused, with what differs."""
    before = digests(whole)
    config = make_config(folder, whole)
    tokenize(config)
    with pytest.raises(OmniError, match="samples_per_shard: 9 here, 8 there"):
        tokenize(dataclasses.replace(config, samples_per_shard=9))
    assert digests(whole) == before


def test_a_source_that_changed_is_refused(folder, tmp_path):
    """Shards of two versions of a source do not meet in one directory."""
    config = make_config(folder, tmp_path / "tokens", most_skipped=1)
    with pytest.raises(OmniError):
        tokenize(config)
    lines = folder / "documents.jsonl"
    content = lines.read_text()
    try:
        lines.write_text(content + '{"parts": [{"text": "more"}]}\n')
        with pytest.raises(OmniError, match=r"holds a run with other settings.*files"):
            tokenize(config)
    finally:
        lines.write_text(content)


def test_ids_of_another_directory(folder, whole, tmp_path, tiny_bundle):
    """The vocabulary and grammar of a model; a tokenizer that is not named for it is asked for."""
    config = make_config(folder, tmp_path / "tokens", ids_of=str(tiny_bundle))
    tokenize(config)
    shards = TokenShards(tmp_path / "tokens")
    assert shards.grammar.declaration["modalities"]["audio"]["shapes"] == [{"columns": {"min": 1, "max": 6}}]
    with pytest.raises(UsageError, match="has audio; tokenizers names none"):
        tokenizers = {name: config.tokenizers[name] for name in ("text", "image")}
        tokenize(dataclasses.replace(config, output=str(tmp_path / "no"), tokenizers=tokenizers))


def test_a_sound_too_long_is_a_bad_sample(folder, tmp_path):
    """What the grammar cannot hold is skipped, and said."""
    tokenize(make_config(folder, tmp_path / "tokens", longest_sound=0.1))
    mistakes = [json.loads(line)["mistake"] for line in (tmp_path / "tokens" / SKIPPED).read_text().splitlines()]
    assert sum("too long: this model takes at most 0.12 s" in mistake for mistake in mistakes) > 3


def texts_of(kind: str, folder: Path) -> dict[str, str]:
    """Writes 40 texts in two files, one of them bad; returns the others by where they are."""
    texts = {}
    for file in range(2):
        name = folder / f"part {file}.{kind}"
        numbers = range(20 * file, 20 * file + 20)
        if kind == "jsonl":
            lines = [json.dumps({"parts": [{"text": f"zero {number}"}]}) for number in numbers]
            lines.insert(3, "")
            lines[10] = "{" if file else lines[10]
            name.write_text("\n".join(lines))
            texts |= {f"{name.name}:{place}": line for place, line in enumerate(lines, start=1)}
        else:
            with tarfile.open(name, "w") as archive:
                for number in numbers:
                    content = b"" if number == 30 else json.dumps({"parts": [{"text": f"zero {number}"}]}).encode()
                    entry = tarfile.TarInfo(f"a:b/{number}.txt")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
                    texts[f"{name.name}:a:b/{number}"] = content.decode()
    return {place: text for place, text in texts.items() if len(text) > 1}


@pytest.mark.parametrize("kind", ["jsonl", "tar"])
def test_every_document_says_where_it_comes_from(kind, folder, tmp_path, run):
    """Across files, shards and processes, bad samples between them: what stands there is what became the document."""
    (tmp_path / "texts").mkdir()
    texts = texts_of(kind, tmp_path / "texts")
    fields = (Field("txt", "text"),)
    source = JsonLines(str(tmp_path / "texts")) if kind == "jsonl" else Archives(str(tmp_path / "texts"), fields)
    tokenizers = {"text": str(folder.parent / "tokenizers" / "text")}
    config = make_config(folder, tmp_path / "tokens", source=source, tokenizers=tokenizers, processes=2)
    assert tokenize(dataclasses.replace(config, process=1)) is None
    tokenize(config)
    shards = TokenShards(tmp_path / "tokens")
    assert [shards.origin(document) for document in range(len(shards))] == list(texts)
    encode = omni_tokenizers.load(tokenizers["text"]).encode
    for document, text in enumerate(texts.values()):
        text = json.loads(text)["parts"][0]["text"] if kind == "jsonl" else text
        (span,) = shards.grammar.parse(shards[document]["ids"])
        np.testing.assert_array_equal(span.codes, encode(text))
    code, out, _ = run("inspect", tmp_path / "tokens", "--document", 38)
    assert code == 0 and f"document 38: from {tmp_path}/texts/{list(texts)[38]}" in out and "zero 39" in out
    found = json.loads(run("inspect", tmp_path / "tokens", "--document", 0, "--json")[1])
    assert found["origin"] == f"{tmp_path}/texts/{next(iter(texts))}"
    assert found["source"]["type"] == type(source).__name__
    code, _, err = run("inspect", tmp_path / "tokens", "--document", 39)
    assert code == 2 and "no document 39; they are numbered from 0 to 38" in err


def test_the_environment_says_which_share(folder, tmp_path, run, monkeypatch):
    """The same command in each process: it writes its own files, and what is said in the command goes before."""
    (tmp_path / "texts").mkdir()
    texts_of("jsonl", tmp_path / "texts")
    file = tmp_path / "tokens.py"
    text = f"'text': {str(folder.parent / 'tokenizers' / 'text')!r}"
    file.write_text(FILE.format(output=str(tmp_path / "tokens"), source=str(tmp_path / "texts"), tokenizers=text))
    monkeypatch.setenv("OMNI_PROCESSES", "3")
    monkeypatch.setenv("OMNI_PROCESS", "1")
    command = ("tokenize", file, "--samples-per-shard", "8", "--json")
    written = []
    for share in ((), ("--processes", "3", "--process", "2")):
        code, out, err = run(*command, *share)
        assert code == 0 and json.loads(out) is None, err
        written.append(sorted(path.stem for path in (tmp_path / "tokens.partial").glob("tokens-*.json")))
    assert written == [["tokens-00001", "tokens-00004"], ["tokens-00001", "tokens-00002", "tokens-00004"]]
    monkeypatch.setenv("OMNI_PROCESS", "0")
    code, out, err = run(*command)
    assert code == 0 and json.loads(out)["documents"] == 39, err
    monkeypatch.delenv("OMNI_PROCESS")
    assert "one is missing" in run(*command)[2]


def test_shards_begun_before_origins_are_not_gone_on_with(folder, tmp_path):
    """Half of a directory without origins and half with them would be neither."""
    config = make_config(folder, tmp_path / "tokens", most_skipped=1)
    with pytest.raises(OmniError, match="most_skipped"):
        tokenize(config)
    begun = tmp_path / "tokens.partial" / "config.json"
    settings = json.loads(begun.read_text())
    begun.write_text(json.dumps({name: value for name, value in settings.items() if name != "origins"}))
    with pytest.raises(OmniError, match="origins: true here, none there"):
        tokenize(dataclasses.replace(config, most_skipped=2))


FILE = """
from omni.data import json_lines
from omni.data.archives import Archives
from omni.data.fields import Field
from omni.data.json_lines import JsonLines
from omni.tokenize import TokenizeConfig

config = TokenizeConfig({output!r}, JsonLines({source!r}), {{{tokenizers}}}, longest_sound=0.2)
"""


def test_the_command(run, folder, tmp_path, caplog):
    """Validates and writes; mistakes are a line and an exit code."""
    file = tmp_path / "tokens.py"
    tokenizers = ", ".join(
        f"'{name}': {str(folder.parent / 'tokenizers' / name)!r}" for name in ("text", "image", "audio")
    )
    file.write_text(FILE.format(output=str(tmp_path / "tokens"), source=str(folder), tokenizers=tokenizers))
    code, out, _ = run("tokenize", file, "--validate")
    assert code == 1 and "documents.jsonl:8: part 1" in out and f"{DOCUMENTS} documents, 2 of them bad" in out
    code, out, _ = run("tokenize", file, "--validate", "--json")
    assert code == 1 and len(json.loads(out)["bad"]) == 2
    code, out, err = run("tokenize", file, "--json", "--samples-per-shard", "16")
    assert code == 0 and json.loads(out)["documents"] == DOCUMENTS - 2, err
    assert sum(record.getMessage().startswith("skipped") for record in caplog.records) == 2
    for arguments, code, message in [
        (["--smples-per-shard", "3"], 2, "--samples-per-shard"),
        (["--threads", "0"], 2, "threads is 0"),
        (["--process", "2"], 2, "process is 2"),
        (["--source.path", str(tmp_path / "absent")], 1, "absent: no such file or directory"),
        (["--tokenizers", "text"], 2, "the nearest is --tokenizers."),
        (["--tokenizers.text", str(tmp_path)], 1, "not a saved tokenizer"),
        (["--tokenizers.image", str(folder.parent / "tokenizers" / "text")], 2, "it is one of text"),
    ]:
        found, _, err = run("tokenize", file, *arguments)
        assert (found, err.count("\n")) == (code, 1) and message in err, err
    assert run("tokenize")[0] == 2 and "omni tokenize FILE" not in run("tokenize")[2]
    assert "--validate" in run("tokenize", "--help")[1]
