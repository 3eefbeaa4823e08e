"""Chat messages in every shape that is accepted, and those that are refused."""

import base64
import io

import numpy as np
import pytest
import soundfile
from PIL import Image as PillowImage

import omni
from omni.messages import Message, are_messages, read_messages
from omni_tokenizers.errors import OmniError, UsageError

PIXELS = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
SAMPLES = np.linspace(-0.5, 0.5, 1600, dtype=np.float32)


def png() -> bytes:
    stream = io.BytesIO()
    PillowImage.fromarray(PIXELS).save(stream, "PNG")
    return stream.getvalue()


def wav() -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, SAMPLES, 16000, format="WAV", subtype="FLOAT")
    return stream.getvalue()


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def user(*content) -> list[dict]:
    return [{"role": "user", "content": list(content)}]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "a.wav").write_bytes(wav())
    return tmp_path


def test_pictures_in_every_shape(files):
    """OpenAI's, transformers' and this package's own mean the same picture."""
    entries = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{in_base64(png())}"}},
        {"type": "image", "image": PillowImage.fromarray(PIXELS)},
        {"type": "image", "image": str(files / "a.png")},
        {"type": "image", "path": str(files / "a.png")},
        {"type": "image", "url": f"data:image/png;base64,{in_base64(png())}"},
        {"type": "image", "base64": in_base64(png())},
        files / "a.png",
        omni.Image(PIXELS),
        PIXELS,
    ]
    for part in read_messages(user(*entries))[0].parts:
        np.testing.assert_array_equal(part.pixels, PIXELS)


def test_sounds_in_every_shape(files):
    entries = [
        {"type": "input_audio", "input_audio": {"data": in_base64(wav()), "format": "wav"}},
        {"type": "audio", "audio": str(files / "a.wav")},
        {"type": "audio", "path": files / "a.wav"},
        {"type": "audio_url", "audio_url": f"data:audio/wav;base64,{in_base64(wav())}"},
        omni.Audio(SAMPLES, 16000),
    ]
    for part in read_messages(user(*entries))[0].parts:
        np.testing.assert_array_equal(part.samples[0], SAMPLES)
        assert part.sample_rate == 16000


def test_roles_and_texts():
    messages = read_messages(
        [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hello"}, " you"]},
            {"role": "assistant", "content": "Yes?"},
            Message("user", (omni.Text("Nothing."),)),
        ]
    )
    assert [(each.role, [part.text for part in each.parts]) for each in messages] == [
        ("system", ["Be brief."]),
        ("user", ["Hello", " you"]),
        ("assistant", ["Yes?"]),
        ("user", ["Nothing."]),
    ]
    assert are_messages(messages) and are_messages(user("a")) and not are_messages(["a"]) and not are_messages("a")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "tool", "content": "x"}], "message 0: unknown role 'tool'; known are system, user, assistant"),
        ([{"role": "user"}], "message 0: a message is"),
        (["x", {"role": "user", "content": "y"}], "message 0: a message is"),
        (user({"type": "pdf"}), "message 0, part 0: unknown type 'pdf'; known are text, image"),
        (user("a", {"type": "text"}), "message 0, part 1: the text is a string"),
        (user({"type": "image"}), "nothing under 'image'"),
        (user({"type": "image", "base64": "%%"}), "not base64"),
        (
            user({"type": "image_url", "image_url": {"url": "https://x/y.png"}}),
            "part 0: 'https://x/y.png' is no data: URL",
        ),
        (user({"type": "image", "image": "HTTP://x/y.png"}), "others are not opened"),
        (user({"type": "image_url", "image_url": {"url": "/etc/hostname"}}), "others are not opened"),
        (user({"type": "image", "url": "file:///etc/hostname"}), "others are not opened"),
        (user({"type": "image_url", "image_url": {"url": "data:image/png," + "x" * 9999}}), r"^.{0,250}$"),
        (user({"type": "image_url", "image_url": {"url": "data:text/plain;base64,aGk="}}), "not a picture"),
        ([{"role": ["user"], "content": "x"}], r"unknown role \['user'\]"),
        (user({"type": np.zeros(2)}), "unknown type array"),
        ([Message("user", ("a", 3))], "message 0, part 1: a part cannot be made from int"),
        ([Message("root", ("a",))], "unknown role 'root'"),
        (user(None), "message 0, part 0: a part cannot be made from NoneType"),
        (user({"type": "image", "path": "nowhere.png"}), "message 0, part 0: nowhere.png: no such file"),
        (user({"type": "audio", "audio": PIXELS}), "is called audio, and holds image"),
        (
            user({"type": "image", "base64": in_base64(png()[:40])}),
            "message 0, part 0: damaged|not a picture",
        ),
        ([{"role": "user", "content": {"type": "text"}}], "a string or a list of parts"),
        ([{"role": "assistant", "content": "x"}], "the user first and last"),
        (user("a") + user("b"), "in turns"),
        ([*user("a"), {"role": "assistant", "content": "x"}], "the user first and last"),
        ([{"role": "system", "content": "x"}], "the user first and last"),
    ],
)
def test_what_is_no_chat_is_refused_by_its_place(messages, reason):
    with pytest.raises((UsageError, OmniError), match=reason):
        read_messages(messages)
