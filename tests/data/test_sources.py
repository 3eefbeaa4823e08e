"""Archives, parquet, array_record and tfds: the same documents from each, and what is wrong with a bad one is said."""

import dataclasses
import io
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from grain.sources import ArrayRecordDataSource
from PIL import Image as PillowImage
from written import (
    COUNT,
    FIELDS,
    RATE,
    WRITERS,
    add,
    files,
    pictures,
    sounds,
    write_archives,
    write_parquet,
    write_records,
    write_tfds,
)

from omni.data import archives, fields, parquet
from omni.data.archives import Archives
from omni.data.fields import Field
from omni.data.parquet import Parquet
from omni.data.records import Records, TfdsDataset
from omni_tokenizers.errors import OmniError, UsageError


@pytest.mark.parametrize("kind", WRITERS)
def test_the_same_documents_from_each(kind, tmp_path):
    """Parts in the order of the fields, whatever they lie in; tfds alone has an order of its own."""
    samples = WRITERS[kind](tmp_path).open()
    assert len(samples) == COUNT
    found = {}
    for i in range(COUNT):
        image, audio, text = samples[i]
        assert (image.context, audio.context, text.context) == (True, False, False)
        number = int(text.text.removeprefix("Nº "))
        np.testing.assert_array_equal(image.pixels, pictures()[number])
        np.testing.assert_array_equal(np.rint(audio.samples[0] * 32768), sounds()[number])
        assert audio.sample_rate == RATE
        found[number] = samples.name(i)
    assert len(set(found.values())) == COUNT
    assert kind == "tfds" or list(found) == list(range(COUNT))
    assert samples.description == WRITERS[kind](tmp_path).open().description if kind == "parquet" else True


def test_origins_lead_back(tmp_path):
    """File and place of every sample: name in an archive, row or record from 0, counted in its own file."""
    for kind in ("archives", "parquet", "records"):
        (tmp_path / kind).mkdir()
        samples = WRITERS[kind](tmp_path / kind).open()
        expected = {
            "archives": [f"{i // 6}.tar:../folder/sample{i}" for i in range(COUNT)],
            "parquet": [f"{i // 6}.parquet:{i % 6}" for i in range(COUNT)],
            "records": [f"a.array_record:{i}" for i in range(COUNT)],
        }
        assert [samples.origin(i) for i in range(COUNT)] == expected[kind]
        assert samples.name(7) == f"{tmp_path / kind}/{expected[kind][7]}"


def test_origins_lead_back_through_splits(tmp_path):
    """Records are counted from the beginning of a file, wherever a split begins."""
    samples = dataclasses.replace(write_tfds(tmp_path), split="train[3:5]+train[7:10]").open()
    assert len(samples) == 5
    for i in range(5):
        name, _, place = samples.origin(i).rpartition(":")
        (file,) = tmp_path.rglob(name)
        assert samples.texts(i)[0].encode() in ArrayRecordDataSource([str(file)])[int(place)]
    assert samples.origin(3).endswith(":8")


@pytest.mark.parametrize("kind", WRITERS)
def test_a_field_that_is_not_there_is_named(kind, tmp_path):
    """Before any sample is read, with the nearest that there is."""
    source = WRITERS[kind](tmp_path)
    wrong = type(source)(**{**vars(source), "fields": (Field("txtt" if kind == "archives" else "captoin", "text"),)})
    with pytest.raises(UsageError, match=r"nothing is called .* the nearest is '(caption|txt)'"):
        wrong.open()
    with pytest.raises(UsageError, match="names no part"):
        type(source)(**{**vars(source), "fields": ()}).open()


@pytest.mark.parametrize("kind", ["archives", "parquet", "records"])
def test_files_that_are_none_are_refused(kind, tmp_path):
    """Cut off, of another kind, or not there: one line with the path."""
    source = WRITERS[kind](tmp_path)
    file = max(tmp_path.iterdir())
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"something else " * 5000, b""):
        file.write_bytes(content)
        with pytest.raises(OmniError) as error:
            source.open()
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    with pytest.raises(OmniError, match="no such file or directory"):
        type(source)(str(tmp_path / "absent"), source.fields).open()


