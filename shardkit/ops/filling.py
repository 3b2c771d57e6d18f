"""One backfill of one logical shard: batch after batch along the primary key.

Each batch is a transaction that also writes down how far it is, so that whatever ends a run, the
next one goes on where it was. Called by `shardkit.ops.physical`, which decides when.
"""

from __future__ import annotations

import json
from typing import Any

import psycopg
from psycopg import sql

from shardkit.errors import MigrationError
from shardkit.ops.backfills import RANGE, within
from shardkit.ops.ledger import recorded
from shardkit.ops.revisions import Revision
from shardkit.ops.steps import Step, render
from shardkit.topology import schema_name

__all__ = ["Filling"]

# AccessShareLock on catalogues only. Types with their schema: the search path is the login's own.
_KEY = """
SELECT a.attname, format_type(a.atttypid, a.atttypmod)
FROM pg_index AS i CROSS JOIN LATERAL unnest(i.indkey) WITH ORDINALITY AS k (attnum, n)
JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
WHERE i.indrelid = to_regclass(%s) AND i.indisprimary ORDER BY k.n
"""


class Filling:
    """How far a backfill is on one logical shard.

    Attributes:
        walked: rows of the table that it has gone through, in earlier runs too.
        is_done: whether the end of the table has been reached.
    """

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        logical_shard: int,
        revision: Revision,
        step: Step,
    ) -> None:
        """Read where an earlier run has got to.

        Raises:
            MigrationError: the table has no primary key.
            psycopg.Error: the server said no.
        """
        assert step.backfill is not None
        self._connection = connection
        self._shard = logical_shard
        self._revision = revision
        self._step = step
        self._backfill = step.backfill
        self._schema = schema_name(logical_shard)
        self._table = sql.Identifier(self._schema, step.backfill.table)
        name = self._table.as_string(None)
        self._key = tuple(connection.execute(_KEY, (name,)).fetchall())
        if not self._key:
            raise MigrationError(
                f"revision {revision.id}: {step.backfill.table} has no primary key to walk along",
                hint="give it one, or write the rows in one transaction with op.execute()",
                logical_shard=logical_shard,
            )
        row = connection.execute(
            sql.SQL("SELECT position FROM {} WHERE revision = {} AND step = {}").format(
                sql.Identifier(self._schema, "shardkit_version"), revision.id, step.end - 1
            )
        ).fetchone()
        position = (row and row[0]) or {}
        self._after = tuple(position["after"]) if position else None
        self.walked = int(position.get("walked", 0))
        self.is_done = False

    def batch(self, begin: str, rows: int) -> int:
        """Do the next batch, and commit it with how far it is; return the rows it changed.

        Args:
            begin: SQL that opens a transaction with its limits.
            rows: of the table that it goes through.
        """
        until = self._end(rows)
        bounds = within(self._backfill.alias, self._key, self._after, until)
        # The text is compiled for any schema; the bounds are this one's.
        text = render(self._step.statements[0], self._shard).replace(RANGE, bounds)
        if until is None:
            done: sql.Composable = recorded(self._revision, self._step)
        else:
            position = json.dumps({"after": until, "walked": self.walked + rows})
            done = recorded(self._revision, self._step, position=position)
        script = [
            f'{begin}SET LOCAL search_path = "{self._schema}"',
            text,
            render(done.as_string(None), self._shard),
            "COMMIT",
        ]
        # One round trip: a runner that freezes leaves no transaction open.
        cursor = self._connection.execute("\n;\n".join(script).encode())
        changed = _changed(cursor)
        self.walked += rows if until else changed
        self._after = until
        self.is_done = until is None
        return changed

    def _end(self, rows: int) -> tuple[str, ...] | None:
        """Return the key of the last row of the next batch; None when it goes to the end."""
        columns = sql.SQL(", ").join(sql.Identifier(name) for name, _ in self._key)
        texts = sql.SQL(", ").join(
            sql.SQL("{}::text").format(sql.Identifier(n)) for n, _ in self._key
        )
        bounds = within(self._backfill.table, self._key, self._after, None)
        # AccessShareLock on the table.
        query = sql.SQL("SELECT {} FROM {} WHERE {} ORDER BY {} OFFSET {} LIMIT 1").format(
            texts, self._table, sql.SQL(bounds), columns, rows - 1
        )
        found = self._connection.execute(query).fetchone()
        return tuple(found) if found else None


def _changed(cursor: psycopg.Cursor[Any]) -> int:
    """Return the rows that the statement changed: the first of the results that says so."""
    while True:
        if (cursor.statusmessage or "").startswith(("UPDATE ", "DELETE ")):
            return cursor.rowcount
        if not cursor.nextset():
            return 0
