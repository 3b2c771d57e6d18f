"""Whether to queue for a table's lock now, or to let others pass.

PostgreSQL's lock queue is fair: behind a waiting ACCESS EXCLUSIVE even reads wait, for as long as
`lock_timeout` each time. A transaction that stays for a minute would so hold the application up
once a pause, for nothing. So whoever held a lock at one look and still does at the next is not
queued behind; those who come and go are. Called by `shardkit.ops.physical`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import psycopg

from shardkit.topology import schema_name

__all__ = ["Queue"]

# Takes no lock but those of the lock table, for a moment. By virtual transaction and not by the age
# of a transaction, which only pg_read_all_stats may see of others.
_HOLDERS = """
SELECT DISTINCT l.virtualtransaction FROM pg_locks AS l JOIN pg_class AS c ON c.oid = l.relation
WHERE l.locktype = 'relation' AND l.granted AND l.pid IS DISTINCT FROM pg_backend_pid()
AND c.relnamespace = to_regnamespace(%s) AND c.relname = ANY (%s)
"""


class Queue:
    """What has been seen of those who hold locks on the tables of one transaction."""

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        logical_shard: int | None,
        tables: Collection[str],
        *,
        is_wary: bool,
    ) -> None:
        """Look a first time, if somebody has not given way in this run already.

        Args:
            connection: outside a transaction.
            logical_shard: whose tables; None for none.
            tables: those that are locked strongly.
            is_wary: whether to look before the first attempt.
        """
        self._connection = connection
        self._shard = logical_shard
        self._tables = sorted(tables)
        self._seen = self._look() if is_wary else set()

    def is_held(self) -> bool:
        """Return whether somebody who held a lock at the last look still does."""
        if not self._seen:
            return False
        before, self._seen = self._seen, self._look()
        return bool(before & self._seen)

    def note(self) -> None:
        """Look who is there, after an attempt in vain."""
        self._seen = self._look()

    def _look(self) -> set[str]:
        if self._shard is None or not self._tables:
            return set()
        rows = self._connection.execute(_HOLDERS, (schema_name(self._shard), self._tables))
        return {row[0] for row in rows}
