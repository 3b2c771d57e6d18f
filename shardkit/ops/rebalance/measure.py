"""How large and how busy every logical shard is: each server is asked once, all at the same time.

Size, rows and who owns what come from the primaries; rows read from the replicas as well, since
readers go there. Reads and writes are differences of PostgreSQL's cumulative counters between two
questions, so each server is asked a second time where load is wanted: the counters themselves
begin at different times, after a crash or where a logical shard came from elsewhere. Called by
commands; changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import psycopg
from sqlalchemy import URL

from shardkit import deadlines
from shardkit.clock import SYSTEM, Clock
from shardkit.errors import EndpointUnavailableError, RefusedError, ShardkitError
from shardkit.ops.direct import Unguarded, parameters
from shardkit.ops.rebalance.facts import LogicalShard, Situation
from shardkit.ownership import Answer, Claimed, State, merged
from shardkit.parallel import run
from shardkit.topology import Endpoint, PhysicalShard, Role, ShardMap, Topology
from shardkit.waits import Connection

__all__ = ["measure"]

TIMEOUT: Final = 30.0
"""Seconds that all servers together have to answer: sizes are read from the file system, a file
or three a table."""

# AccessShareLock on each table in turn, and on catalogues. Counters of rows: what sequential scans
# and index scans have read, what was inserted, updated and deleted.
_ASK: Final = """
WITH tables AS (
    SELECT substr(schemaname, 7)::int AS number,
        {size} AS size, sum(n_live_tup)::bigint AS live,
        sum(seq_tup_read + coalesce(idx_tup_fetch, 0))::bigint AS reads,
        sum(n_tup_ins + n_tup_upd + n_tup_del)::bigint AS writes
    FROM pg_catalog.pg_stat_user_tables WHERE schemaname ~ '^shard_[0-9]{{4}}$' GROUP BY 1
)
SELECT coalesce(t.number, o.logical_shard), coalesce(t.size, 0), coalesce(t.live, 0),
    coalesce(t.reads, 0), coalesce(t.writes, 0), o.epoch, o.state, o.moved_to, o.move_id::text
