"""Strings that end a text."""

from __future__ import annotations

from collections.abc import Sequence

from omni_tokenizers.errors import UsageError


class StopStrings:
    """Strings of which the first that appears in a text ends it; without any, texts stay as they are."""

    def __init__(self, strings: Sequence[str] = ()):
        """The strings; `UsageError` for an empty one, and for what is no list of strings."""
        if isinstance(strings, str) or not all(isinstance(string, str) and string for string in strings):
            raise UsageError(f"stop is a list of strings that are not empty, not {strings!r}")
        self.strings = tuple(strings)

    def found(self, text: str) -> bool:
        """Whether the text holds one."""
        return any(string in text for string in self.strings)

    def cut(self, text: str) -> str:
        """The text before the first of them."""
        return text[: min((text.index(string) for string in self.strings if string in text), default=len(text))]

    def settled(self, text: str) -> str:
        """The text without what at its end may become one, whatever comes next."""
        beginnings = (string[:length] for string in self.strings for length in range(1, len(string)))
        held = max((len(beginning) for beginning in beginnings if text.endswith(beginning)), default=0)
        return text[: len(text) - held]
