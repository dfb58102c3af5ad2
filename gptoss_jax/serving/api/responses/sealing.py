"""Encrypts reasoning for clients that keep it themselves, as `reasoning.encrypted_content`."""

from __future__ import annotations

import base64
import binascii
import hashlib
import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from gptoss_jax.errors import UsageError
from gptoss_jax.serving.api.errors import bad_request

MIN_SECRET = 16
"""The least bytes of a secret."""

_NONCE = 12


class Sealing:
    """Encrypts text with AES-256 in GCM mode, so that only the key's owner can send it back, and unchanged.

    Servers with the same secret read each other's text. Without a secret, a random one holds until the process ends.
    Raises UsageError for a secret that is too short.
    """

    def __init__(self, secret: bytes | None = None) -> None:
        if secret is not None and len(secret) < MIN_SECRET:
            raise UsageError(f"expected a secret of at least {MIN_SECRET} bytes, found {len(secret)}")
        material = secrets.token_bytes(32) if secret is None else secret
        self._cipher = AESGCM(hashlib.sha256(b"gptoss-jax reasoning 1\0" + material).digest())

    def seal(self, text: str, owner: str) -> str:
        """The encrypted text of an owner."""
        nonce = secrets.token_bytes(_NONCE)
        sealed = nonce + self._cipher.encrypt(nonce, text.encode(), owner.encode())
        return base64.urlsafe_b64encode(sealed).decode()

    def unseal(self, sealed: str, owner: str, where: str) -> str:
        """The text. Raises ApiError, which names the field `where`, for what this owner did not get from here."""
        try:
            data = base64.b64decode(sealed.encode("ascii"), altchars=b"-_", validate=True)
            return self._cipher.decrypt(data[:_NONCE], data[_NONCE:], owner.encode()).decode()
        except (InvalidTag, ValueError, binascii.Error):
            message = "is not what this server encrypted for this client, or its secret has changed since"
            raise bad_request(f"{where}: {message}", where, "invalid_encrypted_content") from None
