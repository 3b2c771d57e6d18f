"""Shard key values: which are accepted for a column, and the one byte string each stands for.

One value must name one logical shard however it is written, and only values that PostgreSQL finds
again may place a row. So a value is of its column's type or it is refused: 1 never stands for
"1", text is NFC, a UUID is the same in any spelling. Called by `shardkit.strategies`; pure.
"""

from __future__ import annotations

import re
import unicodedata
import uuid
from enum import StrEnum
from typing import Final

from shardkit.errors import InvalidShardKeyError

__all__ = ["MAX_KEY_BYTES", "Key", "KeyType", "canonical", "checked", "shown"]

Key = int | str | uuid.UUID | bytes
"""A checked shard key value."""

MAX_KEY_BYTES: Final = 2048
"""Longest text or bytes. Source: an entry of a PostgreSQL B-tree has at most 2704 bytes."""

_LEAST, _MOST = -(1 << 63), (1 << 63) - 1  # of a bigint

# What both Python and PostgreSQL read as one UUID.
_UUID: Final = re.compile(
    r"\{?[0-9a-f]{8}(-?)[0-9a-f]{4}\1[0-9a-f]{4}\1[0-9a-f]{4}\1[0-9a-f]{12}\}?", re.IGNORECASE
)


class KeyType(StrEnum):
    """The type of a shard key column, as far as placing rows is concerned."""

    INTEGER = "integer"
    TEXT = "text"
    UUID = "uuid"
    BYTES = "bytes"


_WANTED: Final = {
    KeyType.INTEGER: "a whole number of 64 bits (int)",
    KeyType.TEXT: "text (str)",
    KeyType.UUID: "a uuid.UUID or its text",
    KeyType.BYTES: "bytes",
}


def checked(key_type: KeyType, value: object) -> Key:
    """Return a value as the key it is: a UUID given as text becomes a `uuid.UUID`.

    Args:
        key_type: the type of its column.
        value: what the caller gave.

    Raises:
        InvalidShardKeyError: it is of another type, or PostgreSQL could not store it or would
            not find it again.
    """
    match key_type:
        case KeyType.INTEGER:
            if type(value) is int and _LEAST <= value <= _MOST:
                return value
        case KeyType.TEXT:
            if type(value) is str:
                return _checked_text(value)
        case KeyType.UUID:
            if isinstance(value, uuid.UUID):
                return value
            if isinstance(value, str) and len(value) <= 38 and _UUID.fullmatch(value):
                return uuid.UUID(value)
        case KeyType.BYTES:
            if type(value) is bytes and len(value) <= MAX_KEY_BYTES:
                return value
    raise InvalidShardKeyError(
        f"{shown(value)} ({type(value).__name__}) cannot place a row",
        hint=f"this shard key is {_WANTED[key_type]}"
        + (f" of at most {MAX_KEY_BYTES} bytes" if key_type is KeyType.BYTES else ""),
    )


def canonical(value: object) -> bytes:
    """Return the one byte string of a key value, the same in every process and version.

    The first byte tells the type, so that 1 and "1" differ: a column has one type. Text is
    NFC-normalised, a UUID is its 16 bytes whatever its spelling.

    Raises:
        InvalidShardKeyError: not text, a whole number, a UUID or bytes.
    """
    if isinstance(value, str):
        return b"s" + unicodedata.normalize("NFC", value).encode("utf-8", "surrogatepass")
    if type(value) is int:
        return b"i" + str(value).encode("ascii")
    if isinstance(value, uuid.UUID):
        return b"u" + value.bytes
    if isinstance(value, bytes):
        return b"b" + value
    raise InvalidShardKeyError(
        f"{shown(value)} cannot be a shard key",
        hint="give text, a whole number, a UUID or bytes",
    )


def shown(value: object) -> str:
    """Return a value for a message: on one line, printable, and short however long it is."""
    if isinstance(value, str | bytes) and len(value) > 64:
        return f"{value[:10]!a} and {len(value) - 10} more"
    if isinstance(value, int) and not _LEAST <= value <= _MOST:
        return f"a number of {value.bit_length()} bits"
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _checked_text(value: str) -> str:
    """Refuse text that PostgreSQL cannot store, or that equal-looking text would not match."""
    if value.isascii() and len(value) <= MAX_KEY_BYTES and "\0" not in value:
        return value
    # The length first: nothing below should work through ten megabytes.
    if len(value) > MAX_KEY_BYTES:
        raise InvalidShardKeyError(
            f"{shown(value)} characters are too long for a shard key",
            hint=f"an index holds {MAX_KEY_BYTES} bytes; use a digest of it as the key",
        )
    if "\0" in value:
        raise InvalidShardKeyError(
            f"{shown(value)} contains NUL, which PostgreSQL cannot store", hint="remove it"
        )
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise InvalidShardKeyError(
            f"{shown(value)} contains half a surrogate pair, which is no text",
            hint='decode input with errors="replace" or refuse it',
        ) from None
    if size > MAX_KEY_BYTES:
        raise InvalidShardKeyError(
            f"{shown(value)} takes {size} bytes, too many for a shard key",
            hint=f"an index holds {MAX_KEY_BYTES} bytes; use a digest of it as the key",
        )
    if not unicodedata.is_normalized("NFC", value):
        # PostgreSQL compares bytes: the other spelling would be another row.
        raise InvalidShardKeyError(
            f"{shown(value)} is not in Unicode's normal form NFC",
            hint='pass unicodedata.normalize("NFC", key), when writing and when reading',
        )
    return value
