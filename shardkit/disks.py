"""What a server says of its disk: full, failing, or damaged; with logical shard and table.

One of SQLAlchemy's `handle_error` hooks, as `fences` has one: every statement of a session, and
every one that shardkit sends for it, becomes an error that says what, where and what to do. Damage
is never taken for absence: PostgreSQL refuses to read what it cannot read, and so does shardkit.
Source: PostgreSQL manual, appendix A, error codes; docs/faults.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from sqlalchemy.exc import DBAPIError

from shardkit import deadlines
from shardkit.errors import DamagedDataError, DiskFullError, ShardkitError, StorageError
from shardkit.topology import Endpoint

__all__ = ["disk_error", "tells"]

Ask = Callable[[str, Mapping[str, Any]], Sequence[Sequence[Any]]]

_FULL: Final = "53100"
"""disk_full. The statement left nothing, and the next one may find room."""

_FAILED: Final = "58030"
"""io_error."""

_DAMAGED: Final = frozenset({"XX001", "XX002", "58P01"})
"""data_corrupted, index_corrupted, and undefined_file: a file of a table is not there."""

_RETRY_AFTER: Final = 1.0
"""Seconds after which it is worth a try whether a disk has room again. A choice."""

_LOOKUP: Final = 0.5
"""Seconds that a server has to say which table a file is of."""

_FILE: Final = re.compile(r'"(?:base|pg_tblspc/(\d+)/[^/"]+)/\d+/(\d+)(?:_[a-z]+)?(?:\.\d+)?"')
_TOAST: Final = re.compile(r"\bpg_toast_(\d+)\b")
_INDEX: Final = re.compile(r'\bindex "([^"]+)"')
_SCHEMA: Final = re.compile(r"^shard_(\d{4})$")

# Catalogues only. The table that a file, an index or a toast table is of.
_TABLE: Final = """
SELECT n.nspname, t.relname FROM pg_catalog.pg_class AS r
    LEFT JOIN pg_catalog.pg_index AS i ON i.indexrelid = r.oid
    LEFT JOIN pg_catalog.pg_class AS o ON o.reltoastrelid = coalesce(i.indrelid, r.oid)
    JOIN pg_catalog.pg_class AS t ON t.oid = coalesce(o.oid, i.indrelid, r.oid)
    JOIN pg_catalog.pg_namespace AS n ON n.oid = t.relnamespace
WHERE r.oid = CASE WHEN %(oid)s::bigint IS NOT NULL THEN %(oid)s::bigint::oid
        ELSE pg_catalog.pg_filenode_relation(%(space)s::bigint::oid, %(file)s::bigint::oid) END
    OR (r.relname = %(index)s AND n.nspname = %(schema)s)
"""


def tells(ask: Ask, endpoint: Endpoint) -> Callable[[Any], Exception | None]:
    """Return SQLAlchemy's `handle_error` hook for the connections to a server.

    Args:
        ask: runs a query with parameters on the primary of its physical shard, where the files of
            tables have the same names.
        endpoint: the server.
    """

    def told(context: Any) -> Exception | None:
        if context.statement is None:  # COMMIT and the like: who commits says what it means
            return None
        error, connection = context.original_exception, context.connection
        schemas = {} if connection is None else connection.get_execution_options().get(
            "schema_translate_map") or {}  # fmt: skip
        found = disk_error(error, str(endpoint), schemas.get(None))
        if isinstance(found, DamagedDataError):
            _name(found, ask, str(error), schemas.get(None))
        return found

    return told


def disk_error(
    error: BaseException, endpoint: str | None = None, schema: str | None = None
) -> ShardkitError | None:
    """Return what an error says of a server's disk; None where it says nothing of it.

    Args:
        error: of the driver, or as SQLAlchemy wraps it.
        endpoint: the server.
        schema: of the logical shard that it was about; None or another name for none.
    """
    cause = error.orig if isinstance(error, DBAPIError) else error
    code = getattr(cause, "sqlstate", None)
    where: dict[str, Any] = {"logical_shard": _shard_of(schema), "endpoint": endpoint}
    reason = (str(cause).strip().splitlines() or [""])[0]
    if code == _FULL:
        return DiskFullError(
            f"the server's disk is full: {reason}",
            hint="make room there; what is there can be read meanwhile",
            retry_after=_RETRY_AFTER,
            **where,
        )
    if code in _DAMAGED:
        return DamagedDataError(
            f"the server cannot read what it stored: {reason}",
            hint="another server of the physical shard may have it whole: docs/faults.md",
            **where,
        )
    if code == _FAILED:
        return StorageError(
            f"the server's disk fails: {reason}",
            hint="replace it: have a standby become the primary, shardkit failover",
            **where,
        )
    return None


def _shard_of(schema: str | None) -> int | None:
    match = _SCHEMA.match(schema or "")
    return int(match[1]) if match else None


def _name(found: DamagedDataError, ask: Ask, text: str, schema: str | None) -> None:
    """Ask which table the damaged file is of, and complete the error where there is an answer."""
    file, toast, index = _FILE.search(text), _TOAST.search(text), _INDEX.search(text)
    given = {
        "oid": int(toast[1]) if toast else None,
        "space": int(file[1] or 0) if file else None,
        "file": int(file[2]) if file else None,
        "index": index[1] if index else None,
        "schema": schema,
    }
    rows: Sequence[Sequence[Any]] = []
    # It is damaged whether or not anybody can say what.
    with suppress(Exception), deadlines.deadline(_LOOKUP):
        rows = ask(_TABLE, given)
    if rows:
        place, table = rows[0]
        found.named(str(table), _shard_of(str(place)))
