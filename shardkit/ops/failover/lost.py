"""What a failover of replicas that did not confirm has lost, row by row.

The old primary's log beyond the point where the new timeline left it says exactly which
transactions were committed there alone. Its data, opened read-only, has what they wrote: rows by
the transaction that wrote them last. What they deleted is found by its absence: it is on the new
primary, and was so before the failover. Read by `shardkit failover lost`, and by the embedded
cluster before it makes an old primary anew.

Exact: the transactions; rows inserted or updated, as the old primary had them last; rows deleted,
unless the new primary has changed or deleted them since. Of a row that several lost transactions
wrote the last version is told. Nothing is told of sequences, large objects and other databases.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psycopg
from psycopg import sql
from psycopg.rows import tuple_row

from shardkit.clock import SYSTEM
from shardkit.errors import OperationError
from shardkit.gates import lsn_of, lsn_text
from shardkit.topology import schema_name

__all__ = ["Commits", "LostRow", "commits_beyond", "fork_of", "lost_rows", "next_xid"]

Connection = psycopg.Connection[tuple[Any, ...]]

_COMMIT: Final = re.compile(
    r"^rmgr: Transaction .*\btx:\s*(\d+), lsn: ([0-9A-F]+/[0-9A-F]+),.* "
    r"desc: COMMIT(?:_PREPARED (\d+):)? (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)?)"
    r"(.*)$"
)
"""Source: PostgreSQL, `xact_desc`; the sub-transactions follow as `subxacts: 1 2`."""

_SUBXACTS: Final = re.compile(r"subxacts: ((?:\d+ ?)+)")

_REPLAY: Final = 600.0
"""Seconds that the old primary has to replay its own log."""

# Catalogues only.
_TABLES: Final = """
SELECT c.relname, ARRAY(SELECT a.attname::text FROM pg_catalog.pg_attribute AS a
    WHERE a.attrelid = c.oid AND a.attnum = ANY (i.indkey) ORDER BY a.attnum)
FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_index AS i ON i.indrelid = c.oid
WHERE c.relnamespace = %s::regnamespace AND c.relkind = 'r' AND i.indisprimary
    AND c.relname <> 'shardkit_id_state' ORDER BY c.relname
