"""Text."""

import dataclasses
import html
import os
from typing import ClassVar

from omni import media
from omni.parts.shared import context_note, extension_of
from omni_tokenizers.errors import UsageError

_SHOWN_CHARACTERS = 60


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Text:
    """A piece of text.

    Raises UsageError for anything but a string that UTF-8 can encode.
    """

    text: str
    """The text, as it is; nothing in it is ever read as a control token."""
    context: bool = False
    """True for a part that is given, not learned or generated."""

    modality: ClassVar[str] = "text"

    def __post_init__(self):
        if not isinstance(self.text, str):
            raise UsageError(f"text: expected a string, got {type(self.text).__name__}")
        try:
            self.text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(f"text: character {error.start} is a lone surrogate, not valid Unicode text") from error

    @classmethod
    def read(cls, path: str | os.PathLike) -> "Text":
        """Reads a UTF-8 file; see `omni.media.read_text` for limits and errors."""
        return cls(media.read_text(path))

    def save(self, path: str | os.PathLike) -> None:
        """Writes UTF-8 to .txt or .md; raises UsageError for another extension, OmniError if it cannot be written."""
        extension_of(path, media.TEXT_EXTENSIONS, "text")
        media.write_file(path, self.text.encode("utf-8"))

    def __repr__(self) -> str:
        if len(self.text) <= _SHOWN_CHARACTERS:
            return f"Text({self.text!r}{context_note(self)})"
        return f"Text({self.text[:_SHOWN_CHARACTERS]!r}..., {len(self.text)} characters{context_note(self)})"

    def _repr_html_(self) -> str:
        return f'<div style="white-space: pre-wrap">{html.escape(self.text)}</div>'
