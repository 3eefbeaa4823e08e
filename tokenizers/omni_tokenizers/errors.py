"""Errors meant for people: one line saying what was wrong, where, and what to do."""


class OmniError(Exception):
    """Something the user gave (a file, an array, a setting) cannot be used; commands exit with 1."""


class UsageError(OmniError):
    """A command or a configuration that contradicts itself; commands exit with 2."""
