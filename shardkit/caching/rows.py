"""How a row is written into an entry: msgpack, values in the order of the columns.

Never pickle: bytes of a cache are no program. MessagePack is compact and quick, tells text from
bytes, and its reader takes limits, so that hostile bytes cost little. What it has no type for
(times, decimals, UUIDs) is an extension with the text of the value.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal, InvalidOperation
from typing import Any, Final
from uuid import UUID

import msgpack

from shardkit.caching.entries import LARGEST_ENTRY

__all__ = ["decode_row", "encode_row"]

_BIG, _UUID, _DECIMAL, _DATETIME, _DATE, _TIME, _DELTA = range(1, 8)

_DELTA_TEXT: Final = "{0.days},{0.seconds},{0.microseconds}"


def encode_row(values: Sequence[Any]) -> bytes | None:
    """Return the bytes of a row, or None when it cannot be cached: too large, or a strange type."""
    try:
        packed: bytes = msgpack.packb(values, default=_extended, strict_types=True)
    except (TypeError, ValueError, OverflowError, RecursionError):
        return None
    return packed if len(packed) < LARGEST_ENTRY - 64 else None


def decode_row(payload: bytes, n_values: int) -> list[Any] | None:
    """Return the values of a row, or None when the bytes are not a row of so many values."""
    try:
        values = msgpack.unpackb(payload, ext_hook=_restored, strict_map_key=False)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException, InvalidOperation):
        return None
    if type(values) is not list or len(values) != n_values:
        return None
    return values


def _extended(value: Any) -> Any:
    kind = type(value)
    if kind is tuple:
        return list(value)
    if kind is UUID:
        return msgpack.ExtType(_UUID, value.bytes)
    if kind is int:
        return msgpack.ExtType(_BIG, str(value).encode())
    code = _TEXTS.get(kind)
    if code is None:
        raise TypeError(f"{kind.__name__} is not cached")
    text = _DELTA_TEXT.format(value) if kind is timedelta else _text(value)
    return msgpack.ExtType(code, text.encode())


def _text(value: Any) -> str:
    return str(value) if isinstance(value, Decimal) else str(value.isoformat())


_TEXTS: Final[dict[type, int]] = {
    Decimal: _DECIMAL,
    datetime: _DATETIME,
    date: _DATE,
    time: _TIME,
    timedelta: _DELTA,
}


def _restored(code: int, data: bytes) -> Any:
    if code == _UUID:
        return UUID(bytes=data)
    text = data.decode()
    if code == _BIG:
        return int(text)
    if code == _DECIMAL:
        return Decimal(text)
    if code == _DATETIME:
        return datetime.fromisoformat(text)
    if code == _DATE:
        return date.fromisoformat(text)
    if code == _TIME:
        return time.fromisoformat(text)
    if code == _DELTA:
        days, seconds, microseconds = map(int, text.split(","))
        return timedelta(days, seconds, microseconds)
    raise ValueError(f"extension {code}")
