"""Documents in a bucket that is busy, breaks and cuts files short: they are those of a disk, or a line says why not."""

import dataclasses
import json
import re

import fsspec
import numpy as np
import pytest
from loopback_storage import BUCKET, Faults, bucket_of_this_process, upload
from written import COUNT, WRITERS, write_json_lines

import omni.storage
from omni.data.json_lines import JsonLines
from omni.parts import Audio, Image
from omni.storage import CACHE, StorageError, local_copy, reading
from omni_tokenizers.errors import OmniError, UsageError

ALL_WRITERS = {"json lines": write_json_lines, **WRITERS}


@pytest.fixture
def faults():
    return Faults()


@pytest.fixture(autouse=True)
def bucket(faults, tmp_path, monkeypatch):
    """`gs://bucket`, of which copies go to a directory of the test's own."""
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    with bucket_of_this_process(faults) as storage:
        yield storage


def written(kind, tmp_path):
    """A source on a disk, and the same in the bucket."""
    (tmp_path / "data").mkdir()
    local, root = ALL_WRITERS[kind](tmp_path / "data"), str(tmp_path / "data")
    name = "directory" if kind == "tfds" else "path"
    address = getattr(local, name).replace(root, upload(tmp_path / "data", "data"))
    return local, dataclasses.replace(local, **{name: address})


@pytest.mark.parametrize("kind", ALL_WRITERS)
def test_the_same_documents_as_from_a_disk(kind, tmp_path, faults):
    """Whatever format they are in, though one request in five goes wrong; the source is known as the same."""
    local, remote = written(kind, tmp_path)
    expected = local.open()
    faults.chance = 0.2
    found = remote.open()
    assert len(found) == len(expected) == COUNT and found.description == expected.description
    for i in range(COUNT):
        for part, other in zip(found[i], expected[i], strict=True):
            assert (part.modality, part.context) == (other.modality, other.context)
            if part.modality == "text":
                assert part.text == other.text
            else:
                name = "pixels" if part.modality == "image" else "samples"
                np.testing.assert_array_equal(getattr(part, name), getattr(other, name))
        assert found.name(i) == expected.name(i).replace(str(tmp_path), f"gs://{BUCKET}")
        assert found.texts(i) == expected.texts(i)
    assert sum(faults.counts[kind] for kind in ("busy", "broken", "truncated")) > 0, faults.counts


@pytest.mark.parametrize("kind", ALL_WRITERS)
def test_a_bucket_that_refuses_is_no_bad_document(kind, tmp_path, faults):
    """What cannot be asked for is a `StorageError`, on opening and on reading: one line with the address."""
    _, remote = written(kind, tmp_path)
    faults.chance = 1.0
    with pytest.raises(OmniError, match=rf"^gs://{BUCKET}/data\S*: .*cannot be read \(.*\)$"):
        remote.open()
    if kind in ("records", "tfds"):
        return  # read from the copies
    faults.chance = 0.0
    samples = remote.open()
    faults.chance = 1.0
    with pytest.raises(StorageError, match=rf"^gs://{BUCKET}/data/\S+: cannot be read \(.*\)$"):
        _ = samples[0]


def test_a_file_cut_short_for_good_is_not_called_damaged(tmp_path, monkeypatch):
    """A decoder that takes a refusal in the middle of a file for the file's end does not have the last word."""
    monkeypatch.setattr(omni.storage, "_AHEAD", 1 << 12)
    Image(np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8)).save(tmp_path / "a.png")
    Audio(np.random.default_rng(0).uniform(-1, 1, 20_000).astype(np.float32), 16000).save(tmp_path / "a.wav")
    address = upload(tmp_path, "files")
    bucket = fsspec.filesystem("gs")
    whole, refused = bucket.cat_file, []

    def cat_file(path, start, end):
        if end == bucket.info(path)["size"]:
            refused.append(path)
            raise OSError("busy")
        return whole(path, start, end)

    for read, name in ((Image.read, "a.png"), (Audio.read, "a.wav")):
        assert repr(read(f"{address}/{name}")) == repr(read(tmp_path / name))
        with monkeypatch.context() as patch:
            patch.setattr(bucket, "cat_file", cat_file, raising=False)
            with pytest.raises(StorageError, match=rf"{name}: cannot be read \(busy\)"):
                read(f"{address}/{name}")
        assert refused.pop().endswith(name) and not refused


