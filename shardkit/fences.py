"""Tells that a logical shard is fenced or has moved: the application may not use its tables here.

A fence is a REVOKE, so that PostgreSQL keeps it whatever the client knows. What it answers then
becomes `ShardFencedError` or `ShardMovedError`, which name the logical shard. Called for
the engines of `shardkit.connections`, and by sessions for the server of a scatter.
Source: docs/moves.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Protocol

from sqlalchemy import Table
from sqlalchemy.sql.visitors import iterate

from shardkit.errors import ShardFencedError, ShardMovedError
from shardkit.retry import MOVED, READ_ONLY
from shardkit.schemas import ANY_SCHEMA
from shardkit.topology import Endpoint, Hold, ShardMap, schema_name

__all__ = ["first_fenced", "moved", "refuses", "still_closed"]

_NO_RIGHT: Final = "42501"

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


class Owners(Protocol):
    """What knows who owns what."""

    def distrust(self, physical: str, /) -> None:
        """Have a physical shard asked what it owns before it is used again."""

    def whereabouts(self, logical_shard: int, /) -> tuple[str, Hold | None]:
        """Ask who owns a logical shard; return its owner, and why it cannot be used as ever."""


def refuses(owners: Owners, endpoint: Endpoint) -> Callable[[Any], Exception | None]:
    """Return SQLAlchemy's `handle_error` hook for the connections to a server.

    Whatever says that a logical shard may be here no more has its server asked what it owns before
    it is used again. Only statements about the schemas of logical shards become errors of
    shardkit. Of one about many, which is fenced has to be asked: `first_fenced`.

    Args:
        owners: told of it, and asked.
        endpoint: the server.
    """

    def refusal(context: Any) -> Exception | None:
        error = context.original_exception
        code = getattr(error, "sqlstate", None)
        if code not in MOVED:
            return None
        owners.distrust(endpoint.physical)
        connection = context.connection
        schemas = {} if connection is None else connection.get_execution_options().get(
            "schema_translate_map") or {}  # fmt: skip
        schema = schemas.get(None)
        if schema is None or code == READ_ONLY:
            return None
        shard = None if schema == ANY_SCHEMA else int(schema.rpartition("_")[2])
        reason = str(error).strip().splitlines()[0]
        if shard is not None:
            owner, hold = owners.whereabouts(shard)
            if owner != endpoint.physical:
                return moved(shard, owner)
            if hold is not None:
                return ShardFencedError(
                    f"it is {hold}: {reason}", logical_shard=shard, endpoint=str(endpoint)
                )
        if code != _NO_RIGHT:
            return None  # a table that does not exist
        return ShardFencedError(
            f"the application role may not use the tables: {reason}",
            logical_shard=shard,
            hint="the logical shard is being moved; if it is not, run shardkit migrate apply",
        )

    return refusal


def moved(logical_shard: int, owner: str) -> ShardMovedError:
    """Return the error of a logical shard that is used where it is no more."""
    return ShardMovedError(
        f"it has moved to physical shard {owner!r}",
        logical_shard=logical_shard,
        hint="begin the transaction again; cluster.run() does so by itself",
    )


def still_closed(logical_shard: int, shard_map: ShardMap) -> ShardFencedError:
    """Return the error of a logical shard that stays closed for as long as anybody waits."""
    if shard_map.held.get(logical_shard) is Hold.DISPUTED:
        return ShardFencedError(
            f"two physical shards say that they own it, at epoch {shard_map.epochs[logical_shard]}",
            logical_shard=logical_shard,
            hint="nothing is written to either before shardkit move has settled it",
        )
    return ShardFencedError(
        f"it is {shard_map.held.get(logical_shard, Hold.FENCED)}, and not open yet",
        logical_shard=logical_shard,
        hint="it is being moved; try again, or allow more time",
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
