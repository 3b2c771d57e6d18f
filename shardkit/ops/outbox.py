"""`shardkit outbox`: how full the outboxes are, dead letters, and their replay.

Called by the command line, with the admin login. Delivering is `shardkit.relay`.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import psycopg
from psycopg import sql

from shardkit.errors import ConfigurationError, EndpointUnavailableError, ShardkitError
from shardkit.ops.direct import connect
from shardkit.relay import Relay
from shardkit.topology import PhysicalShard, Topology, schema_name

__all__ = [
    "DeadLetter",
    "PhysicalOutbox",
    "Replayed",
    "dead",
    "load_relay",
    "replay",
    "status",
]

T = TypeVar("T")
COUNTED = 100_000
"""Events counted per logical shard; beyond it a number is a lower bound."""

_SHARDS_PER_QUERY = 256
_PATIENCE = 20.0
"""Seconds to wait for a server that may be frozen: longer than a statement may take."""

_TIMEOUT = "SET statement_timeout = '15s'; SET lock_timeout = '2s'"


@dataclass(frozen=True, slots=True)
class PhysicalOutbox:
    """The outboxes of one physical shard.

    Attributes:
        physical: its name.
        backlog: events not delivered yet.
        is_more: whether the backlog is larger than that, not having been counted to its end.
        oldest: seconds since the oldest of them was stored; None when there is none.
        paused: events that failed and wait for their next attempt.
        dead: dead letters.
        claimed: logical shards that relays hold now.
        emitted: events stored per second, while it was measured.
        delivered: events that left, delivered or dead, per second.
        busiest: the logical shards with the largest backlogs, largest first.
        error: why nothing is known, or None.
    """

    physical: str
    backlog: int = 0
    is_more: bool = False
    oldest: float | None = None
    paused: int = 0
    dead: int = 0
    claimed: int = 0
    emitted: float = 0.0
    delivered: float = 0.0
    busiest: tuple[tuple[int, int], ...] = ()
    error: ShardkitError | None = None


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An event that was given up.

    Attributes:
        id: of the event.
        logical_shard: whose outbox it was in.
        topic: of the event.
        key: of the event, or None.
        attempts: how often it was tried.
        died: when it was given up, ISO 8601, by the clock of its database.
        error: of the last attempt.
        payload: of the event.
    """

    id: int
    logical_shard: int
    topic: str
    key: str | None
    attempts: int
    died: str
    error: str
    payload: Any


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay did, or would do.

    Attributes:
        events: dead letters put back, by physical shard.
        failed: why nothing was done there, by physical shard.
    """

    events: Mapping[str, int]
    failed: Mapping[str, ShardkitError]


def load_relay(location: str) -> Relay:
    """Return the relay that a program defines.

    Args:
        location: `module:name` of a `Relay`.

    Raises:
        ConfigurationError: there is no such thing.
    """
    if os.getcwd() not in sys.path:  # noqa: PTH109  sys.path holds text
        sys.path.insert(0, os.getcwd())  # noqa: PTH109  the module may be the one at hand
    module, _, name = location.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"--app {location!r} cannot be loaded: {error}", hint='write "module:relay"'
        ) from error
    if not isinstance(found, Relay):
        raise ConfigurationError(
            f"--app {location!r} is a {type(found).__name__}, not a Relay",
            hint="relay = shardkit.Relay(cluster)",
        )
    return found


def status(topology: Topology, *, interval: float = 1.0) -> list[PhysicalOutbox]:
    """Return the state of every physical shard's outboxes; one that does not answer says so.

    Args:
        topology: the cluster.
        interval: seconds over which rates are measured; 0 leaves them out.
    """
    found = _everywhere(topology, lambda shard: _status(shard, interval))
    return [
        PhysicalOutbox(name, error=answer) if isinstance(answer, ShardkitError) else answer
        for name, answer in found.items()
    ]


def dead(
    topology: Topology, *, topic: str | None = None, limit: int = 20
) -> tuple[list[DeadLetter], dict[str, ShardkitError]]:
    """Return the latest dead letters, the newest first, and which servers did not answer.

    Args:
        topology: the cluster.
        topic: only of this topic; None for all.
        limit: how many, at most.
    """
    found = _everywhere(topology, lambda shard: _dead(shard, topic, limit))
    letters = [entry for answer in found.values() if isinstance(answer, list) for entry in answer]
    letters.sort(key=lambda entry: (entry.died, entry.id), reverse=True)
    failed = {name: error for name, error in found.items() if isinstance(error, ShardkitError)}
    return letters[:limit], failed


def replay(
    topology: Topology,
    *,
    ids: Sequence[int] = (),
    topic: str | None = None,
    dry_run: bool = False,
) -> Replayed:
    """Put dead letters back into their outboxes, behind what waits there now.

    They keep their ids, so that effects which did happen do not happen again, as long as the
    notes of effects are kept.

    Args:
        topology: the cluster.
        ids: of these events; none for all.
        topic: only of this topic; None for all.
        dry_run: count only.
    """
    found = _everywhere(topology, lambda shard: _replay(shard, ids, topic, dry_run=dry_run))
    return Replayed(
        {name: n for name, n in found.items() if isinstance(n, int)},
        {name: error for name, error in found.items() if isinstance(error, ShardkitError)},
    )


def _everywhere(
    topology: Topology, ask: Callable[[PhysicalShard], T]
) -> dict[str, T | ShardkitError]:
    def one(shard: PhysicalShard) -> T | ShardkitError:
        try:
            return ask(shard)
        except ShardkitError as error:
            return error
        except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
            return ConfigurationError(
                "has no outbox yet",
                endpoint=str(shard.primary),
                hint="run shardkit migrate apply",
            )
        except psycopg.errors.InsufficientPrivilege as error:
            return ConfigurationError(
                str(error).strip().splitlines()[0],
                endpoint=str(shard.primary),
                hint="run shardkit roles apply",
            )
        except psycopg.OperationalError as error:
            reason = str(error).strip().splitlines()[0]
            return EndpointUnavailableError(reason, endpoint=str(shard.primary))

    shards = list(topology.physical.values())
    with ThreadPoolExecutor(max(1, len(shards))) as pool:
        return {
            shard.name: answer for shard, answer in zip(shards, pool.map(one, shards), strict=True)
        }


def _owned(connection: psycopg.Connection[Any]) -> list[int]:
    # AccessShareLock on the ownership table.
    rows = connection.execute(
        "SELECT logical_shard FROM shardkit.ownership WHERE state <> 'retired' ORDER BY 1"
    )
    return [row[0] for row in rows]


def _status(shard: PhysicalShard, interval: float) -> PhysicalOutbox:
    with connect(
        shard,
        application="shardkit outbox status",
        patience=_PATIENCE,
        url=shard.looking_url,
    ) as connection:
        connection.execute(_TIMEOUT)
        before = _counters(connection)
        rows: list[tuple[int, int, float | None, int, int]] = []
        numbers = _owned(connection)
        for start in range(0, len(numbers), _SHARDS_PER_QUERY):
            # AccessShareLock on three tables of each logical shard.
            query = sql.SQL(" UNION ALL ").join(
                sql.SQL(
                    "SELECT {n}, (SELECT count(*) FROM (SELECT FROM {s}.shardkit_outbox LIMIT {c})"
                    " AS x), (SELECT extract(epoch FROM clock_timestamp() - created)::float8 FROM"
                    " {s}.shardkit_outbox ORDER BY position LIMIT 1),"
                    " (SELECT count(*) FROM {s}.shardkit_outbox_retry WHERE due > now()),"
                    " (SELECT count(*) FROM {s}.shardkit_outbox_dead)"
                ).format(n=n, s=sql.Identifier(schema_name(n)), c=COUNTED)
                for n in numbers[start : start + _SHARDS_PER_QUERY]
            )
            rows += connection.execute(query).fetchall()
        # AccessShareLock on the leases.
        row = connection.execute(
            "SELECT count(*) FROM shardkit.outbox_lease WHERE expires > clock_timestamp()"
        ).fetchone()
        emitted = delivered = 0.0
        if interval > 0:
            threading.Event().wait(interval)
            after = _counters(connection)
            span = max(after[0] - before[0], 0.001)
            emitted = max(after[1] - before[1], 0) / span
            delivered = max(after[2] - before[2], 0) / span
    busiest = sorted(((n, backlog) for n, backlog, *_ in rows if backlog), key=lambda x: -x[1])
    return PhysicalOutbox(
        shard.name,
        backlog=sum(backlog for _, backlog, *_ in rows),
        is_more=any(backlog >= COUNTED for _, backlog, *_ in rows),
        oldest=max((age for _, _, age, *_ in rows if age is not None), default=None),
        paused=sum(paused for *_, paused, _ in rows),
        dead=sum(n for *_, n in rows),
        claimed=0 if row is None else row[0],
        emitted=emitted,
        delivered=delivered,
        busiest=tuple(busiest[:5]),
    )


def _counters(connection: psycopg.Connection[Any]) -> tuple[float, int, int]:
    """Return the time, and rows ever inserted into outboxes and deleted from them."""
    connection.execute("SELECT pg_stat_clear_snapshot()")
    # AccessShareLock on catalogues; statistics may be a second old.
    row = connection.execute(
        "SELECT extract(epoch FROM clock_timestamp())::float8, sum(n_tup_ins)::bigint,"
        " sum(n_tup_del)::bigint FROM pg_stat_all_tables WHERE relname = 'shardkit_outbox'"
    ).fetchone()
    assert row is not None, "aggregates return a row"
    return row[0], row[1] or 0, row[2] or 0


def _dead(shard: PhysicalShard, topic: str | None, limit: int) -> list[DeadLetter]:
    found: list[DeadLetter] = []
    with connect(shard, application="shardkit outbox dead") as connection:
        connection.execute(_TIMEOUT)
        numbers = _owned(connection)
        for start in range(0, len(numbers), _SHARDS_PER_QUERY):
            # AccessShareLock on the dead letters of each logical shard.
            parts = sql.SQL(" UNION ALL ").join(
                sql.SQL(
                    "SELECT id, {n} AS shard, topic, key, attempts, died, error, payload"
                    " FROM {s}.shardkit_outbox_dead WHERE topic = {t} OR {t} IS NULL"
                ).format(n=n, s=sql.Identifier(schema_name(n)), t=sql.Literal(topic))
                for n in numbers[start : start + _SHARDS_PER_QUERY]
            )
            query = sql.SQL("SELECT * FROM ({}) AS x ORDER BY died DESC, id DESC LIMIT {}")
            for number, n, name, key, attempts, died, error, payload in connection.execute(
                query.format(parts, limit)
            ):
                died_at = died.isoformat(timespec="milliseconds")
                found.append(DeadLetter(number, n, name, key, attempts, died_at, error, payload))
    return found


def _replay(shard: PhysicalShard, ids: Sequence[int], topic: str | None, *, dry_run: bool) -> int:
    replayed = 0
    with connect(shard, application="shardkit outbox replay") as connection:
        connection.execute(_TIMEOUT)
        for number in _owned(connection):
            schema = sql.Identifier(schema_name(number))
            wanted = sql.SQL("(id = ANY ({i}) OR {n} = 0) AND (topic = {t} OR {t} IS NULL)").format(
                i=sql.Literal(list(ids)), n=len(ids), t=sql.Literal(topic)
            )
            if dry_run:
                # AccessShareLock on the dead letters.
                counting = sql.SQL("SELECT count(*) FROM {}.shardkit_outbox_dead WHERE {}")
                row = connection.execute(counting.format(schema, wanted)).fetchone()
                replayed += 0 if row is None else row[0]
                continue
            # Row locks on the dead letters, which go back in one transaction, in their order.
            query = sql.SQL(
                "WITH back AS (DELETE FROM {s}.shardkit_outbox_dead WHERE {w} RETURNING *),"
                " sorted AS (SELECT * FROM back ORDER BY died, id)"
                " INSERT INTO {s}.shardkit_outbox (position, id, key, topic, payload, created)"
                " SELECT (SELECT epoch << 44 FROM shardkit.ownership WHERE logical_shard = {n}"
                " AND state = 'active') + nextval('shardkit.outbox_position'),"
                " id, key, topic, payload, created FROM sorted"
            ).format(s=schema, w=wanted, n=number)
            replayed += connection.execute(query).rowcount
    return replayed
