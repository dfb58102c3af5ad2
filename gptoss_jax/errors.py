"""The errors a user can cause: each message is one line that names what was found and what was expected."""

import contextlib
from collections.abc import Iterator
from typing import Any


class GptOssError(Exception):
    """Bad input: a command prints the message alone and exits with code 2."""


class EngineError(GptOssError):
    """A request that the engine could not finish, with the reason."""


class OverloadedError(EngineError):
    """A request that was not taken, since too many are waiting or the engine is being shut down."""


class DeadlineError(EngineError):
    """A request that did not finish within its time limit."""


class CheckpointError(GptOssError):
    """A checkpoint that cannot be loaded: names the file or the tensor, what was expected and what was found."""


class UsageError(GptOssError):
    """A flag, a field of a request or an input line that cannot be used.

    The error's text is `where: field: message`, as much of it as is given.

    Args:
      message: what was expected and what was found.
      field: the field or the flag, such as "max_tokens", "messages[0].content" or "--mesh".
      where: what the field belongs to, such as a file and its line.
    """

    def __init__(self, message: str, field: str | None = None, where: str | None = None) -> None:
        super().__init__(message, field, where)
        self.message, self.field, self.where = message, field, where

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.field, self.message) if part)


def expect(fine: bool, field: str, expected: str, found: Any) -> None:
    """Raise UsageError, with what was expected of the field and what was found, unless it is fine."""
    if not fine:
        raise UsageError(f"expected {expected}, found {found!r:.60}", field)


@contextlib.contextmanager
def named(where: str) -> Iterator[None]:
    """Say where a UsageError of the block is, such as a file and its line; input nested too deeply is one, too."""
    try:
        yield
    except UsageError as error:
        raise UsageError(error.message, error.field, f"{where}: {error.where}" if error.where else where) from None
    except RecursionError:
        raise UsageError("nested too deeply", where=where) from None
