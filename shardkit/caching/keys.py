"""Names of entries: what has to be equal for two processes to share one.

    generation : epoch : logical shard : table : primary key

A move or a failover raises the epoch, and an operator who trusts nothing raises the generation:
each makes every entry before it a miss. Programs with other columns share the name and not the
bytes, which begin with the `schema_hash`: so whoever changes a row, old program or new, finds
its entry.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

__all__ = ["LONGEST_KEY", "cache_key", "schema_hash"]

LONGEST_KEY: Final = 250
"""Bytes that Memcached takes. Source: memcached, doc/protocol.txt, "Keys"."""

_ESCAPES: Final = str.maketrans({"%": "%25", ":": "%3A", ",": "%2C", "#": "%23"})
_TAGS: Final[dict[type, str]] = {
    int: "", bool: "?", str: "s", bytes: "b", UUID: "u", Decimal: "d", datetime: "t", date: "D",
    time: "T", type(None): "n",
}  # fmt: skip


def cache_key(
    generation: int | str,
    epoch: int,
    logical_shard: int,
    table: str,
    primary_key: Sequence[Any],
) -> str:
    """Return the name of a row's entry: printable ASCII, no spaces, at most 250 bytes.

    Names that would be anything else, of text keys mostly, are a hash of what they would be.

    Args:
        generation: of the whole cache; raised to forget everything. Names its cluster too where
            several share servers.
        epoch: of the logical shard's owner.
        logical_shard: the row's.
        table: its name.
        primary_key: its values, in the order of the columns.
    """
    values = ",".join(
        [str(value) if type(value) is int else _written(value) for value in primary_key]
    )
    key = f"{generation}:{epoch}:{logical_shard}:{table.translate(_ESCAPES)}:{values}"
    if len(key) <= LONGEST_KEY and key.isascii() and key.isprintable() and " " not in key:
        return key
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()
    return f"{generation}:{epoch}:{logical_shard}:#{digest}"


def schema_hash(columns: Iterable[tuple[str, str]]) -> str:
    """Return twelve letters that differ when columns differ: name and type of each, in order."""
    text = "\n".join(f"{name}\t{kind}" for name, kind in columns)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _written(value: Any) -> str:
    """Return a value so that values of other types never read the same."""
    kind = type(value)
    tag = _TAGS.get(kind)
    if tag is None:  # an enumeration, a subclass of int
        return f"!{kind.__name__}!{value!s}".translate(_ESCAPES)
    text = value.hex() if kind is bytes else str(value)
    return tag + text.translate(_ESCAPES)
