"""Chat messages: who said which parts, in this package's words, OpenAI's or transformers'."""

from __future__ import annotations

import base64
import binascii
import io
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omni import media
from omni.parts import Audio, Image, Part, as_part
from omni_tokenizers.errors import OmniError, UsageError

ROLES = ("system", "user", "assistant")
_ALIASES = {"developer": "system"}
_KINDS = ("text", "image", "image_url", "audio", "audio_url", "input_audio", "video")
_DATA_URL, _SCHEME = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE), re.compile(r"[a-zA-Z][\w+.-]*:")


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
    or what stands for one (`omni.parts.as_part`), or a mapping with a "type": "text" with "text"; "image", "audio" and
    "video" with the picture, sound or video under the same key, or base64 under "base64", or a file's name under either
    that key or "path"; "image_url" and "audio_url" with a data: URL; "input_audio" with "data" in base64.

    Names of files are files of this machine: look through messages that come from elsewhere.

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
            message = {"role": message.role, "content": message.parts}
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise UsageError(f"{where}: a message is {{'role': ..., 'content': ...}}, not {_shown(message)}")
        said = message["role"]
        role = _ALIASES.get(said, said) if isinstance(said, str) else None
        if role not in ROLES:
            raise UsageError(f"{where}: unknown role {_shown(said)}; known are {', '.join(ROLES)}")
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
        return [_made(read, content, where)]
    if isinstance(content, (bytes, Mapping)) or not isinstance(content, Sequence):
        raise UsageError(f"{where}: its content is a string or a list of parts, not {_shown(content)}")
    places = ((f"{where}, part {place}", entry) for place, entry in enumerate(content))
    return [
        _part(entry, place, read) if isinstance(entry, Mapping) else _made(read, entry, place)
        for place, entry in places
    ]


def _made(read: Callable[[Any], Part], value: Any, where: str) -> Part:
    """The part that a value stands for; what is wrong with it is told with its place."""
    try:
        return read(value)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    except OmniError as error:
        raise OmniError(f"{where}: {error}") from None


def _part(entry: Mapping, where: str, read: Callable[[Any], Part]) -> Part:
    kind = entry.get("type")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise UsageError(f"{where}: unknown type {_shown(kind)}; known are {', '.join(_KINDS)}")
    if kind == "text":
        if not isinstance(entry.get("text"), str):
            raise UsageError(f"{where}: the text is a string under 'text', not {_shown(entry.get('text'))}")
        return _made(read, entry["text"], where)
    if kind == "input_audio":
        given = entry.get("input_audio")
        return _decoded("audio", given.get("data") if isinstance(given, Mapping) else None, where)
    modality = kind.removesuffix("_url")
    if kind != modality:
        given = entry.get(kind)
        return _from_url(modality, given.get("url") if isinstance(given, Mapping) else given, where)
    if entry.get("base64") is not None:
        return _decoded(modality, entry["base64"], where)
    if entry.get("url") is not None:
        return _from_url(modality, entry["url"], where)
    given = next((entry[key] for key in (modality, "path") if entry.get(key) is not None), None)
    if given is None:
        raise UsageError(f"{where}: nothing under {modality!r}, 'path', 'url' or 'base64'; write the {modality} there")
    if isinstance(given, str) and _SCHEME.match(given):
        return _from_url(modality, given, where)
    part = _made(read, pathlib.Path(given) if isinstance(given, str) else given, where)
    if part.modality != modality:
        raise UsageError(f"{where}: is called {kind}, and holds {part.modality}")
    return part


def _from_url(modality: str, url: Any, where: str) -> Part:
    """From a data: URL."""
    match = _DATA_URL.match(url) if isinstance(url, str) else None
    if not match:
        raise UsageError(
            f"{where}: {_shown(url)} is no data: URL in base64, and others are not opened; fetch it and pass the data, "
            "or a file under 'path'"
        )
    return _decoded(modality, url[match.end() :], where)


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
