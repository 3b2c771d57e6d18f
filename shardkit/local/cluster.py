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
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

from shardkit.clock import SYSTEM, Clock
from shardkit.errors import LocalServerError, RefusedError
from shardkit.local import ports
from shardkit.local.account import server_account
from shardkit.local.addresses import write_config
from shardkit.local.fleet import Fleet
from shardkit.local.layout import Layout
from shardkit.local.options import LocalOptions
from shardkit.local.owner import Warden, end_leftovers, stop_signal
from shardkit.local.postgres import PostgresServer
from shardkit.local.processes import find
from shardkit.local.server import LocalServer, ServerKind, ServerProcess
from shardkit.local.settings import DATABASE, host_rules, ident_map
from shardkit.local.state import DirectoryLock, ServerState, State
from shardkit.topology import Role

__all__ = ["LocalCluster", "LocalProgress", "Progress"]

_ATTEMPTS = 3
"""Starts of one server when another program takes its port in between."""


@dataclass(frozen=True, slots=True)
class LocalProgress:
    """How far a start or stop has come.

    Attributes:
        done: servers that are up (or down).
        total: servers altogether.
        what: what just happened, for people.
    """

    done: int
    total: int
    what: str


Progress = Callable[[LocalProgress], None]


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
        self._guard = threading.RLock()
        self._cancelled = threading.Event()
        self._fleet: Fleet | None = None
        self._state: State | None = None
        self._lock: DirectoryLock | None = None
        self._warden: Warden | None = None
        self._progress: Progress | None = None
        self._done = 0

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
        server = self._server(name)
        if not isinstance(server, PostgresServer):
            raise LocalServerError(f"{name}: is no PostgreSQL server")
        return f"{server.superuser_dsn} dbname={database}"

    def start(self, progress: Progress | None = None) -> None:
        """Start every server; make their data when it is missing.

        Args:
            progress: called after each step, from several threads but never at once.

        Raises:
            RefusedError: another process owns the directory, or its data has another shape.
            LocalServerError: a server did not start; everything is stopped again.
        """
        self._progress, self._done = progress, 0
        self._cancelled.clear()
        layout = Layout.of(self._directory, server_account())
        lock = DirectoryLock(layout.lock)
        if not lock.acquire():
            raise _already_owned(layout)
        self._lock = lock
        try:
            self._prepare(layout)
            self._start_all()
            fleet = self._running()
            write_config(fleet)
            self._update(is_ready=True)
        except BaseException:
            self._cancelled.set()
            self.stop()
            raise

    def stop(self, progress: Progress | None = None) -> None:
        """Stop every server in good order; does nothing when nothing runs.

        Raises:
            LocalServerError: a process survives SIGKILL; the others are stopped all the same.
        """
        self._cancelled.set()
        self._progress, self._done = progress, 0
        try:
            if self._fleet is not None:
                # Replicas first: a primary waits until they have everything, for ever when one
                # is stuck. PgBouncer before both, so that it does not log their end.
                for group in self._fleet.stop_order():
                    _in_parallel(partial(self._stop_one, server) for server in group)
                self._update(is_ready=False, owner=None)
        finally:
            if self._warden is not None:
                self._warden.dismiss()
                self._warden = None
            self._fleet = None
            if self._lock is not None:
                self._lock.release()
                self._lock = None

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

    def _prepare(self, layout: Layout) -> None:
        """Clean up after the last owner, decide what is to run, and leave word of it."""
        old = State.load(layout.state)
        if old is not None and (left := end_leftovers(old)):
            self._say(f"ended {left} processes of an owner that was killed", total=0)
        options = self._wanted or (old.options if old else LocalOptions())
        if old is not None and (reasons := old.options.changes_refused(options)):
            raise RefusedError(
                f"{layout.directory}: {'; '.join(reasons)}",
                hint="use another --dir, or `shardkit local down --delete-data` first",
            )
        layout.prepare()
        fleet = Fleet.of(layout, options, old, self._clock)
        users = [fleet.owner_name, layout.account.name]
        for name, text in (("pg_hba.conf", host_rules()), ("pg_ident.conf", ident_map(users))):
            fleet.write_shared(name, text)
        self._fleet = fleet
        self._warden = Warden()
        self._state = State(
            options,
            layout.data,
            layout.sockets,
            owner=find(os.getpid()),
            is_supervised=self._is_supervised,
            servers={s.name: self._remembered(s, old) for s in fleet.servers.values()},
        )
        self._state.save(layout.state)

    def _start_all(self) -> None:
        fleet = self._running()
        _in_parallel(
            [
                *(partial(self._start_physical, name) for name in fleet.options.physical_names),
                *(partial(self._bring_up, server) for server in fleet.caches),
            ],
            self._cancelled,
        )

    def _start_physical(self, physical: str) -> None:
        """Start one physical shard: its primary, then its replicas, then its PgBouncer."""
        fleet = self._running()
        members = fleet.members(physical)
        made = [server for server in members if self._is_initialised(server)]
        primaries = [server for server in made if server.role is Role.PRIMARY]
        if made and not primaries:
            raise LocalServerError(
                f"{physical}: every server is a replica, none can be the primary",
                hint="remove standby.signal from the folder of the one that is to be it",
            )
        primary = max(primaries, key=PostgresServer.timeline) if primaries else members[0]
        for server in members:
            server.primary = None if server is primary else primary
        is_new = primary not in made
        if is_new:
            primary.initialise()
        self._bring_up(primary)
        if is_new:
            primary.create_roles(fleet.passwords)
            self._record(primary, is_initialised=True)
        followers = [server for server in members if server is not primary]
        _in_parallel(
            [
                partial(self._start_replica, s, primary, s in made and s not in primaries)
                for s in followers
            ],
            self._cancelled,
        )
        for pooler in fleet.poolers(physical):
            self._bring_up(pooler)

    def _start_replica(
        self, server: PostgresServer, primary: PostgresServer, is_usable: bool
    ) -> None:
        if not is_usable:
            # New, or a former primary whose history ended at a failover.
            self._record(server, is_initialised=False)
            server.clone(primary)
            self._record(server, is_initialised=True)
        self._bring_up(server)

    def _bring_up(self, server: ServerProcess) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                server.launch()
                self._record(server)
                server.wait_ready(self._cancelled)
            except LocalServerError:
                server.kill()
                if (
                    attempt == _ATTEMPTS
                    or self._cancelled.is_set()
                    or ports.is_free(server.port)
                ):
                    raise
                with self._guard:
                    server.port = ports.choose(self._running().ports)
            else:
                break
        self._record(server)
        self._say(f"{server.name} is up on port {server.port}")

    def _stop_one(self, server: ServerProcess) -> None:
        server.stop()
        self._record(server)
        self._say(f"{server.name} is down")

    def _record(self, server: ServerProcess, *, is_initialised: bool | None = None) -> None:
        """Keep the state file and the warden in step with one server."""
        with self._guard:
            if self._state is None:
                return
            old = self._state.servers[server.name]
            new = replace(
                old,
                port=server.port,
                process=server.mark,
                is_initialised=old.is_initialised if is_initialised is None else is_initialised,
            )
            self._state = self._state.with_server(new)
            self._state.save(self._running().layout.state)
            if self._warden is not None:
                self._warden.watch(
                    {s.process: stop_signal(s.kind) for s in self._state.servers.values() if s.process}
                )

    def _update(self, **changes: object) -> None:
        with self._guard:
            if self._state is not None:
                self._state = replace(self._state, **changes)  # type: ignore[arg-type]
                self._state.save(self._running().layout.state)

    def _say(self, what: str, total: int | None = None) -> None:
        with self._guard:
            if total is None:
                self._done += 1
                total = len(self._running().servers)
            if self._progress is not None:
                self._progress(LocalProgress(self._done, total, what))

    def _is_initialised(self, server: ServerProcess) -> bool:
        return self._state is not None and self._state.servers[server.name].is_initialised

    def _remembered(self, server: ServerProcess, old: State | None) -> ServerState:
        known = old.servers.get(server.name) if old else None
        return ServerState(
            server.name,
            server.kind,
            server.physical,
            server.port,
            server.program.version,
            is_initialised=known is not None and known.is_initialised and server.folder.is_dir(),
        )

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


def _already_owned(layout: Layout) -> RefusedError:
    state = State.load(layout.state)
    owner = state.owner.pid if state and state.owner else "unknown"
    return RefusedError(
        f"{layout.directory}: process {owner} already runs this cluster",
        hint="see `shardkit local status`; stop it with `shardkit local down`",
    )


def _in_parallel(
    tasks: Iterable[Callable[[], None]], cancelled: threading.Event | None = None
) -> None:
    """Run tasks in threads of their own and wait for all; the first failure cancels the rest."""
    waiting = list(tasks)
    if not waiting:
        return
    with ThreadPoolExecutor(len(waiting), thread_name_prefix="shardkit-local") as executor:
        futures = [executor.submit(task) for task in waiting]
        failure: BaseException | None = None
        try:
            for future in futures:
                if (error := future.exception()) is not None and failure is None:
                    failure = error
                    if cancelled is not None:
                        cancelled.set()
        except BaseException:
            if cancelled is not None:
                cancelled.set()
            raise
    if failure is not None:
        raise failure
