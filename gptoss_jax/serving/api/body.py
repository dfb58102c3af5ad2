"""Reads the bodies of requests: JSON to msgspec structs, within limits."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest

from gptoss_jax.serving.api.errors import ApiError, bad_request

MAX_BODY = 64 * 2**20
"""The most bytes of a request's body."""


async def read_body(http: HttpRequest, limit: int = MAX_BODY) -> bytes:
    """The body of a request. Raises ApiError if it is longer than `limit` bytes."""
    parts, size = [], 0
    declared = http.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise ApiError(413, f"expected a body of at most {limit} bytes, found {declared}")
    async for part in http.stream():
        size += len(part)
        if size > limit:
            raise ApiError(413, f"expected a body of at most {limit} bytes, found more")
        parts.append(part)
    return b"".join(parts)


async def read_json[T](http: HttpRequest, kind: type[T]) -> T:
    """The body of a request as a struct. Raises ApiError, which names the field, for anything else."""
    return decode(await read_body(http), kind)


def decode[T](body: bytes, kind: type[T]) -> T:
    """JSON as a struct; unknown fields are ignored. Raises ApiError, which names the field."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _invalid(error, "") from None
    except RecursionError:
        raise bad_request("the body is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad_request(f"the body is not valid JSON: {error}") from None


def convert[T](value: Any, kind: type[T], where: str = "", strict: bool = True) -> T:
    """A decoded value of the field `where` as a struct; text is read as a number if not `strict`.

    Raises ApiError, which names the field.
    """
    try:
        return msgspec.convert(value, kind, strict=strict)
    except msgspec.ValidationError as error:
        raise _invalid(error, where) from None


def _invalid(error: msgspec.ValidationError, where: str) -> ApiError:
    message, _, place = str(error).partition(" - at `")
    # Such as $.tools[0].name`, $.metadata[...]`, and key` in `$.metadata`; the last two are of an object's values.
    path = place.rpartition("$")[2].rstrip("`").partition("[...]")[0]
    field = (where + path).removeprefix(".") or None
    return bad_request(f"{field}: {message}" if field else message, field)
