"""Errors caused by bad input; each message is one line that says what was expected and what was found."""

import contextlib
from collections.abc import Iterator
from typing import Any


class GptOssError(Exception):
    """Bad input; a command prints only the message and exits with code 2."""


class CheckpointError(GptOssError):
    """An unloadable checkpoint; the message names the file or tensor, what was expected and what was found."""


class UsageError(GptOssError):
    """An invalid flag, request field or input line; the message names it, what was expected and what was found."""


def expect(fine: bool, name: str, expected: str, found: Any) -> None:
    """Raise UsageError for `name`, with the expected and the found value, unless `fine`."""
    if not fine:
        raise UsageError(f"{name}: expected {expected}, found {found!r:.60}")


@contextlib.contextmanager
def named(where: str) -> Iterator[None]:
    """Prefix a UsageError raised in the block with `where`, such as a file and line; RecursionError becomes one too."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    except RecursionError:
        raise UsageError(f"{where}: nested too deeply") from None
