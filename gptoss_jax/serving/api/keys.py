"""API keys: who may use the server."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from gptoss_jax.errors import UsageError
from gptoss_jax.serving.api.errors import ApiError
from gptoss_jax.serving.api.middleware import is_health, refuse, state_of

FLAG = "--api-key-file"
VARIABLE = "GPTOSS_JAX_API_KEY"
MAX_BYTES = 2**20
"""Bytes of a file of keys."""

_logger = logging.getLogger(__name__)


class Keys:
    """The keys that are accepted, kept as hashes, and their names.

    A key's name says in limits, and of stored responses, whose they are. Several keys may have one name.
    """

    def __init__(self, keys: Iterable[tuple[str, str]]) -> None:
        """`keys` are names and keys."""
        self._names = [(_digest(key), name) for name, key in keys]

    @classmethod
    def load(cls, file: Path | None, environ: Mapping[str, str] = os.environ) -> Self | None:
        """The keys of a file, and the one in the environment; None if there is neither.

        A line of the file is `name:key` or a key alone, which is named by a part of its hash; white space, empty lines
        and lines that begin with # are ignored. Raises UsageError, without any part of a key, for anything else.
        """
        keys = [] if file is None else _read(file)
        if (value := environ.get(VARIABLE)) is not None:
            keys.append(("env", _checked(value.strip(), VARIABLE)))
        if file is not None and not keys:
            raise UsageError(f"{file}: expected at least one key, found none", FLAG)
        if len({key for _, key in keys}) < len(keys):
            raise UsageError("expected each key once, found one twice", VARIABLE if file is None else FLAG)
        return cls(keys) if keys else None

    def name_of(self, key: str) -> str | None:
        """The name of a key; None for one that is not accepted. The time it takes does not depend on the key."""
        digest, found = _digest(key), None
        for known, name in self._names:
            if hmac.compare_digest(digest, known):
                found = name
        return found


class KeyGuard:
    """ASGI middleware that refuses requests without an accepted key, except those of /health and `open_paths`.

    The key is in `Authorization: Bearer` or in Anthropic's `x-api-key`. `request.state.key_name` becomes its name.
    """

    def __init__(self, app: ASGIApp, keys: Keys, open_paths: Iterable[str] = ()) -> None:
        self._app, self._keys, self._open = app, keys, frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, as an ASGI application."""
        if scope["type"] == "lifespan" or is_health(scope) or scope["path"] in self._open:
            return await self._app(scope, receive, send)
        key = _presented(Headers(scope=scope))
        name = None if key is None else self._keys.name_of(key)
        if name is None:
            return await refuse(_no_key(key), scope, receive, send)
        state_of(scope)["key_name"] = name
        await self._app(scope, receive, send)


def _presented(headers: Headers) -> str | None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key") or None


def _no_key(key: str | None) -> ApiError:
    message = (
        "expected an API key in the header Authorization (Bearer KEY) or x-api-key, found none"
        if key is None
        else "the API key is not valid"
    )
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _read(file: Path) -> list[tuple[str, str]]:
    try:
        with file.open("rb") as stream:
            mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}", FLAG) from None
    if mode & 0o077:
        _logger.warning("%s: %s: others can read the keys (mode %04o); run chmod 600 on it", FLAG, file, mode)
    if len(content) > MAX_BYTES:
        raise UsageError(f"{file}: expected at most {MAX_BYTES} bytes, found more", FLAG)
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UsageError(f"{file}: expected text in UTF-8", FLAG) from None
    keys = []
    for number, line in enumerate(map(str.strip, lines), 1):
        if line and not line.startswith("#"):
            keys.append(_parsed(line, f"{FLAG}: {file}: line {number}"))
    return keys


def _parsed(line: str, where: str) -> tuple[str, str]:
    name, colon, key = line.partition(":")
    if not colon:
        key = _checked(line, where)
        return f"key-{_digest(key).hex()[:12]}", key
    if not name.strip():
        raise UsageError("expected a name before the colon, found none", where=where)
    return name.strip(), _checked(key.strip(), where)


def _checked(key: str, where: str) -> str:
    if not key or not all("!" <= character <= "~" for character in key):
        raise UsageError("expected a key of printable ASCII characters without spaces", where=where)
    return key
