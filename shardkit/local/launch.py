"""The order in which an embedded cluster comes up and goes down, as much at once as possible.

Called by `cluster`. Physical shards start beside each other; within one the primary comes first,
then its replicas together, then its PgBouncer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from shardkit.errors import LocalServerError
from shardkit.local import ports
from shardkit.local.fleet import Fleet
from shardkit.local.journal import Journal
from shardkit.local.postgres import PostgresServer
from shardkit.local.server import ServerProcess
from shardkit.topology import Role

__all__ = ["Launch"]

_ATTEMPTS = 3
"""Starts of one server when another program takes its port in between."""


class Launch:
    """Brings the servers of a fleet up, and down again."""

    def __init__(self, fleet: Fleet, journal: Journal, cancelled: threading.Event) -> None:
        """Prepare; nothing is started.

        Args:
            fleet: the servers.
            journal: told of every change.
            cancelled: a start gives up when it is set; set when a server fails.
        """
        self._fleet = fleet
        self._journal = journal
        self._cancelled = cancelled
        self._ports = threading.Lock()

    def up(self) -> None:
        """Start every server; make data that is missing.

        Raises:
            LocalServerError: the first failure; other servers may be running.
        """
        self._together(
            [
                *(partial(self._physical, name) for name in self._fleet.options.physical_names),
                *(partial(self._bring_up, server) for server in self._fleet.caches),
            ]
        )

    def down(self) -> None:
        """Stop every server in good order.

        Replicas go first: a primary waits until they have everything, for a minute when one is
        stuck. PgBouncer goes before both, so that it does not log their end.

        Raises:
            LocalServerError: a process survives SIGKILL; the others are stopped all the same.
        """
        failure: LocalServerError | None = None
        for group in self._fleet.stop_order():
            try:
                self._together(partial(self._bring_down, server) for server in group)
            except LocalServerError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _physical(self, physical: str) -> None:
        members = self._fleet.members(physical)
        made = [server for server in members if self._journal.is_initialised(server)]
        primaries = [server for server in made if server.role is Role.PRIMARY]
        if made and not primaries:
            raise LocalServerError(
                f"{physical}: every server is a replica, none can be the primary",
                hint="remove standby.signal from the folder of the one that is to be it",
            )
        # Several after a failover: the newest timeline is the promoted one.
        primary = max(primaries, key=PostgresServer.timeline) if primaries else members[0]
        for server in members:
            server.primary = None if server is primary else primary
        is_new = primary not in made
        if is_new:
            primary.initialise()
        self._bring_up(primary)
        if is_new:
            primary.create_roles(self._fleet.passwords)
            self._journal.record(primary, is_initialised=True)
        usable = [server for server in made if server not in primaries]
        self._together(
            partial(self._replica, server, primary, is_usable=server in usable)
            for server in members
            if server is not primary
        )
        for pooler in self._fleet.poolers(physical):
            self._bring_up(pooler)

    def _replica(self, server: PostgresServer, primary: PostgresServer, *, is_usable: bool) -> None:
        if not is_usable:
            # New, or a former primary whose history ended at a failover.
            self._journal.record(server, is_initialised=False)
            server.clone(primary)
            self._journal.record(server, is_initialised=True)
        self._bring_up(server)

    def _bring_up(self, server: ServerProcess) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                server.launch()
                self._journal.record(server)
                server.wait_ready(self._cancelled)
            except LocalServerError:
                server.kill()
                is_last = attempt == _ATTEMPTS or self._cancelled.is_set()
                if is_last or ports.is_free(server.port):
                    raise
                with self._ports:
                    server.port = ports.choose(self._fleet.ports)
            else:
                break
        self._journal.record(server)
        self._journal.say(f"{server.name} is up on port {server.port}")

    def _bring_down(self, server: ServerProcess) -> None:
        server.stop()
        self._journal.record(server)
        self._journal.say(f"{server.name} is down")

    def _together(self, tasks: Iterable[Callable[[], None]]) -> None:
        """Run tasks in threads of their own and wait for all; the first failure is raised."""
        waiting = list(tasks)
        if not waiting:
            return
        failure: BaseException | None = None
        with ThreadPoolExecutor(len(waiting), thread_name_prefix="shardkit-local") as executor:
            futures = [executor.submit(task) for task in waiting]
            try:
                for future in futures:
                    failure = failure or future.exception()
                    if failure is not None:
                        self._cancelled.set()
            except BaseException:
                # Ctrl-C while waiting: the threads see it at their next poll.
                self._cancelled.set()
                raise
        if failure is not None:
            raise failure
