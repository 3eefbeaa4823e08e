"""Documents as JSON lines: what is read, what is refused and in which words, and that no path leaves its folder."""

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

import omni.data.json_lines
from omni.data.json_lines import JsonLines, parse_document
from omni.data.sources import inside
from omni.parts import Audio, Image
from omni_tokenizers.errors import OmniError

SCHEMA = json.loads(Path(omni.data.json_lines.__file__).with_name("document.schema.json").read_text())


@pytest.fixture
def folder(tmp_path):
    """A picture and a sound beside where documents are to be written."""
    (tmp_path / "data" / "files").mkdir(parents=True)
    Image(np.full((4, 6, 3), 7, np.uint8)).save(tmp_path / "data" / "files" / "a.png")
    Audio(np.zeros(800, np.float32), 16000).save(tmp_path / "data" / "files" / "a.wav")
    return tmp_path / "data"


def opened(folder, *lines):
    text = "\n".join(line if isinstance(line, str) else json.dumps({"parts": line}) for line in lines)
    (folder / "d.jsonl").write_text(text)
    return JsonLines(str(folder / "d.jsonl")).open()


def test_documents_come_back(folder):
    """Parts keep their order and what is context; empty lines count in names alone; a last line needs no end."""
    image, audio = {"image": "files/a.png", "context": True}, {"audio": "files/a.wav"}
    samples = opened(folder, [image, audio, {"text": "Zoë\n"}], "", [{"text": "b"}], "\r")
    assert len(samples) == 2 and [samples.name(i)[-9:] for i in range(2)] == ["d.jsonl:1", "d.jsonl:3"]
    first = samples[0]
    assert [part.modality for part in first] == ["image", "audio", "text"]
    assert [part.context for part in first] == [True, False, False]
    assert first[0].pixels.shape == (4, 6, 3) and first[1].samples.shape == (1, 800) and first[2].text == "Zoë\n"
    assert samples[1][0].text == "b"


def test_lines_are_found_across_blocks_and_files(folder, monkeypatch):
    """Wherever the blocks end in which a file is looked at, its lines are the same; files follow by name."""
    texts = [f"line {'x' * (i % 7)} {i}" for i in range(40)]
    for name, part in (("b.jsonl", texts[25:]), ("a.jsonl", texts[:25])):
        (folder / name).write_text("".join(json.dumps({"parts": [{"text": text}]}) + "\n" for text in part))
    for block in (1, 7, 64, 1 << 24):
        monkeypatch.setattr(omni.data.json_lines, "_BLOCK", block)
        samples = JsonLines(str(folder)).open()
        assert [samples[i][0].text for i in range(len(samples))] == texts
    assert samples.name(25).endswith("b.jsonl:1")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "a JSON object, this is list"),
        ('{"prts": []}', "unknown key 'prts'; did you mean 'parts'"),
        ('{"parts": []}', "at least one part, found empty list"),
        ([{"text": "a", "contxt": True}], "part 1: unknown key 'contxt'; did you mean 'context'"),
        ([{"text": "a"}, {"text": "a", "image": "b"}], "part 2: needs exactly one of .* found text and image"),
        ([{"context": True}], "found none"),
        ([{"text": 3}], "text must be a string that is not empty, found 3"),
        ([{"text": ""}], 'found ""'),
        ([{"text": "a", "context": 1}], "context must be true or false"),
        ([{"text": "a", "context": True}], "all are context"),
        ([{"text": "a"}, {"text": "b", "context": True}], "context comes before all else"),
        ([{"text": "\ud800"}], "lone surrogate"),
        ([{"image": "files/absent.png"}], "part 1: .*absent.png: no such file"),
        ([{"text": "a"}, {"image": "files/a.wav"}], "part 2: .*not a picture"),
        ([{"audio": "files"}], "a file was expected"),
    ],
)
def test_what_is_wrong_is_said(folder, line, message):
    """Every mistake is one line that names the part."""
    with pytest.raises(OmniError, match=message) as error:
        _ = opened(folder, line)[0]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "path",
    ["../out.png", "files/../../out.png", "{}/out.png", "link.png", "linked/out.png", "file:///x.png", "a\0b", "loop"],
)
def test_no_path_leaves_its_folder(folder, path):
    """Neither upwards, nor by an absolute path, a link or another scheme."""
    Image(np.zeros((4, 4, 3), np.uint8)).save(folder.parent / "out.png")
    (folder / "link.png").symlink_to(folder.parent / "out.png")
    (folder / "linked").symlink_to(folder.parent)
    (folder / "loop").symlink_to(folder / "loop")
    with pytest.raises(OmniError, match=r"leads out of the folder|no file's name|no such file"):
        _ = opened(folder, [{"image": path.format(folder.parent)}])[0]


def test_no_path_leaves_a_folder_in_a_store():
    """Where there are no links to follow, the name alone must say it."""
    folder = epath.Path("gs://bucket/data")
    assert str(inside(folder, "files/a.png")) == "gs://bucket/data/files/a.png"
    for name in ("../a.png", "files/../../a.png", "/bucket/a.png", "gs://other/a.png"):
        with pytest.raises(OmniError, match="leads out of the folder"):
            inside(folder, name)


def test_links_inside_the_folder_are_followed(folder):
    """A folder whose files are links into itself is read."""
    (folder / "link.png").symlink_to(folder / "files" / "a.png")
    assert opened(folder, [{"image": "link.png"}])[0][0].width == 6


def test_long_lines_are_not_read(folder, monkeypatch):
    """A line above the limit is refused by its length."""
    monkeypatch.setattr(omni.data.json_lines, "MAX_TEXT_BYTES", 1 << 20)
    samples = opened(folder, [{"text": "a" * (2 << 20)}], [{"text": "b"}])
    with pytest.raises(OmniError, match="longer than 1 MiB"):
        _ = samples[0]
    assert samples[1][0].text == "b"


def test_nothing_there_is_said(folder):
    """No file, no line, no such directory."""
    with pytest.raises(OmniError, match=r"no file with the extension .jsonl"):
        JsonLines(str(folder / "files")).open()
    with pytest.raises(OmniError, match="no such file or directory"):
        JsonLines(str(folder / "absent")).open()
    with pytest.raises(OmniError, match="no lines"):
        opened(folder, "", "")


VALUES = st.sampled_from(["a", "", 1, None, True, False, [], {}])
PARTS = st.dictionaries(st.sampled_from(["text", "image", "audio", "context", "video"]), VALUES, max_size=3)
DOCUMENTS = st.dictionaries(
    st.sampled_from(["parts", "meta", "part"]), st.one_of(VALUES, st.lists(st.one_of(PARTS, VALUES), max_size=3))
)


@settings(max_examples=400, deadline=None)
@given(st.one_of(DOCUMENTS, st.fixed_dictionaries({"parts": st.lists(PARTS, min_size=1, max_size=2)})))
def test_the_schema_says_the_same(document):
    """What the validator accepts is what the published JSON Schema accepts."""
    try:
        parse_document(json.dumps(document))
        accepted = True
    except OmniError:
        accepted = False
    assert accepted == jsonschema.Draft202012Validator(SCHEMA).is_valid(document)
