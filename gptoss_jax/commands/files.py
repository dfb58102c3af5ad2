"""Files that flags name: read, parsed and checked with errors of one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from gptoss_jax.errors import UsageError, named

JSON_KINDS = {
    dict: "a JSON object",
    list: "a JSON list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
"""What the types that JSON is read as are called."""


def read_text(path: Path, flag: str) -> str:
    """A text file named by a flag, less the byte order mark that some editors write. Raises UsageError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{flag}: {path}: not UTF-8 text") from None
    except OSError as error:
        raise UsageError(f"{flag}: {path}: {error.strerror}") from None


def check_writable(path: Path, flag: str) -> None:
    """Before the work whose result a file is for: raises UsageError where it could not be written. None is made yet."""
    try:
        there = path.exists()
        if there and not path.is_file():
            raise UsageError(f"{flag}: {path}: expected a regular file")
        if not os.access(path if there else path.absolute().parent, os.W_OK):
            raise UsageError(f"{flag}: {path}: expected a place that can be written")
    except OSError as error:
        raise UsageError(f"{flag}: {path}: {error.strerror}") from None


def parse_json(text: str, where: str, kind: type) -> Any:
    """JSON whose outermost value is a `kind`. Raises UsageError."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, kind):
        raise UsageError(f"{where}: expected {JSON_KINDS[kind]}, found {JSON_KINDS[type(value)]}")
    return value


def read_json(path: Path, flag: str, kind: type) -> Any:
    """A JSON file named by a flag, whose outermost value is a `kind`. Raises UsageError."""
    return parse_json(read_text(path, flag), f"{flag}: {path}", kind)


def read_tools(path: Path, flag: str) -> list[Any]:
    """The function tools of a JSON file named by a flag. Raises UsageError."""
    from gptoss_jax.text.harmony.tools import function_tools

    tools: list[Any] = read_json(path, flag, list)
    with named(f"{flag}: {path}"):
        function_tools(tools)
    return tools
