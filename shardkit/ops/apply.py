"""One run over a migration plan: transactions, retries and what came of them.

Called by `shardkit.ops.migrate` with connections that already hold the session locks. Each
transaction is one round trip: BEGIN, limits, the SQL with its ledger row, COMMIT.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import errors as pg

from shardkit.errors import (
    EndpointUnavailableError,
    MigrationError,
    OperationError,
    ShardkitError,
    TryAgainError,
)
from shardkit.ops.direct import connect
from shardkit.ops.ledger import admin_script, reference_script, rules_script, shard_script
from shardkit.ops.plan import MigrationPlan, PhysicalPlan, ShardWork
from shardkit.ops.revisions import Revision
from shardkit.topology import Topology, schema_name

__all__ = ["Limits", "MigrationOutcome", "run"]

Connection = psycopg.Connection[tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a transaction may take and hold others up.

    Attributes:
        lock_timeout: seconds to queue for a lock; whoever queues behind waits as long.
        statement_timeout: seconds one statement may run.
        lock_attempts: transactions tried per logical shard when locks are not granted.
        longest_pause: upper bound of the jittered seconds between two attempts.
        connections: transactions at once per physical shard.
        patience: seconds to wait for another runner's session lock; a server needs a moment to
            notice that a killed runner is gone.
    """

    lock_timeout: float = 0.3
    statement_timeout: float = 60.0
    lock_attempts: int = 20
    longest_pause: float = 1.0
    connections: int = 2
    patience: float = 2.0


@dataclass(frozen=True, slots=True)
class MigrationOutcome:
    """What a run did.

    Attributes:
        plan: what was to be done.
        done: logical shards brought to the newest revision by this run, by physical shard.
        failed: why a physical shard was given up, by name.
        laggards: why a logical shard was left behind, by number.
    """

    plan: MigrationPlan
    done: Mapping[str, tuple[int, ...]]
    failed: Mapping[str, ShardkitError] = field(default_factory=dict)
    laggards: Mapping[int, ShardkitError] = field(default_factory=dict)

    @property
    def error(self) -> OperationError | None:
        """None when every logical shard is current; else one error that names the rest.

        It is a `TryAgainError` (retryable) when nothing but locks stood in the way.
        """
        problems = [*self.failed.values(), *self.laggards.values()]
        if not problems:
            return None
        names = [f"physical shard {name!r}" for name in self.failed]
        names += [f"logical shard {number}" for number in sorted(self.laggards)[:8]]
        if len(self.laggards) > 8:
            names.append(f"{len(self.laggards) - 8} more")
        kind = (
            TryAgainError
            if all(isinstance(problem, TryAgainError) for problem in problems)
            else MigrationError
        )
        return kind(
            f"not migrated: {', '.join(names)}; {problems[0]}",
            hint="a rerun continues where this one ended",
        )


def run(
    topology: Topology,
    plan: MigrationPlan,
    connections: Mapping[str, Connection],
    *,
    limits: Limits,
    on_done: Callable[[str, int], None],
) -> MigrationOutcome:
    """Work through a plan and return what came of it.

    On an interrupt every transaction under way is finished, then the interrupt goes on.

    Args:
        topology: the cluster.
        plan: what is to be done.
        connections: one per physical shard that answered, holding its session lock.
        limits: timeouts and retries.
        on_done: called with physical and logical shard after each, from several threads.
    """
    stop = threading.Event()
    runs = [
        _PhysicalRun(
            topology,
            part,
            connections[part.physical],
            limits=limits,
            on_done=on_done,
            stop=stop,
        )
        for part in plan.physical
        if part.error is None
    ]
    with ThreadPoolExecutor(max(1, len(runs))) as pool:
        futures = [pool.submit(part.run) for part in runs]
        try:
            wait(futures)
        except BaseException:
            stop.set()
            raise
        for future in futures:
            future.result()
    failed = {part.physical: part.error for part in plan.physical if part.error}
    laggards: dict[int, ShardkitError] = {}
    for part in runs:
        laggards |= part.laggards
        if part.failed:
            failed[part.name] = part.failed
    return MigrationOutcome(
        plan, {part.name: tuple(sorted(part.done)) for part in runs}, failed, laggards
    )