def test_an_answer_that_is_too_short_is_no_end(tmp_path, monkeypatch):
    """Fewer bytes than the range that was asked for, whatever the client thinks of it, where files are copied, too."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a").write_bytes(b"abc" * 10)
    address = f"{upload(tmp_path / 'files', 'files')}/a"
    monkeypatch.setattr(fsspec.filesystem("gs"), "cat_file", lambda path, start, end: b"abc", raising=False)
    with pytest.raises(StorageError, match="3 bytes arrived instead of 30"), reading(address) as stream:
        stream.read()
    with pytest.raises(StorageError, match="3 bytes arrived instead of 30"):
        local_copy(address, 30)


def test_any_part_of_a_file_is_read(tmp_path, monkeypatch):
    """At any place and of any length, across the borders of requests, and not beyond its end."""
    monkeypatch.setattr(omni.storage, "_AHEAD", 100)
    content = np.random.default_rng(0).bytes(1000)
    (tmp_path / "a").write_bytes(content)
    random = np.random.default_rng(1)
    with reading(f"{upload(tmp_path, 'files')}/a") as stream:
        for place, length in random.integers(0, 1100, (50, 2)).tolist():
            assert stream.seek(place) == place
            assert stream.read(length) == content[place : place + length]
        assert stream.seek(-10, 2) == 990 and stream.read() == content[-10:]


def test_what_is_not_there_is_said(tmp_path):
    """A missing file and a folder are the document's mistakes."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "empty.png").write_bytes(b"")
    address = upload(tmp_path, "files")
    for name, message in [("absent.png", "no such file"), ("folder", "a file was expected")]:
        with pytest.raises(UsageError, match=f"{re.escape(address)}/{name}: {message}"):
            Image.read(f"{address}/{name}")
    with pytest.raises(OmniError, match=r"empty \(0 bytes\)"):
        Image.read(f"{address}/folder/empty.png")
    with pytest.raises(OmniError, match=r"absent: no such file or directory"):
        JsonLines(f"{address}/absent").open()
    with pytest.raises(OmniError, match=r"no file with the extension .jsonl"):
        JsonLines(address).open()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../out.png", "leads out"),
        ("files/../../out.png", "leads out"),
        (f"/{BUCKET}/out.png", "leads out"),
        (f"gs://{BUCKET}/out.png", "leads out"),
        (f"gs://{BUCKET}/data/../out.png", "leads out"),
        (f"gs://{BUCKET}/data/gs://{BUCKET}/out.png", "leads out"),
        (f"gs://{BUCKET}/dataset/out.png", "leads out"),
        ("file:///etc/passwd", "leads out"),
        ("{tmp_path}/out.png", "leads out"),
        ("a.png::file:/out.png", "no such file"),
        ("*.png", "no such file"),
        ("a.png?x", "no such file"),
        ("a.png#1", "no such file"),
        ("a\nb.png", "no file's name"),
        ("a" * 1025, "no file's name"),
        ("\ud800.png", "no file's name"),
        ("a\0.png", "leads out"),
    ],
)
def test_no_path_leaves_its_folder_in_a_bucket(name, message, tmp_path):
    """Neither upwards, nor to another folder, bucket or scheme; names that no bucket can have are bad documents."""
    picture = Image(np.zeros((4, 4, 3), np.uint8))
    for place in ("data/a.png", "dataset/out.png"):
        (tmp_path / "all" / place).parent.mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "all" / place)
    picture.save(tmp_path / "out.png")
    line = json.dumps({"parts": [{"image": name.format(tmp_path=tmp_path)}]})
    (tmp_path / "all" / "data" / "d.jsonl").write_text(line)
    for folder in ("data", "dataset"):
        upload(tmp_path / "all" / folder, folder)
    with pytest.raises(OmniError, match=message) as error:
        _ = JsonLines(f"gs://{BUCKET}/data").open()[0]
    assert not isinstance(error.value, StorageError) and "\n" not in str(error.value)


def test_addresses_below_the_folder_are_read(tmp_path):
    """A whole address may name a file, where it lies below the folder: that of the lines, or the one that is set."""
    (tmp_path / "pictures" / "some").mkdir(parents=True)
    Image(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "pictures" / "some" / "a.png")
    pictures = upload(tmp_path / "pictures", "pictures")
    (tmp_path / "lines").mkdir()
    names = (f"{pictures}/some/a.png", "some/a.png")
    (tmp_path / "lines" / "d.jsonl").write_text("".join(json.dumps({"parts": [{"image": n}]}) + "\n" for n in names))
    for lines in (str(tmp_path / "lines"), upload(tmp_path / "lines", "lines")):
        samples = JsonLines(lines, folder=pictures).open()
        assert [samples[i][0].width for i in range(2)] == [6, 6]
        for i in range(2):
            with pytest.raises(OmniError, match="leads out" if i == 0 else "no such file"):
                _ = JsonLines(lines).open()[i]


def test_a_copy_is_made_once(tmp_path, faults):
    """What is in the cache is not asked for again; another version of the file is."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a").write_bytes(b"abc")
    address = f"{upload(tmp_path / 'files', 'files')}/a"
    copy = local_copy(address, 3)
    before = sum(faults.counts.values())
    assert local_copy(address, 3) == copy
    assert sum(faults.counts.values()) - before <= 2  # when it was written
    with pytest.raises(OmniError, match="3 bytes arrived instead of 4"):
        local_copy(address, 4)
