"""Chat templates of public checkpoints: how a model was taught to read chats, as Jinja.

Control tokens come from the template alone. Where their names stand in the template itself, signs take their place that
no text has (from `FIRST_SIGN` on) before anything is rendered; what is a sign behind it is that token, and all else is
text, whatever it looks like. A picture's place is such a sign, too.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from etils import epath

from omni.messages import Message
from omni.parts import Text
from omni.sandbox import FIRST_SIGN, compile_template
from omni_tokenizers.base import LARGEST_CHECKPOINT_CONFIG, read_object
from omni_tokenizers.errors import OmniError, UsageError
from omni_tokenizers.text_json import BREAK, JsonTextTokenizer, Names
from omni_tokenizers.text_public import SETTINGS

SOURCE, TOKENS = "chat_template.jinja", "chat_tokens.json"
LARGEST = 1 << 20  # bytes of a template; those of large models have some ten thousand
_SIGN = re.compile(f"([{FIRST_SIGN}-{chr(ord(BREAK) - 1)}])")
_STANDARD = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_PROBE = "words of a probe"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChatTemplate:
    """A template, and what it is rendered with.

    Attributes:
      source: the template.
      tokens: names of control tokens by what a template calls them, such as "bos_token".
      frame: which of `tokens` stand before and behind all that it renders, "" for none; before it only where it does
        not begin so itself.
    """

    source: str
    tokens: Mapping[str, str] = field(default_factory=dict)
    frame: tuple[str, str] = ("", "")

    @classmethod
    def of_checkpoint(
        cls, directory: epath.PathLike, frame: tuple[str, str], known: Mapping[str, str]
    ) -> ChatTemplate | None:
        """The template of a directory of transformers; None if it has none.

        Args:
          frame: what the family's processor puts around it.
          known: `tokens` where no tokenizer_config.json names any.

        Raises:
          OmniError: files that are damaged, too large, or hold no template where one belongs.
        """
        directory = epath.Path(directory)
        path, older = directory / SETTINGS, directory / "chat_template.json"
        settings = read_object(path, LARGEST_CHECKPOINT_CONFIG) if path.exists() else None
        if (directory / SOURCE).exists():
            source = _read(directory / SOURCE)
        elif settings and settings.get("chat_template") is not None:
            source = _default(settings["chat_template"], path)
        elif older.exists():
            source = _default(read_object(older, LARGEST).get("chat_template"), older)
        else:
            return None
        return None if source is None else cls(source, known if settings is None else _names(settings), frame)

    @classmethod
    def load(cls, directory: epath.Path) -> ChatTemplate | None:
        """What `save` wrote; None if there was none."""
        if not (directory / SOURCE).exists():
            return None
        path = directory / TOKENS
        settings = read_object(path) if path.exists() else {}
        tokens, frame = settings.get("tokens", {}), settings.get("frame", ["", ""])
        strings = isinstance(tokens, dict) and isinstance(frame, list) and len(frame) == 2
        if not strings or not all(isinstance(each, str) for each in (*tokens.values(), *frame)):
            raise OmniError(f'{path}: "tokens" has names of tokens, and "frame" two of their keys, or ""')
        return cls(_read(directory / SOURCE), tokens, tuple(frame))

    def save(self, directory: epath.Path) -> None:
        """Writes the template and what it is rendered with, in this package's own form."""
        (directory / SOURCE).write_text(self.source)
        content = {"tokens": dict(self.tokens), "frame": list(self.frame)}
        (directory / TOKENS).write_text(json.dumps(content, indent=2) + "\n")

    def export(self, directory: epath.Path) -> None:
        """Writes the template as transformers does; names of tokens join what its tokenizer's settings have."""
        (directory / SOURCE).write_text(self.source)
        path = directory / SETTINGS
        settings = read_object(path, LARGEST_CHECKPOINT_CONFIG) if path.exists() else {}
        extra = {name: token for name, token in self.tokens.items() if name not in _STANDARD}
        settings |= {name: token for name, token in self.tokens.items() if name in _STANDARD}
        path.write_text(json.dumps(settings | ({"extra_special_tokens": extra} if extra else {}), indent=2) + "\n")


@dataclass(frozen=True)
class MediaPlaceholder:
    """Where in a rendered chat the next part of a modality stands."""

    modality: str


