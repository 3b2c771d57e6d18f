"""A relay's side of one server: what it claims, ends and gives back, each in a transaction.

A claim is a lease on the outboxes of a few logical shards, with a fencing number; it is committed
before anything is delivered. What comes too late, from a worker that was frozen past its lease,
finds another fencing number and changes nothing. The SQL is `shardkit.ops.outboxtables`.
Called by `shardkit.relay`. Source: docs/outbox.md.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import sql

from shardkit.emitting import CHANNEL, SLEEPING
from shardkit.errors import ConfigurationError, EndpointUnavailableError
from shardkit.outbox import Event
from shardkit.secret import without_frames
from shardkit.topology import PhysicalShard, libpq_options, schema_name

__all__ = ["Batch", "Claims", "Taken"]

_CLAIM = b"SELECT * FROM shardkit.outbox_claim(%s::integer[], %s, %s, %s, %s)"
_FINISH = (
    b"SELECT shardkit.outbox_finish(%s::integer[], %s::bigint[], %s::integer[], %s::bigint[],"
    b" %s, %s)"
)
_FAIL = b"SELECT shardkit.outbox_fail(%s, %s, %s, %s, %s, %s)"
_POSTPONE = (
    b"SELECT shardkit.outbox_fail(u.shard, u.fence, u.place, u.tries, u.pause, %s) FROM unnest("
    b"%s::integer[], %s::bigint[], %s::bigint[], %s::integer[], %s::double precision[])"
    b" AS u (shard, fence, place, tries, pause)"
)
_LONGEST_ERROR = 2000


@dataclass(frozen=True, slots=True)
class Taken:
    """One claimed event and its place in the outbox."""

    event: Event
    position: int


@dataclass(slots=True)
class Batch:
    """What one claim returned.

    Attributes:
        events: in order of position within each logical shard.
        fences: fencing number by logical shard.
        until: monotonic time, in seconds, after which nothing of it may be delivered.
    """

    events: list[Taken]
    fences: dict[int, int]
    until: float
    lost: set[int] = field(default_factory=set)


class Claims:
    """A connection to one primary, for claims.

    Not thread-safe. Statements commit by themselves.

    Args:
        shard: the physical shard.
        lease: seconds a claim is valid by the server's clock.

    Attributes:
        is_direct: whether the connection leads to the server itself: only then do notifications
            arrive and do locks of the session mean something.
    """

    def __init__(self, shard: PhysicalShard, *, lease: float) -> None:
        self.shard = shard
        self._lease = lease
        url = shard.relay_url or shard.primary.url
        parameters: Mapping[str, Any] = {
            "connect_timeout": 5,
            "application_name": "shardkit relay",
            "keepalives_idle": 10,
            "tcp_user_timeout": 20_000,
            **libpq_options(url),
        }
        try:
            self.connection = psycopg.connect(autocommit=True, prepare_threshold=2, **parameters)
        except psycopg.OperationalError as error:
            raise EndpointUnavailableError(
                f"no connection: {str(error).strip().splitlines()[-1]}",
                endpoint=str(shard.primary),
            ) from without_frames(error)
        # A pooler makes up the number it tells its clients.
        row = self.connection.execute("SELECT pg_backend_pid()").fetchone()
        self.is_direct = row is not None and row[0] == self.connection.info.backend_pid
        self._worker = self._register()

    def _register(self) -> int:
        """Return a number for this worker; below 0 when nobody could see it die."""
        if not self.is_direct:
            self.connection.prepare_threshold = None
            return -secrets.randbelow(1 << 30) - 1
        self.connection.execute("SET statement_timeout = '30s'")
        self.connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(CHANNEL)))
        try:
            while True:
                worker = secrets.randbelow(1 << 30) + 1
                found = self.connection.execute("SELECT shardkit.outbox_alive(%s)", (worker,))
                row = found.fetchone()
                if row is not None and row[0]:
                    return worker
        except (psycopg.errors.UndefinedFunction, psycopg.errors.InvalidSchemaName) as error:
            raise ConfigurationError(
                "has no outbox yet",
                endpoint=str(self.shard.primary),
                hint="run shardkit migrate apply",
            ) from error

    def close(self) -> None:
        """End the connection; leases it still has are free at once where it was direct."""
        self.connection.close()

    def owned(self) -> tuple[int, ...]:
        """Return the logical shards that are the server's to relay now, ascending."""
        query = "SELECT logical_shard FROM shardkit.ownership WHERE state = 'active' ORDER BY 1"
        return tuple(row[0] for row in self.connection.execute(query))

    def waiting(self, shards: Sequence[int]) -> list[int]:
        """Return the logical shards whose outbox is not empty, in the order given."""
        if not shards:
            return []
        # AccessShareLock on each outbox; one look at the first entry of its index. The text is the
        # same every time, so that it is planned once.
        query = sql.SQL(" UNION ALL ").join(
            sql.SQL("(SELECT {} FROM {} ORDER BY position LIMIT 1)").format(
                n, sql.Identifier(schema_name(n), "shardkit_outbox")
            )
            for n in sorted(shards)
        )
        found = {row[0] for row in self.connection.execute(query)}
        return [shard for shard in shards if shard in found]

    def take(self, shards: Sequence[int], *, now: float, n_shards: int, n_events: int) -> Batch:
        """Claim events of some logical shards that nobody else holds.

        Args:
            shards: where to look, in this order.
            now: monotonic time, in seconds.
            n_shards: logical shards to claim at most.
            n_events: events to claim at most.
        """
        rows = self.connection.execute(
            _CLAIM, (list(shards), self._worker, self._lease, n_shards, n_events)
        ).fetchall()
        events, fences = [], {}
        for shard, fence, position, id_, key, topic, payload, created, attempts in rows:
            fences[shard] = fence
            events.append(
                Taken(Event(id_, topic, key, payload, created, attempts, shard), position)
            )
        return Batch(events, fences, now + self._lease)

    def finish(
        self, batch: Batch, done: Iterable[Taken], *, now: float, release: bool
    ) -> frozenset[int]:
        """Delete delivered events; give the claim back, or extend it.

        Args:
            batch: of this server.
            done: what was delivered and is not finished yet.
            now: monotonic time, in seconds.
            release: whether to give the claim back.

        Returns:
            Logical shards whose claim was lost to another worker; nothing was done there.
        """
        fences = {shard: batch.fences[shard] for shard in sorted(batch.fences)}
        gone = [taken for taken in done if taken.event.logical_shard in fences]
        parameters = (
            list(fences),
            list(fences.values()),
            [taken.event.logical_shard for taken in gone],
            [taken.position for taken in gone],
            release,
            self._lease,
        )
        try:
            lost = frozenset(row[0] for row in self.connection.execute(_FINISH, parameters))
        except (psycopg.errors.InsufficientPrivilege, psycopg.errors.UndefinedTable):
            if len(fences) > 1:  # one is being moved; the others are finished
                parts = [Batch([], {shard: fence}, 0.0) for shard, fence in fences.items()]
                losses = [self.finish(part, gone, now=now, release=release) for part in parts]
                lost = frozenset().union(*losses)
            else:
                lost = frozenset(fences)
        for shard in lost:
            del batch.fences[shard]
        batch.lost |= lost
        batch.until = now + self._lease
        return lost

    def fail(self, batch: Batch, taken: Taken, *, pause: float | None, reason: str) -> bool:
        """Note that a delivery failed.

        Args:
            batch: that the event is of.
            taken: the event.
            pause: seconds until it is tried again; None makes it a dead letter.
            reason: what happened.

        Returns:
            Whether the claim still held.
        """
        event = taken.event
        fence = batch.fences.get(event.logical_shard)
        if fence is None:
            return False
        text = reason.replace("\0", "")[:_LONGEST_ERROR].encode("utf-8", "replace").decode()
        parameters = (event.logical_shard, fence, taken.position, event.attempts + 1, pause, text)
        row = self.connection.execute(_FAIL, parameters).fetchone()
        return row is not None and bool(row[0])

    def postpone(self, batch: Batch, left: Sequence[tuple[Taken, float]], *, reason: str) -> None:
        """Note that events are to be tried again, all at once.

        Args:
            batch: that they are of.
            left: each, and seconds until then.
            reason: what happened.
        """
        rows = [
            (event.logical_shard, fence, taken.position, event.attempts + 1, pause)
            for taken, pause in left
            if (fence := batch.fences.get((event := taken.event).logical_shard)) is not None
        ]
        if rows:
            columns = [list(column) for column in zip(*rows, strict=True)]
            self.connection.execute(_POSTPONE, (reason, *columns))

    # -- sleep

    def fall_asleep(self) -> bool:
        """Have writers notify; False when one is about to commit, so that it is worth a look.

        After True the caller looks once more: what was committed before is not notified.
        """
        row = self.connection.execute("SELECT pg_try_advisory_lock(%s)", (SLEEPING,)).fetchone()
        return row is not None and bool(row[0])

    def wake_up(self) -> None:
        """Have writers no longer notify."""
        self.connection.execute("SELECT pg_advisory_unlock(%s)", (SLEEPING,))

    def notified(self, seconds: float) -> list[int]:
        """Wait for notifications; return the logical shards they name, possibly none."""
        found = self.connection.notifies(timeout=seconds, stop_after=1)
        return [int(notice.payload) for notice in found if notice.payload.isdigit()]
