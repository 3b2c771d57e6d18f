"""Whether two servers have the same schema for a logical shard, rights included.

Objects are compared as `shardkit.ops.shape` writes them out. Rights are taken from one side or the
other while a move is under way, so what counts is what somebody has together with what was noted
when it was taken. Called by the driver; changes nothing.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

import psycopg

from shardkit.ops.shape import details
from shardkit.topology import schema_name

__all__ = ["differences", "fingerprint"]

Connection = psycopg.Connection[Any]

# AccessShareLock on catalogues and a small table.
_RIGHTS: Final = """
SELECT c.relname, ''::name, coalesce(w.rolname, ''), a.privilege_type, a.is_grantable
FROM pg_class AS c CROSS JOIN aclexplode(c.relacl) AS a LEFT JOIN pg_roles AS w ON w.oid = a.grantee
WHERE c.relnamespace = %(schema)s::regnamespace AND a.grantee <> c.relowner
    AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
UNION
SELECT c.relname, t.attname, coalesce(w.rolname, ''), a.privilege_type, a.is_grantable
FROM pg_class AS c JOIN pg_attribute AS t ON t.attrelid = c.oid
    CROSS JOIN aclexplode(t.attacl) AS a LEFT JOIN pg_roles AS w ON w.oid = a.grantee
WHERE c.relnamespace = %(schema)s::regnamespace AND a.grantee <> c.relowner AND NOT attisdropped
UNION
SELECT relation, attribute, grantee, privilege, is_grantable
FROM shardkit.closed_rights WHERE logical_shard = %(shard)s
"""

_COMMENTS: Final = """
SELECT c.relname, coalesce(t.attname, ''), d.description
FROM pg_description AS d
    JOIN pg_class AS c ON c.oid = d.objoid AND d.classoid = 'pg_class'::regclass
    LEFT JOIN pg_attribute AS t ON t.attrelid = c.oid AND t.attnum = nullif(d.objsubid, 0)
WHERE c.relnamespace = %(schema)s::regnamespace
"""

_SHOWN: Final = 5


def fingerprint(connection: Connection, logical_shard: int) -> str:
    """Return a digest of the schema without rights: it changes with every DDL that matters."""
    schema = schema_name(logical_shard)
    found = details(connection, [schema])[schema]
    text = "\n".join(f"{k}\0{v}" for k, v in sorted(found.items()) if k[0] != "grant")
    return hashlib.sha256(text.encode()).hexdigest()


def differences(source: Connection, target: Connection, logical_shard: int) -> list[str]:
    """Return what the two schemas do not have alike, in a few words each; at best nothing."""
    schema = schema_name(logical_shard)
    here, there = (details(each, [schema])[schema] for each in (source, target))
    odd = [
        f"{kind} {name}: {'missing' if there.get((kind, name)) is None else 'differs'}"
        for kind, name in sorted(here.keys() | there.keys())
        if here.get((kind, name)) != there.get((kind, name)) and not _is_right(kind, name)
    ]
    for query, what in ((_RIGHTS, "rights on"), (_COMMENTS, "the comment of")):
        left, right = (_asked(each, query, schema, logical_shard) for each in (source, target))
        odd += sorted({f"{what} {row[0]} differ" for row in left ^ right})
    if len(odd) > _SHOWN:
        odd[_SHOWN:] = [f"and {len(odd) - _SHOWN} more"]
    return odd


def _is_right(kind: str, name: str) -> bool:
    return kind == "grant" and name != "schema"


def _asked(connection: Connection, query: str, schema: str, shard: int) -> set[tuple[Any, ...]]:
    rows = connection.execute(query.encode(), {"schema": schema, "shard": shard})
    return set(rows.fetchall())