class ChatRenderer:
    """Writes chats by a template, for a tokenizer."""

    def __init__(self, template: ChatTemplate, tokenizer: JsonTextTokenizer, modalities: Collection[str] = ()):
        """Compiles the template.

        Args:
          modalities: those other than text, whose parts stand where the template writes their token ("<image>").

        Raises:
          OmniError: it is no template.
        """
        self._tokens, self._frame, self._control = template.tokens, template.frame, tokenizer.control
        places = {self._tokens.get(f"{each}_token", f"<{each}>"): MediaPlaceholder(each) for each in modalities}
        self._known: dict[str, int | MediaPlaceholder] = {**tokenizer.control, **places}  # what each name means
        self._names, self._signs = Names(self._known), {}
        self._meant: dict[str, int | MediaPlaceholder] = {}  # what each sign does
        self._place = {place.modality: self._sign(name) for name, place in places.items()}
        self._written: set[str] = set()
        added = Names([name for name in tokenizer.added if not name.isspace()])
        self._render = compile_template(template.source, lambda text: self._rewritten(text, added))
        self._variables = {
            name: self._rewritten(token, added if name in template.source else Names(()))
            for name, token in self._tokens.items()
        }
        self._typed = {role: Names({*self._known, *self._written}) for role in ("system", "user")}
        self._typed["assistant"] = self._names

    def pieces(self, messages: Sequence[Message], reply_follows: bool = True) -> list[str | int | MediaPlaceholder]:
        """A chat as text, ids of control tokens, and the places of the messages' other parts, in order.

        In the text, names of control tokens are broken (`omni_tokenizers.text_json.BREAK`); in what users and systems
        say, names of other added tokens that the template writes are, too, as they may mark who speaks. What the model
        has said keeps them.

        Args:
          reply_follows: whether the beginning of a reply is the last.

        Raises:
          UsageError: a text with signs that are kept for this.
          OmniError: what the template says of the messages, or what is wrong with it.
        """
        said = [{"role": message.role, "content": self._content(message)} for message in messages]
        rendered = self._rendered(said, reply_follows)
        pieces = [self._meant.get(piece, piece) for piece in _SIGN.split(rendered) if piece]
        before, behind = ([id for id in [self._token(name)] if id is not None] for name in self._frame)
        return [*(before if pieces[:1] != before else []), *pieces, *behind]

    def closing(self, ends: Collection[int]) -> int | None:
        """Which of some tokens the template writes behind what an assistant has said; None for none of them."""
        said = [Message("user", (Text("said"),)), Message("assistant", (Text(_PROBE),))]
        pieces = self.pieces(said, reply_follows=False)
        behind = itertools.dropwhile(lambda piece: not (isinstance(piece, str) and _PROBE in piece), pieces)
        return next((piece for piece in behind if isinstance(piece, int) and piece in ends), None)

    def _token(self, name: str) -> int | None:
        return self._control.get(self._tokens.get(name, ""))

    def _sign(self, name: str) -> str:
        """The sign that stands for a name."""
        if name not in self._signs:
            self._signs[name] = sign = chr(ord(FIRST_SIGN) + len(self._signs))
            self._meant[sign] = self._known[name]
            if sign >= BREAK:
                raise OmniError("the chat template writes more control tokens than there are signs for them")
        return self._signs[name]

    def _rewritten(self, text: str, added: Names) -> str:
        """A string of the template with signs for names; names of added tokens that are text are noted."""
        found, place = [], 0
        while place < len(text):
            if written := added.at(text, place):
                self._written.add(written)
            name = self._names.at(text, place)
            found.append(self._sign(name) if name else text[place])
            place += len(name) if name else 1
        return "".join(found)

    def _rendered(self, messages: Sequence[Mapping[str, Any]], reply_follows: bool) -> str:
        more = {"tools": None, "documents": None, "add_generation_prompt": reply_follows}
        return self._render({**self._variables, "messages": messages, **more})

    # What messages say

    def _content(self, message: Message) -> str | list[dict[str, str]]:
        """As a string with the signs of other parts, or as a list of typed entries, which the template then places."""
        texts = [part.text for part in message.parts if isinstance(part, Text)]
        if max("".join(texts), default="") >= FIRST_SIGN:
            raise UsageError(f"a text has a sign from U+{ord(FIRST_SIGN):X} on, which no chat may have; take it out")
        broken, mixed = iter(self._typed[message.role].broken(texts)), len(texts) < len(message.parts)
        parts = [(part.modality, next(broken) if isinstance(part, Text) else "") for part in message.parts]
        if self._shows_entries and (mixed or not self._shows_strings):
            return [{"type": kind} | ({"text": text} if kind == "text" else {}) for kind, text in parts]
        return "".join(text if kind == "text" else self._place[kind] for kind, text in parts)

    @functools.cached_property
    def _shows_strings(self) -> bool:
        return self._shows(_PROBE)

    @functools.cached_property
    def _shows_entries(self) -> bool:
        return self._shows([{"type": "text", "text": _PROBE}])

    def _shows(self, content: Any) -> bool:
        """Whether the template puts out a message with such content."""
        try:
            shown = self._rendered([{"role": "user", "content": content}], reply_follows=True)
        except OmniError:
            return False
        quoted = any(f"{quote}{_PROBE}{quote}" in shown for quote in "'\"")  # a list, put out as Python writes it
        return _PROBE in shown and (isinstance(content, str) or not quoted)


def _read(path: epath.Path) -> str:
    if path.stat().length > LARGEST:
        raise OmniError(f"{path}: larger than {LARGEST} bytes, so no chat template")
    try:
        return path.read_text()
    except UnicodeDecodeError as error:
        raise OmniError(f"{path}: not text in UTF-8 ({error})") from None


def _default(found: Any, path: epath.Path) -> str | None:
    """The template under a key "chat_template": a string, or of several by name the default."""
    if isinstance(found, list) and all(isinstance(each, dict) for each in found):
        found = next((each.get("template") for each in found if each.get("name") == "default"), None)
        if found is None:
            log.warning("%s: none of its chat templates is called default, so none is used", path)
            return None
    if not isinstance(found, str):
        raise OmniError(f"{path}: chat_template is no string, nor a list of templates by name")
    try:
        size = len(found.encode())
    except UnicodeEncodeError as error:
        raise OmniError(f"{path}: chat_template is not valid Unicode ({error.reason})") from None
    if size > LARGEST:
        raise OmniError(f"{path}: chat_template is larger than {LARGEST} bytes")
    return found


def _names(settings: Mapping[str, Any]) -> dict[str, str]:
    """Names of tokens, which stand as strings or as objects with "content"."""
    named = {key: value for key, value in settings.items() if key.endswith("_token")}
    for key in ("extra_special_tokens", "model_specific_special_tokens"):
        named |= more if isinstance(more := settings.get(key), dict) else {}
    found = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
    return {key: value for key, value in found.items() if isinstance(value, str)}
