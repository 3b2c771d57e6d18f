"""The part of a migration run that concerns one physical shard: transactions and retries.

Logical shards go through in batches, one round trip each: for every logical shard BEGIN, limits,
a step's SQL with its ledger row, COMMIT, and so on. All but the last COMMIT of a batch are not
waited for (`synchronous_commit = off`); the last one makes those before it durable, since the log
is flushed in order, and only then is anything called done. A batch in which anything goes wrong is
finished one logical shard at a time, from what the ledgers say. Called by `shardkit.ops.apply`.
"""

from __future__ import annotations

import math
import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
from psycopg import errors as pg

from shardkit.clock import SYSTEM
from shardkit.errors import (
    EndpointUnavailableError,
    MigrationError,
    ShardkitError,
    TryAgainError,
)
from shardkit.ops import concurrently
from shardkit.ops.blame import culprit, first_line, holders
from shardkit.ops.direct import connect
from shardkit.ops.filling import Filling
from shardkit.ops.lagging import LagRule
from shardkit.ops.ledger import admin_script, reference_script, rules_script
from shardkit.ops.leftover import unfinished
from shardkit.ops.limits import Limits
from shardkit.ops.pace import BatchSize, Rate
from shardkit.ops.parts import Part, Parts
from shardkit.ops.plan import PhysicalPlan, ShardWork
from shardkit.ops.queueing import Queue
from shardkit.topology import Topology

__all__ = ["PhysicalRun"]

Connection = psycopg.Connection[tuple[Any, ...]]

BATCH = 32
"""Logical shards in one round trip; source: benchmarks/migrate.py."""

_ASYNCHRONOUS = "SET LOCAL synchronous_commit = off;\n"


