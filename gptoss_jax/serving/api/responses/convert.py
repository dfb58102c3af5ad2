"""Reads parts of a body that were decoded before, with errors that name the field."""

from __future__ import annotations

from typing import Any

import msgspec

from gptoss_jax.serving.api.errors import bad_request


def convert[T](value: Any, kind: type[T], where: str) -> T:
    """A decoded value of the field `where` as a struct. Raises ApiError, which names the field."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at `")
        field = where + place.rstrip("`").removeprefix("$")
        raise bad_request(f"{field}: {message}", field) from None
