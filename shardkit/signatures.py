"""Signs tokens that leave the process, so that what comes back is known to be ours.

Used by `shardkit.contrib`. A client that could make tokens could send every read to a primary; it
could not make a read stale. Keys rotate: the first signs, any of them is accepted.
Source: RFC 2104 (HMAC), FIPS 180-4 (SHA-256).
"""

from __future__ import annotations

import hmac
from base64 import urlsafe_b64encode
from collections.abc import Sequence
from typing import Final

from shardkit.errors import ConfigurationError
from shardkit.tokens import LONGEST

__all__ = ["SHORTEST_KEY", "Signer"]

SHORTEST_KEY: Final = 16
"""Bytes; 128 bits cannot be guessed."""

_PURPOSE: Final = b"shardkit token 1\0"
"""Signed along, so that a signature made for something else with the same key is worth nothing."""

_SIGNATURE: Final = 43
"""Characters of a signature: 256 bits in base 64, without padding."""


class Signer:
    """Signs texts and opens what it signed.

    Args:
        keys: secrets of at least 16 bytes; the first signs, all are accepted.

    Raises:
        ConfigurationError: there is no key, or one is too short.
    """

    def __init__(self, keys: Sequence[str | bytes]) -> None:
        self._keys = tuple(key.encode() if isinstance(key, str) else key for key in keys)
        if not self._keys or any(len(key) < SHORTEST_KEY for key in self._keys):
            raise ConfigurationError(
                f"tokens.keys: give one or more keys of at least {SHORTEST_KEY} bytes, "
                "the newest first"
            )

    def sign(self, text: str) -> str:
        """Return a text with its signature."""
        return f"{text}.{_signature(self._keys[0], text)}"

    def open(self, signed: str) -> str | None:
        """Return the text that was signed, or None when this is nothing that we signed."""
        if len(signed) > LONGEST + 1 + _SIGNATURE or not signed.isascii():
            return None
        text, _, signature = signed.rpartition(".")
        matches = [hmac.compare_digest(_signature(key, text), signature) for key in self._keys]
        return text if any(matches) else None


def _signature(key: bytes, text: str) -> str:
    digest = hmac.digest(key, _PURPOSE + text.encode(), "sha256")
    return urlsafe_b64encode(digest).decode().rstrip("=")
