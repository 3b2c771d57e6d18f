"""Writes answers so that only who has sent the Idempotency-Key can read them.

The record of a request keeps its answer for a day, with names and texts of people in it. It cannot
be found by person, so it could not be removed with an account; sealed, it says nothing of anybody,
for the key is the client's and is kept nowhere. Pure.

Source: FIPS 202, section 6.3 and appendix A.2: SHAKE256 as a stream of unforeseeable bytes, here
from a salt that no other record has and the key; what is written is the exclusive or with it. A key
that can be guessed protects as little as a password that can; `docs/api.md` says so to clients.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
from typing import Any, Final

__all__ = ["opened", "sealed"]

SALT_BYTES: Final = 16


def sealed(key: str, answer: Any) -> str:
    """Return an answer, which is JSON, as a text that says nothing without the key."""
    data = json.dumps(answer, allow_nan=False, separators=(",", ":")).encode()
    salt = secrets.token_bytes(SALT_BYTES)
    return base64.b64encode(salt + _mixed(key, salt, data)).decode()


def opened(key: str, text: str) -> Any:
    """Return the answer that was sealed with the key."""
    raw = base64.b64decode(text)
    return json.loads(_mixed(key, raw[:SALT_BYTES], raw[SALT_BYTES:]))


def _mixed(key: str, salt: bytes, data: bytes) -> bytes:
    stream = hashlib.shake_256(salt + key.encode()).digest(len(data))
    return (int.from_bytes(data, "big") ^ int.from_bytes(stream, "big")).to_bytes(len(data), "big")
