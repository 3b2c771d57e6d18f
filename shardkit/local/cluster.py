"""An embedded cluster: real servers as child processes of the one that started them.

    with LocalCluster(".shardkit") as local:
        cluster = Cluster.from_file(local.config_path)

Used by `shardkit local up`, by tests and by a first try of shardkit. Decides which servers exist
and in which order they come up; how each is launched is the business of `postgres` and
`services`. Never migrates: that is `shardkit migrate apply`.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Self

import psycopg
from psycopg.conninfo import make_conninfo

from shardkit.clock import SYSTEM, Clock
from shardkit.errors import LocalServerError, RefusedError
from shardkit.local import ports
from shardkit.local.account import server_account
from shardkit.local.addresses import check_config, write_config
from shardkit.local.fleet import Fleet
from shardkit.local.journal import Journal, Progress
from shardkit.local.launch import Launch
from shardkit.local.layout import Layout
from shardkit.local.options import LocalOptions
from shardkit.local.owner import end_leftovers
from shardkit.local.postgres import PostgresServer
from shardkit.local.processes import find
from shardkit.local.server import LocalServer, ServerKind, ServerProcess, ServerStatus
from shardkit.local.settings import DATABASE
from shardkit.local.state import DirectoryLock, State, acquire
from shardkit.ops.failover.lost import LostRow, commits_beyond, fork_of, lost_rows, next_xid
from shardkit.topology import Role

__all__ = ["LocalCluster"]

_FENCE_TIMEOUT = 5.0
"""Seconds that a server has to stop in good order, before it is ended by force."""


class LocalCluster:
    """PostgreSQL primaries with their replicas, Redis, Memcached and PgBouncer on this machine.

    *Invariant:* between `start` and `stop` this process holds the lock of the directory, and no
    server outlives it: not after an exception, not after SIGKILL (see `owner`).
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] = ".shardkit",
        options: LocalOptions | None = None,
        *,
        is_supervised: bool = False,
        clock: Clock = SYSTEM,
    ) -> None:
        """Describe a cluster; nothing is started or written.

        Args:
            directory: where it lives; created by `start`.
            options: its shape; None for the one it was created with, or the default.
            is_supervised: whether `shardkit local down` may end this process.
            clock: where the time comes from.
        """
        self._directory = Path(directory)
        self._wanted = options
        self._is_supervised = is_supervised
        self._clock = clock
        self._cancelled = threading.Event()
        self._lock: DirectoryLock | None = None
        self._fleet: Fleet | None = None
        self._journal: Journal | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def config_path(self) -> Path:
        """The `shardkit.toml` for applications."""
        return self._directory.absolute() / "shardkit.toml"

    @property
    def options(self) -> LocalOptions:
        """The shape of the running cluster."""
        return self._running().options

    @property
    def missing(self) -> tuple[str, ...]:
        """Programs that were wanted but are not installed; possibly empty."""
        return self._running().missing

    @property
    def servers(self) -> list[LocalServer]:
        """Every server as it is now: PostgreSQL by physical shard, then the others."""
        return [server.snapshot() for server in self._running().servers.values()]

    def server(self, name: str) -> LocalServer:
        """Return one server as it is now."""
        return self._server(name).snapshot()

    def primary(self, physical: str) -> LocalServer:
        """Return the present primary of a physical shard."""
        return next(s for s in self._members(physical) if s.role is Role.PRIMARY)

    def replicas(self, physical: str) -> list[LocalServer]:
        """Return the present replicas of a physical shard; possibly empty."""
        return [s for s in self._members(physical) if s.role is Role.REPLICA]

    def superuser_dsn(self, name: str, database: str = DATABASE) -> str:
        """Return how the owner of the cluster connects to a PostgreSQL as superuser.

        For tests and repairs: by unix socket, without a password. Applications never need it.
        """
        return make_conninfo(self._database_server(name).superuser_dsn, dbname=database)

    def start(self, progress: Progress | None = None) -> None:
        """Start every server; make their data when it is missing.

        Args:
            progress: called after each step, from several threads but never at once.

        Raises:
            ConfigurationError: the `shardkit.toml` there is wrong; a person has edited it.
            RefusedError: another process owns the directory, or its data has another shape.
            LocalServerError: a server did not start; everything is stopped again.
        """
        layout = Layout.of(self._directory, server_account())
        self._lock = acquire(layout)
        self._cancelled.clear()
        try:
            fleet, journal = self._prepare(layout, progress)
            self._fleet, self._journal = fleet, journal
            Launch(fleet, journal, self._cancelled).up()
            write_config(fleet)
            journal.ready()
        except BaseException:
            self.stop()
            raise

    def stop(self, progress: Progress | None = None) -> None:
        """Stop every server in good order; does nothing when nothing runs.

        Args:
            progress: called after each step, from several threads but never at once.

        Raises:
            LocalServerError: a process survives SIGKILL; the others are stopped all the same.
        """
        self._cancelled.set()
        fleet, journal, lock = self._fleet, self._journal, self._lock
        try:
            if fleet is not None and journal is not None:
                journal.restart_count(progress)
                Launch(fleet, journal, self._cancelled).down()
                journal.close(is_orderly=True)
        except BaseException:
            if journal is not None:
                journal.close(is_orderly=False)
            raise
        finally:
            self._fleet = self._journal = self._lock = None
            if lock is not None:
                lock.release()

    def start_server(self, name: str) -> None:
        """Start a server that was stopped or killed, on its data and port; returns when ready.

        Raises:
            LocalServerError: it did not start, or another program has taken its port.
        """
        server = self._server(name)
        if server.mark is not None:
            return
        for leftover in server.processes():
            raise LocalServerError(f"{name}: process {leftover.pid} is left; kill the server first")
        if not ports.is_free(server.port):
            raise LocalServerError(f"{name}: port {server.port} was taken by another program")
        server.launch()
        self._record(server)
        server.wait_ready(threading.Event())

    def revive(self) -> list[str]:
        """Start every PgBouncer again that ended by itself; return their names.

        As the system's service manager does elsewhere. PgBouncer 1.18 ends now and then when a
        query is cancelled (`server in bad state`; its issue 822, mended in 1.21).

        Raises:
            LocalServerError: one did not start.
        """
        ended = [
            server.name
            for server in self._running().servers.values()
            if server.kind is ServerKind.PGBOUNCER and server.has_ended
        ]
        for name in ended:
            self.start_server(name)
        return ended

    def stop_server(self, name: str) -> None:
        """Stop one server in good order."""
        self._server(name).stop()
        self._record(self._server(name))

    def kill_server(self, name: str) -> None:
        """End every process of one server with SIGKILL, as a crash would."""
        self._server(name).kill()
        self._record(self._server(name))

    def pause(self, name: str) -> None:
        """Freeze one server (SIGSTOP): connections stay open and nothing answers."""
        self._server(name).pause()

    def resume(self, name: str) -> None:
        """Let a paused server go on."""
        self._server(name).resume()

    def rebuild_server(self, name: str) -> None:
        """Make a PostgreSQL server anew as a replica of its physical shard's present primary.

        For a former primary after a failover. What it held is deleted.

        Raises:
            LocalServerError: no primary runs, or the copy failed.
        """
        server = self._server(name)
        fleet = self._running()
        if not isinstance(server, PostgresServer) or server.physical is None:
            raise LocalServerError(f"{name}: is no PostgreSQL server")
        others = [s for s in fleet.members(server.physical) if s is not server and s.mark]
        primary = next((s for s in others if s.role is Role.PRIMARY), None)
        if primary is None:
            raise LocalServerError(f"{name}: no primary of {server.physical} runs to copy from")
        server.stop()
        for other in (*others, server):
            other.primary = None if other is primary else primary
        server.clone(primary)
        self.start_server(name)

    def end_server(self, name: str) -> None:
        """Stop a PostgreSQL server and have it come back as a standby only.

        In good order where it answers, so that its replicas have all it wrote; one that is frozen
        is killed, and does not go on for a moment.
        """
        server = self._database_server(name)
        if server.snapshot().status is ServerStatus.PAUSED:
            server.kill()
        server.stop(_FENCE_TIMEOUT)
        self._record(server)
        server.become_replica()

    def rejoin_server(self, name: str, primary: str, *, anew: bool = False) -> None:
        """Make a stopped PostgreSQL server a replica of a primary, and start it.

        By pg_rewind, which copies what differs; where that cannot, by a new copy of everything. A
        replica that has crashed is started as it is, and recovers as a replica; if it cannot follow
        then, it runs and can be rewound.

        A standby whose primary is gone by then is started as it was: what it has may be what the
        next primary needs.

        Args:
            name: of the server.
            primary: name of a running one.
            anew: by a new copy at once.

        Raises:
            LocalServerError: the copy failed, or the server did not start.
        """
        server, leader = self._database_server(name), self._database_server(primary)
        was_replica = server.role is Role.REPLICA
        server.stop()
        for other in self._running().members(leader.physical or ""):
            other.primary = None if other is leader else leader
        try:
            is_kept = not anew and (server.is_crashed_replica or server.rewind(leader))
            if not is_kept:
                server.clone(leader)
        except LocalServerError:
            if was_replica and server.has_data():
                server.become_replica()
                self.start_server(name)
            raise
        server.become_replica()
        try:
            self.start_server(name)
        except LocalServerError:
            if not is_kept:
                raise
            # What was kept may ask for log that its new primary has no more.
            server.stop()
            server.clone(leader)
            server.become_replica()
            self.start_server(name)

    def lost(self, name: str, primary: str) -> list[LostRow]:
        """Return what a stopped former primary had committed and its successor never received.

        It is started as a standby that follows nobody, read, and stopped again.

        Raises:
            LocalServerError: it does not start.
        """
        server, leader = self._database_server(name), self._database_server(primary)
        with psycopg.connect(
            self.superuser_dsn(primary), replication="database", autocommit=True
        ) as stream:
            timeline = server.timeline()
            fork = fork_of(stream, timeline)
        program = Path(server.program.tool("pg_waldump"))
        commits = commits_beyond(program, server.folder, timeline, fork)
        if not commits.at:
            return []
        server.primary = None
        server.become_replica()
        self.start_server(name)
        try:
            with (
                psycopg.connect(self.superuser_dsn(name), autocommit=True) as old,
                psycopg.connect(self.superuser_dsn(primary), autocommit=True) as new,
            ):
                shards = [
                    n
                    for (n,) in new.execute(
                        "SELECT logical_shard FROM shardkit.ownership ORDER BY logical_shard"
                    ).fetchall()
                ]
                first = next_xid(new, timeline)
                return [*lost_rows(old, new, commits, shards, first_xid=first)]
        finally:
            server.stop()
            server.primary = leader
            self._record(server)

    def lead(self, physical: str, primary: str) -> None:
        """Have the PgBouncer of a physical shard send to a primary."""
        fleet = self._running()
        fleet.leaders[physical] = primary
        for pooler in fleet.poolers(physical):
            pooler.reload()

    def _database_server(self, name: str) -> PostgresServer:
        server = self._server(name)
        if not isinstance(server, PostgresServer):
            raise LocalServerError(f"{name}: is no PostgreSQL server")
        return server

    def _prepare(self, layout: Layout, progress: Progress | None) -> tuple[Fleet, Journal]:
        """Clean up after the last owner, decide what is to run, and leave word of it."""
        old = State.load(layout.state)
        if old is not None:
            end_leftovers(old, layout.data)
        options = self._wanted or (old.options if old else LocalOptions())
        if old is not None and (reasons := old.options.changes_refused(options)):
            raise RefusedError(
                f"{layout.directory}: {'; '.join(reasons)}",
                hint="use another --dir, or `shardkit local down --delete-data` first",
            )
        if old is not None and old.has_data and not layout.data.is_dir():
            raise RefusedError(
                f"{layout.directory}: its data were in {old.data}, which is not this folder's",
                hint="was the folder moved? Move it back, or begin anew with "
                "`shardkit local down --delete-data`",
            )
        check_config(layout.config)
        layout.prepare()
        fleet = Fleet.of(layout, options, old, self._clock)
        state = State(
            options,
            layout.data,
            owner=find(os.getpid()),
            is_supervised=self._is_supervised,
            servers=fleet.remembered(),
        )
        return fleet, Journal(layout.state, state, progress)

    def _record(self, server: ServerProcess) -> None:
        if self._journal is not None:
            self._journal.record(server)

    def _running(self) -> Fleet:
        if self._fleet is None:
            raise LocalServerError("the embedded cluster is not running", hint="call start() first")
        return self._fleet

    def _server(self, name: str) -> ServerProcess:
        servers = self._running().servers
        if name not in servers:
            raise LocalServerError(f"{name}: no such server; there are {', '.join(servers)}")
        return servers[name]

    def _members(self, physical: str) -> list[LocalServer]:
        return [
            s for s in self.servers if s.physical == physical and s.kind is ServerKind.POSTGRESQL
        ]
