"""Tells that a logical shard is fenced: the application role may not use its tables any more.

A fence is a REVOKE, so that PostgreSQL keeps it whatever the client knows. What it answers then
becomes `ShardFencedError`, which names the logical shard. Called for the engines of
`shardkit.connections`, and by sessions for the server of a scatter. Source: docs/architecture.md,
decision 7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import psycopg
from sqlalchemy import Table
from sqlalchemy.sql.visitors import iterate

from shardkit.errors import ShardFencedError
from shardkit.schemas import ANY_SCHEMA
from shardkit.topology import schema_name

__all__ = ["first_fenced", "refusal"]

# Reads the catalogue only; takes no lock on the tables it is about.
_FENCED: Final = """
SELECT n.nspname FROM pg_catalog.pg_namespace AS n
WHERE n.nspname = ANY (%(schemas)s) AND (
    NOT pg_catalog.has_schema_privilege(n.oid, 'USAGE') OR EXISTS (
        SELECT FROM pg_catalog.pg_class AS c
        WHERE c.relnamespace = n.oid AND c.relname = ANY (%(tables)s)
            AND NOT pg_catalog.has_table_privilege(c.oid, 'SELECT')))
ORDER BY n.nspname LIMIT 1
"""


def refusal(context: Any) -> Exception | None:
    """Return the error of a statement refused by a fence: SQLAlchemy's `handle_error` hook.

    Only statements about the schemas of logical shards count. Of one about many, which is fenced
    has to be asked: `first_fenced`.
    """
    if not isinstance(context.original_exception, psycopg.errors.InsufficientPrivilege):
        return None
    connection = context.connection
    schemas = {} if connection is None else connection.get_execution_options().get(
        "schema_translate_map") or {}  # fmt: skip
    schema = schemas.get(None)
    if schema is None:
        return None
    shard = None if schema == ANY_SCHEMA else int(schema.rpartition("_")[2])
    reason = str(context.original_exception).strip().splitlines()[0]
    return ShardFencedError(
        f"the application role may not use the tables: {reason}",
        logical_shard=shard,
        hint="the logical shard is being moved; if it is not, run shardkit migrate apply",
    )


def first_fenced(
    ask: Callable[..., Sequence[Sequence[Any]]], statement: Any, shards: Iterable[int]
) -> int | None:
    """Return the first of some logical shards of a server that is fenced, or None for none.

    Args:
        ask: runs a query with parameters on that server, and returns its rows.
        statement: what was refused.
        shards: the logical shards it was about.

    Raises:
        UnavailableError: the server does not answer (retryable).
    """
    schemas = {schema_name(shard): shard for shard in shards}
    tables = {part.name for part in iterate(statement) if isinstance(part, Table)}
    rows = ask(_FENCED, {"schemas": list(schemas), "tables": sorted(tables)})
    return schemas[rows[0][0]] if rows else None
