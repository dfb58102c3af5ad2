"""The errors a user can cause: each message is one line that names what was found and what was expected."""

import contextlib
from collections.abc import Iterator
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


@contextlib.contextmanager
def named(where: str) -> Iterator[None]:
    """A UsageError of the block says where it is, such as a file and its line; too deep a nesting there is one, too."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    except RecursionError:
        raise UsageError(f"{where}: nested too deeply") from None
