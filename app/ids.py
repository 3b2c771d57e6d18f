"""Ids and cursors as they appear in addresses and JSON: decimal text, strictly read.

JavaScript numbers end at 2^53 and ids at 2^63, so ids travel as strings in both directions.
Used by every schema and endpoint; never looks at what an id contains, that is shardkit's.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from shardkit import ids

__all__ = ["Id", "IdText", "parse_id"]

MAX_DIGITS = 19
"""Digits of 2^63 - 1."""


def parse_id(value: object) -> int:
    """Return the id a text stands for.

    Args:
        value: ASCII digits without sign, space or leading zero, up to 2^63 - 1; an `int`
            passes when it is in range.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, str):
        canonical = value.isascii() and value.isdigit() and len(value) <= MAX_DIGITS
        if not canonical or (value[0] == "0" and value != "0"):
            raise ValueError("must be a decimal id")
        value = int(value)
    if type(value) is not int or not 0 <= value <= ids.MAX_ID:
        raise ValueError("must be an id from 0 to 2^63 - 1")
    return value


_SCHEMA = WithJsonSchema(
    {"type": "string", "pattern": "^(0|[1-9][0-9]{0,18})$", "examples": ["1903344051200000"]}
)

Id = Annotated[int, BeforeValidator(parse_id), _SCHEMA]
"""An id read from a path or a query."""

IdText = Annotated[
    int,
    BeforeValidator(parse_id),
    PlainSerializer(str, return_type=str),
    _SCHEMA,
]
"""An id in JSON: an `int` in Python, a string on the wire."""
