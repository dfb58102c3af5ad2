"""Reads the arguments of a call as a JSON object."""

from __future__ import annotations

import json
import logging
from typing import Any

import msgspec

_EMPTY = "{}"
_logger = logging.getLogger(__name__)


def json_object(text: str) -> str:
    """The JSON object that a call's text contains: the text itself if it is one, and "{}" if none can be read.

    Text after the object is dropped, and characters that JSON allows in strings only when escaped are escaped. An
    object that is not complete is not completed, since a tool could be run with part of a command.
    """
    try:
        if isinstance(msgspec.json.decode(text), dict):
            return text.strip()
    except (msgspec.DecodeError, RecursionError):
        pass
    found = _repaired(text)
    if found is None and text.strip():
        _logger.info("the arguments of a call, %d characters, are not a JSON object", len(text))
    return found or _EMPTY


def _repaired(text: str) -> str | None:
    decoder = json.JSONDecoder(strict=False, parse_float=_finite, parse_constant=_finite)
    try:
        value, _ = decoder.raw_decode(text.lstrip())
        # Half of a surrogate pair is no character.
        written = json.dumps(value, ensure_ascii=False, allow_nan=False).encode(errors="replace").decode()
    except (ValueError, RecursionError):
        return None
    return written if isinstance(value, dict) else None


def _finite(literal: str) -> Any:
    value = float(literal)
    if value - value != 0:
        raise ValueError(f"{literal} is not a JSON number")
    return value
