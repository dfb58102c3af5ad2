"""Identifiers of responses and their items, which are the server's and cannot be guessed."""

from __future__ import annotations

import secrets


def new_id(prefix: str) -> str:
    """An identifier such as "resp_...", or "msg_..."."""
    return f"{prefix}_{secrets.token_hex(24)}"
