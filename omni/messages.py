"""Chat messages: who said which parts, in this package's words, OpenAI's or transformers'."""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omni import media
from omni.parts import Audio, Image, Part, as_part
from omni_tokenizers.errors import UsageError

ROLES = ("system", "user", "assistant")
_ALIASES = {"developer": "system"}
_KINDS = ("text", "image", "image_url", "audio", "audio_url", "input_audio", "video")
_DATA_URL = re.compile(r"data:[^,]*;base64,(.*)", re.DOTALL)


@dataclass(frozen=True)
class Message:
    """What one side said.

    Attributes:
      role: "system", "user" or "assistant".
      parts: what it said, in order.
    """

    role: str
    parts: tuple[Part, ...]


def are_messages(prompt: Any) -> bool:
    """Whether a prompt is a list of chat messages, rather than of parts."""
    return isinstance(prompt, Sequence) and any(isinstance(each, (Message, Mapping)) for each in prompt)


def read_messages(messages: Sequence[Message | Mapping], read: Callable[[Any], Part] = as_part) -> list[Message]:
    """Messages from what stands for them.

    A message is a mapping with "role" and "content". The content is a string or a list; of its entries each is a part
    or what stands for one (`omni.parts.as_part`), or a mapping with a "type": "text" with "text"; "image" and "audio"
    with the picture or sound under the same key, or a file under "path", or base64 under "base64"; "video" likewise;
    "image_url" and "audio_url" with a data: URL; "input_audio" with "data" in base64.

    Args:
      read: makes a part of what stands for one.

    Raises:
      UsageError: for an unknown role or type, roles in an order that no chat has (a system message first, if any; then
        user and assistant in turns, a user first and last), and URLs that would have to be downloaded.
      OmniError: for pictures and sounds that cannot be decoded.
    """
    found = []
    for number, message in enumerate(messages):
        where = f"message {number}"
        if isinstance(message, Message):
            found.append(message)
            continue
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise UsageError(f"{where}: a message is {{'role': ..., 'content': ...}}, not {_shown(message)}")
        role = _ALIASES.get(message["role"], message["role"])
        if role not in ROLES:
            raise UsageError(f"{where}: unknown role {_shown(message['role'])}; known are {', '.join(ROLES)}")
        found.append(Message(role, tuple(_parts(message["content"], where, read))))
    _check_order(found)
    return found


def _check_order(messages: Sequence[Message]) -> None:
    roles = [message.role for message in messages]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if spoken != [("user", "assistant")[place % 2] for place in range(len(spoken))] or len(spoken) % 2 == 0:
        raise UsageError(
            "a chat is a system message, if any, then user and assistant in turns, with the user first and last; "
            f"this one is {', '.join(roles)}"
        )


def _parts(content: Any, where: str, read: Callable[[Any], Part]) -> list[Part]:
    if isinstance(content, str):
        return [read(content)]
    if isinstance(content, (bytes, Mapping)) or not isinstance(content, Sequence):
        raise UsageError(f"{where}: its content is a string or a list of parts, not {_shown(content)}")
    return [
        _part(entry, f"{where}, part {place}", read) if isinstance(entry, Mapping) else read(entry)
        for place, entry in enumerate(content)
    ]


def _part(entry: Mapping, where: str, read: Callable[[Any], Part]) -> Part:
    kind = entry.get("type")
    if kind not in _KINDS:
        raise UsageError(f"{where}: unknown type {_shown(kind)}; known are {', '.join(_KINDS)}")
    if kind == "text":
        if not isinstance(entry.get("text"), str):
            raise UsageError(f"{where}: the text is a string under 'text', not {_shown(entry.get('text'))}")
        return read(entry["text"])
    modality, _, _ = kind.removeprefix("input_").partition("_")
    if kind == "input_audio":
        given = entry.get("input_audio")
        return _decoded(modality, given.get("data") if isinstance(given, Mapping) else None, where)
    if kind.endswith("_url"):
        given = entry.get(kind)
        return _from_url(modality, given.get("url") if isinstance(given, Mapping) else given, where, read)
    for key in (modality, "path", "url", "base64"):
        if (given := entry.get(key)) is not None:
            break
    else:
        raise UsageError(f"{where}: nothing under {modality!r}, 'path', 'url' or 'base64'; write the {modality} there")
    if key == "base64":
        return _decoded(modality, given, where)
    part = _from_url(modality, given, where, read) if isinstance(given, str) else read(given)
    if part.modality != modality:
        raise UsageError(f"{where}: is called {kind}, and holds {part.modality}")
    return part


def _from_url(modality: str, url: Any, where: str, read: Callable[[Any], Part]) -> Part:
    """From a data: URL or the name of a file."""
    if not isinstance(url, str):
        raise UsageError(f"{where}: its URL is a string, not {_shown(url)}")
    if match := _DATA_URL.fullmatch(url):
        return _decoded(modality, match[1], where)
    if re.match(r"(https?|ftp):", url):
        raise UsageError(f"{where}: {_shown(url)} is not downloaded; fetch it and pass the file, or a data: URL")
    return read(media.as_path(url.removeprefix("file://")))


def _decoded(modality: str, data: Any, where: str) -> Part:
    try:
        stream = io.BytesIO(base64.b64decode(data, validate=True))
    except (TypeError, ValueError, binascii.Error):
        raise UsageError(f"{where}: not base64") from None
    match modality:
        case "image":
            return Image(media.decode_picture(stream, where))
        case "audio":
            return Audio(*media.decode_sound(stream, where))
    raise UsageError(f"{where}: a {modality} comes as a file, under 'path'")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