class _PhysicalRun:
    """The part of a run that concerns one physical shard.

    Attributes:
        done: logical shards whose last commit the server acknowledged.
        failed: why the physical shard was given up, or None.
        laggards: why a logical shard was left behind, by number.
    """

    def __init__(
        self,
        topology: Topology,
        plan: PhysicalPlan,
        connection: Connection,
        *,
        limits: Limits,
        on_done: Callable[[str, int], None],
        stop: threading.Event,
    ) -> None:
        self.name = plan.physical
        self.done: list[int] = []
        self.failed: ShardkitError | None = None
        self.laggards: dict[int, ShardkitError] = {
            number: TryAgainError(why, logical_shard=number) for number, why in plan.waiting.items()
        }
        self._topology = topology
        self._shard = topology.physical[plan.physical]
        self._app_role = self._shard.primary.url.username or ""
        self._admin = plan.admin
        self._rules = plan.rules
        self._rounds = plan.rounds
        self._last = {
            work.logical_shard: n for n, (_, part) in enumerate(plan.rounds) for work in part
        }
        self._round = 0
        self._queue: deque[ShardWork] = deque()
        self._first = connection
        self._limits = limits
        self._on_done = on_done
        self._stop = stop
        # SET LOCAL: both limits end with the transaction.
        self._begin = (
            f"BEGIN; SET LOCAL lock_timeout = {round(limits.lock_timeout * 1000)};"
            f" SET LOCAL statement_timeout = {round(limits.statement_timeout * 1000)};\n"
        )

    def run(self) -> None:
        """Migrate everything over the first connection and a few more."""
        try:
            _watch_client(self._first)
            if self._admin:
                script, _ = admin_script(
                    self._shard,
                    cluster=self._topology.name,
                    n_logical_shards=self._topology.n_logical_shards,
                )
                self._transaction(self._first, script, None)
            if self._rules:
                self._transaction(self._first, rules_script(self._rules), None)
            for number, (revision, work) in enumerate(self._rounds):
                self._round = number
                if revision is not None:
                    self._change_reference(revision)
                self._queue = deque(w for w in work if w.logical_shard not in self.laggards)
                self._drain_all()
                if self._stop.is_set():
                    return
        except ShardkitError as error:
            self.failed = error

    def _change_reference(self, revision: Revision) -> None:
        """Run a revision's part about reference tables, once on this server.

        Raises:
            TryAgainError: logical shards lack what stands before it.
        """
        if self.laggards:
            raise TryAgainError(
                f"revision {revision.id} of reference tables waits for logical shards left behind",
                hint=str(next(iter(self.laggards.values()))),
            )
        self._transaction(self._first, reference_script(revision), None, (revision,))

    def _drain_all(self) -> None:
        n_more = min(self._limits.connections, len(self._queue)) - 1
        with ThreadPoolExecutor(max(1, n_more)) as pool:
            futures = [pool.submit(self._drain_alone) for _ in range(n_more)]
            self._drain(self._first)
        for future in futures:
            future.result()

    def _drain_alone(self) -> None:
        try:
            extra = connect(self._shard, application="shardkit migrate")
        except EndpointUnavailableError:
            return  # no room for one more; the first connection knows whether the server is gone
        with extra as connection:
            _watch_client(connection)
            self._drain(connection)

    def _drain(self, connection: Connection) -> None:
        """Migrate logical shards until none is left, the server is gone or the run stops."""
        while not self._stop.is_set():
            try:
                work = self._queue.popleft()
            except IndexError:
                return
            number = work.logical_shard
            try:
                for own, revisions in work.transactions:
                    script = shard_script(
                        number, own=own, app_role=self._app_role, revisions=revisions
                    )
                    self._transaction(connection, script, number, revisions)
            except EndpointUnavailableError:
                self._queue.clear()
                raise
            except ShardkitError as error:
                self.laggards[number] = error
            else:
                if self._last[number] == self._round:
                    self.done.append(number)
                    self._on_done(self.name, number)

    def _transaction(
        self,
        connection: Connection,
        script: str,
        logical_shard: int | None,
        revisions: tuple[Revision, ...] = (),
    ) -> None:
        """Run and commit one script, again after a pause when a lock is not granted."""
        for attempt in range(1, self._limits.lock_attempts + 1):
            try:
                connection.execute(f"{self._begin}{script}\n;\nCOMMIT".encode())
            except (pg.LockNotAvailable, pg.DeadlockDetected) as error:
                connection.rollback()
                bound = min(self._limits.longest_pause, 0.05 * 2**attempt)
                pause = random.uniform(bound / 4, bound)  # noqa: S311  spreads retries
                if attempt == self._limits.lock_attempts or self._stop.wait(pause):
                    raise TryAgainError(
                        f"no lock in {attempt} attempts: {_first_line(error)}",
                        hint=_holders(connection, logical_shard),
                        logical_shard=logical_shard,
                    ) from error
            except psycopg.Error as error:
                raise self._failure(connection, error, logical_shard, revisions) from error
            else:
                return

    def _failure(
        self,
        connection: Connection,
        error: psycopg.Error,
        logical_shard: int | None,
        revisions: tuple[Revision, ...],
    ) -> ShardkitError:
        """Return what a failed transaction means, with the revision at fault where known."""
        if connection.broken or connection.closed:
            return EndpointUnavailableError(
                "the server went away during a migration",
                hint=_first_line(error),
                endpoint=str(self._shard.primary),
            )
        connection.rollback()
        if isinstance(error, psycopg.ProgrammingError | psycopg.NotSupportedError):
            # The SQL itself is wrong, and would be everywhere.
            self._stop.set()
        return MigrationError(
            f"{self._culprit(connection, logical_shard, revisions)}: {_first_line(error)}",
            hint=error.diag.message_hint or error.diag.message_detail,
            logical_shard=logical_shard,
            endpoint=str(self._shard.primary),
        )

    def _culprit(
        self, connection: Connection, logical_shard: int | None, revisions: tuple[Revision, ...]
    ) -> str:
        """Return which revision fails, by trying them one at a time and rolling back."""
        if logical_shard is None:
            about = f"revision {revisions[0].id} of reference tables" if revisions else ""
            return about or "the admin schema"
        if len(revisions) == 1:
            return f"revision {revisions[0].id}"
        name = "the objects of shardkit itself"
        try:
            connection.execute(self._begin.encode())
            own = shard_script(logical_shard, own=True, app_role=self._app_role, revisions=())
            connection.execute(own.encode())
            for revision in revisions:
                name = f"revision {revision.id}"
                connection.execute("\n;\n".join(revision.statements).encode())
        except psycopg.Error:
            return name
        finally:
            if not connection.broken:
                connection.rollback()
        return f"revisions {', '.join(revision.id for revision in revisions)}"


def _watch_client(connection: Connection) -> None:
    """Let the server notice a killed runner during a long statement, and free its locks."""
    connection.prepare_threshold = None
    if connection.info.server_version >= 140000:
        connection.execute("SET client_connection_check_interval = '500ms'")


def _holders(connection: Connection, logical_shard: int | None) -> str | None:
    """Return who holds locks on a logical shard's tables, for the error's hint."""
    if logical_shard is None:
        return None
    # AccessShareLock on catalogues only.
    rows = connection.execute(
        "SELECT DISTINCT a.pid, a.usename, coalesce(nullif(a.application_name, ''), '?') "
        "FROM pg_locks AS l JOIN pg_class AS c ON c.oid = l.relation "
        "JOIN pg_stat_activity AS a ON a.pid = l.pid "
        "WHERE c.relnamespace = to_regnamespace(%s) AND l.granted AND a.pid <> pg_backend_pid() "
        "ORDER BY a.pid LIMIT 3",
        (schema_name(logical_shard),),
    ).fetchall()
    held = ", ".join(f"process {pid} ({user}, {name})" for pid, user, name in rows)
    return f"locks are held by {held}" if held else "the holder has gone meanwhile; try again"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