def test_a_tfds_dataset_that_is_none(tmp_path):
    """Another directory, another split."""
    source = write_tfds(tmp_path)
    with pytest.raises(OmniError, match=r"no features\.json"):
        TfdsDataset(str(tmp_path), "train", source.fields).open()
    with pytest.raises(OmniError, match="split 'tst' cannot be read"):
        TfdsDataset(source.directory, "tst", source.fields).open()


def test_bad_samples_are_said(tmp_path):
    """A missing field, damaged bytes, a reference to a file elsewhere, samples without a rate."""
    picture, sound = files(0)["picture"], files(0)["sound"]
    rows = {
        "picture": [{"bytes": each, "path": "/etc/passwd"} for each in (None, picture, picture[:60], picture, picture)],
        "sound": [sound, sound[:60], sound, sound, sound],
        "caption": ["a", "a", "a", None, ""],
    }
    pyarrow.parquet.write_table(pa.table(rows), tmp_path / "a.parquet")
    samples = Parquet(str(tmp_path / "a.parquet"), FIELDS).open()
    messages = ["only the path of a file elsewhere", "sound: ", "picture: ", "caption: there is none", "0 characters"]
    for i, message in enumerate(messages):
        with pytest.raises(OmniError, match=message) as error:
            _ = samples[i]
        assert "\n" not in str(error.value)
    records = write_records(tmp_path)
    with pytest.raises(OmniError, match="say their sample_rate"):
        _ = Records(records.path, FIELDS).open()[0]
    late = (Field("caption", "text"), Field("picture", "image", context=True))
    with pytest.raises(OmniError, match="context comes before"):
        _ = Parquet(str(tmp_path / "a.parquet"), late).open()[1]


def test_sizes_are_bounded_before_anything_is_decoded(tmp_path, monkeypatch):
    """Large files of an archive are not read, large row groups nor decoded, nor are pictures too large for memory."""
    source = write_archives(tmp_path)
    monkeypatch.setattr(archives, "MAX_BYTES", 100)
    with pytest.raises(OmniError, match="bytes are more than 100"):
        _ = source.open()[0]
    table = write_parquet(tmp_path)
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 100)
    with pytest.raises(OmniError, match=r"row group of .* bytes is too large"):
        _ = table.open()[0]
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 1 << 30)
    monkeypatch.setattr(fields, "MAX_BYTES", 100)
    with pytest.raises(OmniError, match="bytes are more than 100"):
        _ = table.open()[0]
    monkeypatch.setattr(fields, "MAX_BYTES", 1 << 30)
    buffer = io.BytesIO()
    PillowImage.new("1", (30_000, 3_000)).save(buffer, "png")
    rows = {"picture": [buffer.getvalue()]}
    pyarrow.parquet.write_table(pa.table(rows), tmp_path / "large.parquet")
    with pytest.raises(OmniError, match="64 million"):
        _ = Parquet(str(tmp_path / "large.parquet"), (Field("picture", "image"),)).open()[0]


def test_an_archive_cut_off_in_its_last_file_is_refused(tmp_path):
    """Its header is whole, its content is not."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "a.txt", b"a" * 2000)
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: 512 + 1024])
    with pytest.raises(OmniError, match="damaged"):
        Archives(str(tmp_path), (Field("txt", "text"),)).open()


def test_compressed_archives_are_refused(tmp_path):
    """They cannot be read at any place."""
    with tarfile.open(tmp_path / "a.tar", "w:gz") as archive:
        add(archive, "a.txt", b"a")
    with pytest.raises(OmniError, match="no uncompressed tar file"):
        Archives(str(tmp_path), (Field("txt", "text"),)).open()


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    """What to install."""
    source = write_parquet(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(OmniError, match=r"omni-any-to-any\[parquet\]"):
        source.open()
