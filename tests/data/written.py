"""The same small documents of a picture, a sound and a caption, written in each format that is read."""

import io
import json
import os
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from tensorflow_datasets.proto import tf_example_pb2

from omni.data.archives import Archives
from omni.data.fields import Field
from omni.data.json_lines import JsonLines
from omni.data.parquet import Parquet
from omni.data.records import Records, TfdsDataset
from omni.parts import Audio, Image

COUNT = 11
RATE = 8000
FIELDS = (Field("picture", "image", context=True), Field("sound", "audio"), Field("caption", "text"))


def pictures():
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (5 + i, 7, 3), np.uint8) for i in range(COUNT)]


def sounds():
    random = np.random.default_rng(1)
    return [random.integers(-32768, 32768, 50 + i).astype(np.int16) for i in range(COUNT)]


def files(i: int) -> dict[str, bytes]:
    """A sample as the bytes of files."""
    sound = Audio(sounds()[i], RATE).to_wav_bytes()
    return {"picture": Image(pictures()[i]).to_png_bytes(), "sound": sound, "caption": f"Nº {i}".encode()}


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


def write_archives(root):
    extensions = {"picture": "png", "sound": "seg.wav", "caption": "txt"}
    for part in range(2):
        with tarfile.open(root / f"{part}.tar", "w") as archive:
            folder = tarfile.TarInfo("../folder")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
            for i in range(COUNT)[part * 6 : part * 6 + 6]:
                for name, data in files(i).items():
                    add(archive, f"../folder/sample{i}.{extensions[name]}", data)
                add(archive, f"../folder/sample{i}.json", b"{}")
    named = zip(("jpg;png", "seg.wav", "txt"), FIELDS, strict=True)
    return Archives(str(root), tuple(Field(name, field.part, field.context) for name, field in named))


def write_parquet(root):
    """As Hugging Face does: files as structs of bytes and a path."""
    for part in range(2):
        chosen = [files(i) for i in range(COUNT)[part * 6 : part * 6 + 6]]
        table = {
            "picture": [{"bytes": each["picture"], "path": "/etc/passwd"} for each in chosen],
            "sound": [{"bytes": each["sound"], "path": None} for each in chosen],
            "caption": [each["caption"].decode() for each in chosen],
            "other": list(range(len(chosen))),
        }
        pyarrow.parquet.write_table(pa.table(table), root / f"{part}.parquet", row_group_size=4)
    return Parquet(str(root), FIELDS)


def write_records(root):
    writer = ArrayRecordWriter(os.fspath(root / "a.array_record"), "group_size:1")
    for i in range(COUNT):
        example = tf_example_pb2.Example()
        for name, data in files(i).items():
            if name == "sound":
                example.features.feature[name].int64_list.value.extend(sounds()[i].tolist())
            else:
                example.features.feature[name].bytes_list.value.append(data)
        writer.write(example.SerializeToString())
    writer.close()
    return Records(str(root), with_rate(FIELDS))


def with_rate(chosen):
    return tuple(Field(each.name, each.part, each.context, RATE) if each.part == "audio" else each for each in chosen)


def write_tfds(root):
    features = tfds.features.FeaturesDict(
        {
            "picture": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "sound": tfds.features.Tensor(shape=(None,), dtype=np.int16),
            "caption": tfds.features.Text(),
        }
    )
    examples = [
        (io.BytesIO(Image(picture).to_png_bytes()), sound) for picture, sound in zip(pictures(), sounds(), strict=True)
    ]

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        name = "small"
        pkg_dir_path = epath.Path(__file__).parent

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=features, description="A test's.")

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, (picture, sound) in enumerate(examples):
                yield i, {"picture": picture, "sound": sound, "caption": f"Nº {i}"}

    Builder(data_dir=root, file_format="array_record").download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    return TfdsDataset(str(root / "small" / "1.0.0"), "train", with_rate(FIELDS))


WRITERS = {"archives": write_archives, "parquet": write_parquet, "records": write_records, "tfds": write_tfds}


def write_json_lines(root):
    """Not of named fields, so not one of WRITERS."""
    for part in range(2):
        lines = []
        for i in range(COUNT)[part * 6 : part * 6 + 6]:
            found = files(i)
            (root / f"{i}.png").write_bytes(found["picture"])
            (root / f"{i}.wav").write_bytes(found["sound"])
            entries = [{"image": f"{i}.png", "context": True}, {"audio": f"{i}.wav"}, {"text": f"Nº {i}"}]
            lines.append(json.dumps({"parts": entries}) + "\n")
        (root / f"{part}.jsonl").write_text("".join(lines))
    return JsonLines(str(root))