"""


@dataclass(frozen=True, slots=True)
class Commits:
    """What a server committed beyond a position.

    Attributes:
        at: when, by its clock, by transaction.
        end: the position of the last one; 0 for none.
    """

    at: Mapping[int, str]
    end: int


@dataclass(frozen=True, slots=True)
class LostRow:
    """A row that only the old primary wrote, or deleted.

    Attributes:
        logical_shard: whose.
        table: its name.
        kind: `written` or `deleted`.
        key: its primary key.
        row: as the old primary had it; of a deleted one, as the new primary has it.
        transaction: which wrote it on the old primary; None for a deletion, whose is unknown.
        committed: when that was committed, by the old primary's clock; None for a deletion.
    """

    logical_shard: int
    table: str
    kind: str
    key: Mapping[str, Any]
    row: Mapping[str, Any]
    transaction: int | None = None
    committed: str | None = None


def fork_of(primary: Connection, timeline: int) -> str:
    """Return the log position at which the present timeline of a primary left another one.

    Args:
        primary: a connection that replicates (`replication=database`).
        timeline: of the old primary.

    Raises:
        OperationError: the primary's history does not go by way of that timeline.
    """
    found = primary.pgconn.exec_(b"IDENTIFY_SYSTEM")
    now = int(found.get_value(0, 1) or b"0")
    history = primary.pgconn.exec_(b"TIMELINE_HISTORY %d" % now).get_value(0, 1) or b""
    for line in history.decode().splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == str(timeline):
            return words[1]
    raise OperationError(
        f"timeline {now} of the primary did not come from timeline {timeline}",
        hint="is it the old primary of this physical shard?",
    )


def commits_beyond(program: Path, data: Path, timeline: int, start: str) -> Commits:
    """Return the transactions that a stopped server committed beyond a position, with the time.

    Args:
        program: `pg_waldump` of the server's version.
        data: the server's data folder.
        timeline: of its log.
        start: the position at which the others went another way.

    Raises:
        OperationError: the log cannot be read.
    """
    done = subprocess.run(  # noqa: S603  PostgreSQL's own program
        [
            str(program), "--path", str(data / "pg_wal"), "--timeline", str(timeline),
            "--start", start, "--rmgr", "Transaction",
        ],
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    found: dict[int, str] = {}
    end = 0
    for line in done.stdout.splitlines():
        match = _COMMIT.match(line)
        if match is None:
            continue
        transaction, lsn, prepared, at, rest = match.groups()
        end = lsn_of(lsn)
        xids = [int(prepared or transaction)]
        if subxacts := _SUBXACTS.search(rest):
            xids += [int(xid) for xid in subxacts[1].split()]
        found |= dict.fromkeys(xids, at)
    # It always fails at the end of the log, where nothing has been written yet.
    is_end = "invalid record length" in done.stderr or "could not find a valid" in done.stderr
    if done.returncode and not found and not is_end:
        raise OperationError(f"{program.name} cannot read the log: {done.stderr.strip()}")
    return Commits(found, end)


def next_xid(primary: Connection, timeline: int) -> int | None:
    """Return the first transaction id that a promoted primary gave itself, if it was noted."""
    row = primary.execute(
        "SELECT (detail ->> 'next_xid')::bigint FROM shardkit.failovers "
        "WHERE kind = 'promoted' AND timeline > %s ORDER BY timeline LIMIT 1",
        (timeline,),
    ).fetchone()
    return None if row is None else row[0]


def lost_rows(
    old: Connection,
    new: Connection,
    commits: Commits,
    shards: Sequence[int],
    *,
    first_xid: int | None,
) -> Iterator[LostRow]:
    """Yield the rows that lost transactions wrote or deleted.

    Args:
        old: to the old primary's data, open for reading only.
        new: to the primary.
        commits: from `commits_beyond`.
        shards: the logical shards of the physical shard.
        first_xid: from `next_xid`; None leaves deletions out.
    """
    if not commits.at:
        return
    _replayed(old, commits.end)
    for shard in shards:
        schema = schema_name(shard)
        with old.cursor(row_factory=tuple_row) as cursor:
            tables = cursor.execute(_TABLES, (schema,)).fetchall()
        for table, keys in tables:
            where = _Table(shard, table, keys)
            yield from _written(old, where, commits)
            if first_xid is not None:
                yield from _deleted(old, new, where, first_xid)


@dataclass(frozen=True, slots=True)
class _Table:
    shard: int
    name: str
    keys: Sequence[str]

    @property
    def place(self) -> sql.Identifier:
        return sql.Identifier(schema_name(self.shard), self.name)

    def key(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {name: row[name] for name in self.keys}


def _replayed(old: Connection, end: int) -> None:
    """Wait until a standby that follows nobody has replayed all of its own log."""
    until = SYSTEM.monotonic() + _REPLAY
    while True:
        row = old.execute(
            "SELECT NOT pg_is_in_recovery() OR pg_last_wal_replay_lsn() > %s::pg_lsn",
            (lsn_text(end),),
        ).fetchone()
        if row is not None and row[0]:
            return
        if SYSTEM.monotonic() > until:
            raise OperationError(
                f"the old primary has not replayed its log within {_REPLAY:g} s",
                hint="start it as a standby that follows nobody, and look at its log",
            )
        SYSTEM.sleep(0.05)


def _written(old: Connection, table: _Table, commits: Commits) -> Iterator[LostRow]:
    # AccessShareLock; reads the whole table.
    query = sql.SQL(
        "SELECT t.xmin::text::bigint, to_jsonb(t) FROM {} AS t "
        "WHERE t.xmin::text::bigint = ANY (%s) ORDER BY 1"
    ).format(table.place)
    for xid, row in old.execute(query, (list(commits.at),)).fetchall():
        at = commits.at[xid]
        yield LostRow(table.shard, table.name, "written", table.key(row), row, xid, at)


def _deleted(old: Connection, new: Connection, table: _Table, first_xid: int) -> Iterator[LostRow]:
    columns = sql.SQL(", ").join(sql.Identifier(key) for key in table.keys)
    # Both AccessShareLock, and both read the whole table.
    there = set(old.execute(sql.SQL("SELECT {} FROM {}").format(columns, table.place)).fetchall())
    query = sql.SQL("SELECT to_jsonb(t), {} FROM {} AS t WHERE t.xmin::text::bigint < %s").format(
        columns, table.place
    )
    for row, *key in new.execute(query, (first_xid,)).fetchall():
        if tuple(key) not in there:
            yield LostRow(table.shard, table.name, "deleted", table.key(row), row)
