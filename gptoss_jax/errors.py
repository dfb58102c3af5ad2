"""The errors a user can cause: each message is one line that names what was found and what was expected."""

from typing import Any


class GptOssError(Exception):
    """Bad input: a command prints the message alone and exits with code 2."""


class CheckpointError(GptOssError):
    """A checkpoint that cannot be loaded: names the file or the tensor, what was expected and what was found."""


class UsageError(GptOssError):
    """A flag, request field or input line that cannot be used: names it, what was expected and what was found."""


def expect(fine: bool, name: str, expected: str, found: Any) -> None:
    """Unless it is fine, raises UsageError: what of the name was expected, and what was found."""
    if not fine:
        raise UsageError(f"{name}: expected {expected}, found {found!r:.60}")
