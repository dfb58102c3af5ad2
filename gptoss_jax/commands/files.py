"""Reads, parses and checks the files that flags name, with one-line errors."""

from __future__ import annotations

import json
import math
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
"""Names of JSON types by their Python types, for error messages."""


def read_text(path: Path, flag: str) -> str:
    """The text of a file named by a flag, without a byte order mark. Raises UsageError."""
    try:
        # Path.read_text would translate the ends of lines.
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not UTF-8 text", flag) from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", flag) from None
    except ValueError as error:  # a null byte
        raise UsageError(f"{str(path)!r:.60}: {error}", flag) from None


def check_writable(path: Path, flag: str) -> None:
    """Raise UsageError if a file could not be written, before the work that produces it; creates nothing."""
    try:
        there = path.exists()
        if there and not path.is_file():
            raise UsageError(f"{path}: expected a regular file", flag)
        if not os.access(path if there else path.absolute().parent, os.W_OK):
            raise UsageError(f"{path}: expected a writable path", flag)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", flag) from None


def _finite(text: str) -> float:
    """A JSON number; raises ValueError for NaN and infinities, which Python's json reads and JSON does not have."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"expected a finite number, found {text:.20}")
    return value


def parse_json(text: str | bytes, where: str | None, kind: type) -> Any:
    """Parse JSON whose outermost value has the Python type `kind`. Raises UsageError."""
    try:
        value = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not valid JSON: {error}", where=where) from None
    if not isinstance(value, kind):
        raise UsageError(f"expected {JSON_KINDS[kind]}, found {JSON_KINDS[type(value)]}", where=where)
    return value


def read_json(path: Path, flag: str, kind: type) -> Any:
    """Parse a JSON file named by a flag, whose outermost value has the Python type `kind`. Raises UsageError."""
    return parse_json(read_text(path, flag), f"{flag}: {path}", kind)


def read_tools(path: Path, flag: str) -> list[Any]:
    """The function tools in a JSON file named by a flag. Raises UsageError."""
    from gptoss_jax.text.harmony.tools import function_tools

    tools: list[Any] = read_json(path, flag, list)
    with named(f"{flag}: {path}"):
        function_tools(tools)
    return tools
