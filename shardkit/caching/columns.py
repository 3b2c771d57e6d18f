"""How the values of one column go into an entry and come out again.

Most are written as they are (`shardkit.caching.rows`). An enumeration is written by name, and what
a `TypeDecorator` makes by what it is made of. Other types are refused when a class is mapped, not
when a row is read. Pure.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from typing import Any, Final, NamedTuple
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    CHAR,
    JSON,
    REAL,
    Boolean,
    Date,
    DateTime,
    Enum,
    Float,
    Integer,
    Interval,
    LargeBinary,
    Numeric,
    String,
    Time,
    TypeDecorator,
    Uuid,
)
from sqlalchemy.dialects.postgresql import CITEXT, dialect
from sqlalchemy.types import TypeEngine

__all__ = ["Codec", "codec_of", "is_exact_key"]

_DIALECT: Final = dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy leaves it untyped


class Codec(NamedTuple):
    """How the values of one column are cached; None is always written as it is.

    Attributes:
        kind: text that changes when values cached before could not be read any more.
        plain: makes a value that can be written; None for as it is.
        restore: the way back; raises for what is no such value.
        is_stored: tells of a value that a program gave whether the database will return the very
            same: it rounds, pads and converts others.
    """

    kind: str
    plain: Callable[[Any], Any] | None
    restore: Callable[[Any], Any] | None
    is_stored: Callable[[Any], bool]


def codec_of(kind: TypeEngine[Any]) -> Codec | None:
    """Return how values of a type are cached, or None when they cannot be."""
    text = str(kind.compile(dialect=_DIALECT))
    if isinstance(kind, Enum):
        names = ",".join(kind.enums)
        if kind.enum_class is None:
            return Codec(f"{text}({names})", None, None, lambda value: type(value) is str)
        return _enumerated(kind, f"{text}({names})")
    for known, is_stored in _STORED:
        if isinstance(kind, known):
            return Codec(text, None, None, is_stored(kind))
    if isinstance(kind, ARRAY):
        inner = codec_of(kind.item_type)
        if inner is None or inner.plain is not None or kind.as_tuple:
            return None
        return Codec(text, None, None, _array(inner.is_stored))
    return _decorated(kind) if isinstance(kind, TypeDecorator) else None


def is_exact_key(kind: TypeEngine[Any]) -> bool:
    """Tell whether equal keys of a type are equal here: then an absent row has one name.

    PostgreSQL pads CHAR, folds CITEXT, and a collation may fold too.
    """
    if isinstance(kind, CHAR | CITEXT | Enum):
        return False
    if isinstance(kind, String):
        return kind.collation is None
    if isinstance(kind, Uuid):
        return kind.as_uuid
    return isinstance(kind, Integer | LargeBinary)


def _is(wanted: type) -> Callable[[Any], Callable[[Any], bool]]:
    return lambda _kind: lambda value: type(value) is wanted


def _never(_kind: Any) -> Callable[[Any], bool]:
    return lambda _value: False


def _text(kind: Any) -> Callable[[Any], bool]:
    padded = isinstance(kind, CHAR)
    return lambda value: type(value) is str and not padded


def _float(kind: Any) -> Callable[[Any], bool]:
    is_double = not isinstance(kind, REAL) and (kind.precision or 53) > 24 and not kind.asdecimal
    return lambda value: type(value) is float and is_double and math.isfinite(value)


def _moment(kind: Any) -> Callable[[Any], bool]:
    if getattr(kind, "precision", None) is not None:
        return lambda _value: False
    return lambda value: type(value) is datetime and (value.tzinfo is not None) is kind.timezone


def _time(kind: Any) -> Callable[[Any], bool]:
    if getattr(kind, "precision", None) is not None:
        return lambda _value: False
    return lambda value: type(value) is time and (value.tzinfo is not None) is kind.timezone


def _uuid(kind: Any) -> Callable[[Any], bool]:
    return lambda value: type(value) is UUID and kind.as_uuid


def _json(_kind: Any) -> Callable[[Any], bool]:
    def is_stored(value: Any) -> bool:
        try:
            return bool(json.loads(json.dumps(value)) == value) and not isinstance(value, tuple)
        except (TypeError, ValueError):
            return False

    return is_stored


def _array(is_stored: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        type(value) is list
        and len(value) > 0
        and all(each is None or is_stored(each) for each in value)
    )


_STORED: Final[tuple[tuple[type[TypeEngine[Any]], Callable[[Any], Callable[[Any], bool]]], ...]] = (
    (Boolean, _is(bool)),
    (Integer, _is(int)),
    (Float, _float),
    (Numeric, _never),  # rounded to its scale, and with as many digits
    (String, _text),
    (LargeBinary, _is(bytes)),
    (Uuid, _uuid),
    (DateTime, _moment),
    (Date, _is(date)),
    (Time, _time),
    (Interval, _is(timedelta)),
    (JSON, _json),
)


def _enumerated(kind: Enum, text: str) -> Codec:
    # What SQLAlchemy itself reads and writes them by; `values_callable` may have named them.
    names: Any = kind._valid_lookup  # noqa: SLF001
    members: Any = kind._object_lookup  # noqa: SLF001
    found: Any = kind.enum_class
    return Codec(
        text, names.__getitem__, members.__getitem__, lambda value: isinstance(value, found)
    )


def _decorated(kind: TypeDecorator[Any]) -> Codec | None:
    own = type(kind)
    if (
        own.bind_processor is not TypeDecorator.bind_processor
        or own.result_processor is not TypeDecorator.result_processor
    ):
        return None
    inner = codec_of(kind.impl_instance)
    if inner is None or inner.plain is not None:
        return None
    binds = own.process_bind_param is not TypeDecorator.process_bind_param
    reads = own.process_result_value is not TypeDecorator.process_result_value

    def plain(value: Any) -> Any:
        bound = kind.process_bind_param(value, _DIALECT)
        if bound is None:
            raise TypeError("what is stored as NULL would not come back")
        return bound

    def restore(value: Any) -> Any:
        return kind.process_result_value(value, _DIALECT)

    name = f"{own.__module__}.{own.__qualname__}"
    return Codec(
        f"{name}:{inner.kind}",
        plain if binds else None,
        restore if reads else None,
        lambda _value: False,
    )
