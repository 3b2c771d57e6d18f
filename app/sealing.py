"""Seals answers so that only who has sent the Idempotency-Key can read them.

The record of a request keeps its answer for a day, with names and texts of people in it. It cannot
be found by person, so it could not be removed with an account; sealed, it says nothing of anybody,
for the key is the client's and is kept nowhere. Nor can it be changed, or put in place of another
answer, without that being found. Pure.

ChaCha20-Poly1305 (RFC 8439), whose key and nonce HKDF-SHA256 (RFC 5869) makes of the client's key
and a salt of 256 random bits; so each answer has a key of its own, and none is used twice. A key
that can be guessed protects as little as a password that can; `docs/api.md` says so to clients.
"""

from __future__ import annotations

import base64
import binascii
import json
import secrets
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from app.errors import AnswerLostError

__all__ = ["opened", "sealed"]

FORM: Final = "chacha20poly1305:"
"""How a sealed answer begins, and what HKDF is told that its output is for: another form of
sealing gets another beginning, and so other keys."""

SALT_BYTES: Final = 32
"""Source: RFC 5869, section 3.1: as long as the hash; random, so no two are the same."""

KEY_BYTES, NONCE_BYTES = 32, 12
"""Source: RFC 8439, section 2.8."""


def sealed(key: str, answer: Any, *, of: str) -> str:
    """Return an answer, which is JSON, as a text that says nothing without the key.

    Args:
        key: the client's.
        answer: what is sealed.
        of: what it is the answer to; needed again to open it.
    """
    data = json.dumps(answer, allow_nan=False, separators=(",", ":")).encode()
    salt = secrets.token_bytes(SALT_BYTES)
    cipher, nonce = _made(key, salt)
    return FORM + base64.b64encode(salt + cipher.encrypt(nonce, data, of.encode())).decode()


def opened(key: str, text: str, *, of: str) -> Any:
    """Return the answer that was sealed with the key.

    Raises:
        AnswerLostError: it was sealed with another key, for something else, in another way, or was
            changed since.
    """
    if not text.startswith(FORM):
        raise AnswerLostError
    try:
        raw = base64.b64decode(text.removeprefix(FORM), validate=True)
        cipher, nonce = _made(key, raw[:SALT_BYTES])
        return json.loads(cipher.decrypt(nonce, raw[SALT_BYTES:], of.encode()))
    except (binascii.Error, ValueError, InvalidTag) as error:
        raise AnswerLostError from error


def _made(key: str, salt: bytes) -> tuple[ChaCha20Poly1305, bytes]:
    """Return the cipher and the nonce of one answer."""
    length = KEY_BYTES + NONCE_BYTES
    made = HKDF(SHA256(), length, salt=salt, info=FORM.encode()).derive(key.encode())
    return ChaCha20Poly1305(made[:KEY_BYTES]), made[KEY_BYTES:]