FROM tables AS t FULL JOIN shardkit.ownership AS o ON o.logical_shard = t.number
"""
_SIZES: Final = "sum(pg_catalog.pg_total_relation_size(relid))::bigint"


@dataclass(frozen=True, slots=True)
class _Row:
    """What one server says of one logical shard."""

    size_bytes: int
    rows: int
    reads: int
    writes: int
    epoch: int | None
    state: str | None
    moved_to: str | None
    move_id: str | None


_Answer = Mapping[int, _Row]


def measure(
    topology: Topology,
    *,
    seconds: float = 0.0,
    clock: Clock = SYSTEM,
    on_measured: Callable[[Situation], object] | None = None,
    on_wait: Callable[[float], None] | None = None,
) -> Situation:
    """Return what every logical shard is like now.

    Args:
        topology: as the configuration says; the monitor's login is used.
        seconds: for how long reads and writes are counted; 0 for not at all.
        clock: source of monotonic time, and of the wait between the two questions.
        on_measured: given what is known before the wait; what it raises ends it.
        on_wait: told the seconds before the wait.

    Raises:
        EndpointUnavailableError: a primary does not answer (retryable). A replica that does not is
            noted.
        RefusedError: a primary has never been migrated.
    """
    notes: list[str] = []
    first = _ask(topology, notes, with_sizes=True)
    situation = _situation(topology, first, first)
    if on_measured is not None:
        on_measured(situation)
    if seconds > 0:
        before = clock.monotonic()
        if on_wait is not None:
            on_wait(seconds)
        clock.sleep(seconds)
        second = _ask(topology, notes, with_sizes=False)
        situation = replace(_situation(topology, first, second), seconds=clock.monotonic() - before)
    return replace(situation, notes=tuple(dict.fromkeys(notes)))


def _situation(
    topology: Topology, first: Mapping[Endpoint, _Answer], second: Mapping[Endpoint, _Answer]
) -> Situation:
    """Return what two answers of every server make."""
    primaries = {
        endpoint.physical: answer
        for endpoint, answer in first.items()
        if endpoint.role is Role.PRIMARY
    }
    shard_map = _shard_map(topology, primaries)
    shards = []
    for number, owner in enumerate(shard_map.owners):
        row = primaries[owner].get(number)
        read = written = 0
        for endpoint, later in second.items():
            if endpoint.physical == owner and endpoint in first:
                now, then = later.get(number), first[endpoint].get(number)
                # Counters that went back began anew: what came since is not known.
                read += max(0, now.reads - then.reads) if now and then else 0
                written += max(0, now.writes - then.writes) if now and then else 0
        shards.append(
            LogicalShard(
                number,
                owner,
                shard_map.epochs[number],
                row.size_bytes if row else 0,
                rows=row.rows if row else 0,
                reads=read,
                writes=written,
                held=_held(number, shard_map, primaries),
            )
        )
    return Situation(topology.name, tuple(topology.physical), tuple(shards))


def _ask(topology: Topology, notes: list[str], *, with_sizes: bool) -> dict[Endpoint, _Answer]:
    """Return what every server says that answers."""
    tasks = []
    for shard in topology.physical.values():
        tasks.append((shard, shard.primary, shard.looking_url))
        tasks += [
            # Where PostgreSQL itself is known: a pooler does not know the monitor.
            (shard, replica, shard.looking_at(replica.server_url or replica.url))
            for replica in shard.replicas
        ]
    with deadlines.deadline(TIMEOUT):
        answers = run([partial(_rows, url, with_sizes=with_sizes) for _, _, url in tasks])
    found: dict[Endpoint, _Answer] = {}
    for (shard, endpoint, _), answer in zip(tasks, answers, strict=True):
        if not isinstance(answer, Exception):
            found[endpoint] = answer
        elif endpoint.role is Role.PRIMARY:
            raise _unmeasured(shard, answer)
        else:
            notes.append(f"reads of {endpoint} are not counted: {_line(answer)}")
    return found


def _rows(url: URL, *, with_sizes: bool) -> _Answer:
    options = parameters(url, application="shardkit rebalance")
    connection = Connection.open(
        "", patience=TIMEOUT, guard=Unguarded(), autocommit=True, **options
    )
    try:
        query = _ASK.format(size=_SIZES if with_sizes else "0::bigint")
        return {number: _Row(*rest) for number, *rest in connection.execute(query.encode())}
    finally:
        connection.close()


def _unmeasured(shard: PhysicalShard, error: Exception) -> ShardkitError:
    if isinstance(error, psycopg.errors.UndefinedTable | psycopg.errors.InvalidSchemaName):
        return RefusedError(
            f"physical shard {shard.name!r} has never been migrated",
            hint="run shardkit migrate apply",
        )
    return EndpointUnavailableError(
        f"physical shard {shard.name!r} could not be measured: {_line(error)}",
        hint="a plan needs every primary",
        endpoint=str(shard.primary),
    )


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _shard_map(topology: Topology, primaries: Mapping[str, _Answer]) -> ShardMap:
    """Return the shard map that the ownership rows make; see `shardkit.ownership`."""
    answers = {
        name: Answer(
            0,
            0,
            {
                number: Claimed(row.epoch, State(row.state), row.moved_to)
                for number, row in rows.items()
                if row.epoch is not None and row.state is not None
            },
        )
        for name, rows in primaries.items()
    }
    first = topology.shard_map
    return merged(first, answers, first, topology.physical)


def _held(number: int, shard_map: ShardMap, primaries: Mapping[str, _Answer]) -> str:
    """Return why a logical shard cannot be moved now; empty when it can."""
    for name, rows in primaries.items():
        row = rows.get(number)
        if row is not None and row.move_id is not None:
            return f"move {row.move_id} has claimed it on {name!r}"
    hold = shard_map.held.get(number)
    return "" if hold is None else f"it is {hold}"