class PhysicalRun:
    """The part of a run that concerns one physical shard.

    Attributes:
        done: logical shards whose last commit the server acknowledged.
        failed: why the physical shard was given up, or None.
        laggards: why a logical shard was left behind, by number.
        unwell: why the run should go no further, or None.
    """

    def __init__(
        self,
        topology: Topology,
        plan: PhysicalPlan,
        connection: Connection,
        *,
        limits: Limits,
        on_done: Callable[[str, int], None],
        on_rows: Callable[[str, str, int], None],
        stop: threading.Event,
        is_staged: bool,
    ) -> None:
        self.name = plan.physical
        self.done: list[int] = []
        self.failed: ShardkitError | None = None
        self.laggards: dict[int, ShardkitError] = {
            number: TryAgainError(why, logical_shard=number) for number, why in plan.waiting.items()
        }
        self.unwell: str | None = None
        self.rounds = plan.rounds
        self._topology = topology
        self._shard = topology.physical[plan.physical]
        self._roles = self._shard.roles
        self._admin = plan.admin
        self._rules = plan.rules
        self._parts = Parts(plan, self._roles)
        self._round = 0
        self._queue: deque[ShardWork] = deque()
        self._first = connection
        self._limits = limits
        self._on_done = on_done
        self._on_rows = on_rows
        self._stop = stop
        self._is_staged = is_staged
        self._rate = Rate(limits.backfill_rate)
        self._is_wary = False  # once somebody did not give way
        # SET LOCAL: both limits end with the transaction.
        self._begin = (
            f"BEGIN; SET LOCAL lock_timeout = {round(limits.lock_timeout * 1000)};"
            f" SET LOCAL statement_timeout = {round(limits.statement_timeout * 1000)};\n"
        )

    def begin(self) -> None:
        """Create or complete the admin schema, and write down how rows are placed."""
        self._watch_client(self._first)
        if self._admin:
            script, _ = admin_script(
                self._shard,
                cluster=self._topology.name,
                n_logical_shards=self._topology.n_logical_shards,
            )
            self._transaction(self._first, Part(script, ()), None)
        if self._rules:
            self._transaction(self._first, Part(rules_script(self._rules), ()), None)

    def start_round(self, number: int) -> None:
        """Begin a round: change the reference tables, once on this server.

        Raises:
            TryAgainError: logical shards lack what stands before it.
        """
        self._round = number
        revision = self.rounds[number][0]
        if revision is None:
            return
        if self.laggards:
            raise TryAgainError(
                f"revision {revision.id} of reference tables waits for logical shards left behind",
                hint=str(next(iter(self.laggards.values()))),
            )
        self._transaction(self._first, Part(reference_script(revision), (revision,)), None)

    def migrate(self, logical_shards: frozenset[int] | None) -> None:
        """Do this round's work on some logical shards; None stands for all of them."""
        _, work = self.rounds[self._round]
        self._queue = deque(
            item
            for item in work
            if item.logical_shard not in self.laggards
            and (logical_shards is None or item.logical_shard in logical_shards)
        )
        n_more = min(self._limits.connections, len(self._queue)) - 1
        if n_more < 1:
            self._drain(self._first)
            return
        with ThreadPoolExecutor(n_more) as pool:
            futures = [pool.submit(self._drain_alone) for _ in range(n_more)]
            self._drain(self._first)
        for future in futures:
            future.result()

    def _watch_client(self, connection: Connection) -> None:
        """Let the server notice a killed runner during a long statement, and free its locks."""
        connection.prepare_threshold = None
        if connection.info.server_version >= 140000:
            connection.execute("SET client_connection_check_interval = '500ms'")

    def _drain_alone(self) -> None:
        try:
            extra = connect(self._shard, application="shardkit migrate")
        except EndpointUnavailableError:
            return  # no room for one more; the first connection knows whether the server is gone
        with extra as connection:
            self._watch_client(connection)
            self._drain(connection)

    def _drain(self, connection: Connection) -> None:
        """Migrate logical shards until none is left, the server is gone or the run stops."""
        lag = LagRule(connection, self._limits.max_lag_bytes, self._limits.lag_patience)
        while not self._stop.is_set():
            batch = self._take()
            if not batch:
                return
            try:
                if unwell := lag.wait(self._stop):
                    self.unwell = unwell
                    self._queue.clear()
                    return
                left = batch
                scripts = [part for work in batch for part in self._parts.of(work, self._round)]
                if all(part.step is None for part in scripts):
                    left = self._together(connection, batch, [part.script for part in scripts])
                for work in left:
                    if self._stop.is_set() or self.unwell:
                        return
                    self._alone(connection, work, lag)
            except EndpointUnavailableError:
                self._queue.clear()
                raise
            except psycopg.Error as error:
                self._queue.clear()
                raise self._failure(connection, error, Part("", ()), None) from error

    def _take(self) -> list[ShardWork]:
        """Return what goes into the next round trip: its share of what is left, and no more."""
        share = math.ceil(len(self._queue) / (2 * self._limits.connections))
        batch: list[ShardWork] = []
        while len(batch) < max(1, min(BATCH, share)):
            try:
                batch.append(self._queue.popleft())
            except IndexError:
                break
        return batch

    def _together(
        self, connection: Connection, batch: Sequence[ShardWork], scripts: Sequence[str]
    ) -> list[ShardWork]:
        """Run all transactions of some logical shards in one round trip; return what is left."""
        last = len(scripts) - 1
        text = "\n;\n".join(
            f"{self._begin}{'' if n == last else _ASYNCHRONOUS}{script}\n;\nCOMMIT"
            for n, script in enumerate(scripts)
        )
        try:
            connection.execute(text.encode())
        except psycopg.Error as error:
            if connection.broken or connection.closed:
                raise self._failure(connection, error, Part("", ()), None) from error
            connection.rollback()
            self._is_wary |= isinstance(error, pg.LockNotAvailable)
            left = unfinished(connection, batch, self._parts.digest)
            numbers = {work.logical_shard for work in left}
            for work in batch:
                if work.logical_shard not in numbers:
                    self._finish(work)
            return left
        for work in batch:
            self._finish(work)
        return []

    def _alone(self, connection: Connection, work: ShardWork, lag: LagRule) -> None:
        """Do what one logical shard needs, a transaction a round trip, with retries."""
        number = work.logical_shard
        try:
            for part in self._parts.of(work, self._round):
                if part.step is None:
                    self._transaction(connection, part, number)
                elif part.step.backfill:
                    if not self._fill(connection, part, number, lag):
                        return
                else:
                    self._outside(connection, part, number)
        except EndpointUnavailableError:
            raise
        except ShardkitError as error:
            self.laggards[number] = error
            if self._is_staged and not isinstance(error, TryAgainError):
                self._queue.clear()
        else:
            self._finish(work)

    def _finish(self, work: ShardWork) -> None:
        if self._parts.is_last(work.logical_shard, self._round):
            self.done.append(work.logical_shard)
            self._on_done(self.name, work.logical_shard)

    def _transaction(self, connection: Connection, part: Part, logical_shard: int | None) -> None:
        """Run and commit one script, again after a pause when a lock is not granted."""
        text = f"{self._begin}{part.script}\n;\nCOMMIT".encode()
        self._again(connection, lambda: connection.execute(text), part, logical_shard)

    def _outside(self, connection: Connection, part: Part, logical_shard: int) -> None:
        [revision], step = part.revisions, part.step
        assert step is not None
        self._again(
            connection,
            lambda: concurrently.run(
                connection, logical_shard, revision, step, seconds=self._limits.index_timeout
            ),
            part,
            logical_shard,
        )

    def _fill(self, connection: Connection, part: Part, logical_shard: int, lag: LagRule) -> bool:
        """Go through a table in batches; return whether to the end, or until the run stops."""
        [revision], step = part.revisions, part.step
        assert step is not None
        assert step.backfill is not None
        filling = Filling(connection, logical_shard, revision, step)
        size = BatchSize(self._limits.backfill_seconds, step.backfill.rows)
        while not filling.is_done:
            if unwell := lag.wait(self._stop, now=True):
                self.unwell = unwell
                self._queue.clear()
                return False
            if self._stop.wait(self._rate.take(size.rows)) or self._stop.is_set():
                return False

            def batch() -> None:
                start = SYSTEM.monotonic()
                try:
                    changed = filling.batch(self._begin, size.rows)
                except (pg.LockNotAvailable, pg.DeadlockDetected):
                    size.shrink()
                    raise
                size.took(SYSTEM.monotonic() - start)
                self._on_rows(self.name, revision.id, changed)

            self._again(connection, batch, part, logical_shard)
        return True

    def _again(
        self,
        connection: Connection,
        work: Callable[[], object],
        part: Part,
        logical_shard: int | None,
    ) -> None:
        last = self._limits.lock_attempts
        queue = Queue(connection, logical_shard, part.tables, is_wary=self._is_wary)
        for attempt in range(1, last + 1):
            why: psycopg.Error | None = None
            try:
                # Who queues for a strong lock holds up all who come after: not behind a holder who
                # has stayed through a pause already. The last attempt makes sure.
                if attempt == last or not queue.is_held():
                    work()
                    return
            except (pg.LockNotAvailable, pg.DeadlockDetected) as error:
                connection.rollback()
                self._is_wary = True
                queue.note()
                why = error
            except psycopg.Error as error:
                raise self._failure(connection, error, part, logical_shard) from error
            bound = min(self._limits.longest_pause, 0.05 * 2**attempt)
            pause = random.uniform(bound / 4, bound)  # noqa: S311  spreads retries
            if attempt == last or self._stop.wait(pause):
                said = first_line(why) if why else "whoever holds it stays"
                raise TryAgainError(
                    f"no lock in {attempt} attempts: {said}",
                    hint=holders(connection, logical_shard),
                    logical_shard=logical_shard,
                ) from why

    def _failure(
        self,
        connection: Connection,
        error: psycopg.Error,
        part: Part,
        logical_shard: int | None,
    ) -> ShardkitError:
        """Return what a failed transaction means, with the revision at fault where known."""
        if connection.broken or connection.closed:
            return EndpointUnavailableError(
                "the server went away during a migration",
                hint=first_line(error),
                endpoint=str(self._shard.primary),
            )
        connection.rollback()
        if isinstance(error, psycopg.ProgrammingError | psycopg.NotSupportedError):
            # The SQL itself is wrong, and would be everywhere.
            self._stop.set()
        who = culprit(
            connection,
            part.revisions,
            logical_shard,
            begin=self._begin,
            roles=self._roles,
        )
        return MigrationError(
            f"{who}: {first_line(error)}",
            hint=error.diag.message_hint or error.diag.message_detail,
            logical_shard=logical_shard,
            endpoint=str(self._shard.primary),
        )
