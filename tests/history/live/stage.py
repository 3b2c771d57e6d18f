"""Where a run happens: servers, the processes that use them, and the links that break.

The cluster is embedded: physical shards with replicas, a PgBouncer each, Memcached, Redis. Every
primary waits for one of its replicas at COMMIT. Clients and relays are processes of their own; the
last of each kind goes by links that break, all others go straight.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import psycopg

from shardkit.config import load
from shardkit.local import LocalCluster, LocalOptions
from shardkit.local.server import LocalServer, ServerKind, ServerStatus, log_tail
from shardkit.ops.ownershiptables import TIMELINE
from shardkit.testing import FaultProxy, create_tables, wait_until
from shardkit.topology import Role
from tests.fixtures.servers import lend, options
from tests.fixtures.sharded import admin
from tests.history.live.plan import Plan
from tests.history.live.tables import ACCOUNTS, OPENED, STAMP, Base, first_rows
from tests.history.recorder import Recorder

__all__ = ["Process", "Stage", "shape"]

_ROOT = Path(__file__).parents[3]
_END = 60.0
"""Seconds that a process may take to end what it has begun."""

_PATIENCE = 60
"""Seconds that a server has for a query of the harness, which waits for nobody for good."""


def shape(logical_shards: int = 4, replicas: int = 2, **changes: Any) -> LocalOptions:
    """Return the shape of the cluster."""
    settings = {
        # Servers that come back are to be followed at once, and dead ones noticed.
        "wal_retrieve_retry_interval": "100ms",
        "wal_receiver_timeout": "3s",
        "wal_sender_timeout": "3s",
        "max_connections": "150",
    }
    wanted = {"confirm": 1, "physical": 2, "settings": settings, **changes}
    return options(replicas=replicas, logical_shards=logical_shards, **wanted)


class Process:
    """A client or relay process.

    Attributes:
        name: of it, unique in the run.
        kind: `client` or `relay`.
        is_linked: whether it goes by the links that break.
    """

    def __init__(self, plan: Plan, kind: str, name: str, *, is_linked: bool) -> None:
        self.name = name
        self.kind = kind
        self.is_linked = is_linked
        module = "client" if kind == "client" else "relayer"
        command = [sys.executable, "-m", f"tests.history.live.{module}", str(plan.path), name]
        self._log = Path(plan.folder) / f"{name}.log"
        with self._log.open("wb") as log:
            self._child = subprocess.Popen(
                command + ["--linked"] * is_linked,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=_ROOT,
                env={**os.environ, "PYTHONPATH": str(_ROOT)},
            )

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._child.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._child.send_signal(number)

    def kill(self) -> None:
        """End it at once."""
        self._child.kill()
        self._child.communicate()

    def end(self) -> dict[str, Any]:
        """Have it end what it has begun; return what it says at the end."""
        self._child.send_signal(signal.SIGCONT)
        self._child.terminate()
        try:
            said, _ = self._child.communicate(timeout=_END)
        except subprocess.TimeoutExpired:
            self.kill()
            return {"errors": {f"{self.name} did not end": 1}}
        if self._child.returncode:
            text = self._log.read_text(errors="replace")[-2000:]
            return {"errors": {f"{self.name} ended with {self._child.returncode}: {text}": 1}}
        lines = said.decode().splitlines()
        return dict(json.loads(lines[-1])) if lines else {}


class Stage:
    """One run's servers and processes.

    Attributes:
        local: the servers.
        plan: of the run.
        topology: as the file says.
        recorder: of what happens to servers and processes.
        processes: that run, by name.
        links: that break, by the port they stand before.
        config: of the cluster; failovers may follow each other closely.
        errors: what clients were told, by text.
        lock: held while servers are started and stopped.
        lost: names of servers that are lost for good, until others have taken their places: no
            other fault heals them.
    """

    def __init__(self, local: LocalCluster, plan: Plan, stack: ExitStack) -> None:
        self.local = local
        config, self.topology = load(local.config_path)
        # Failovers follow each other more closely than in earnest, and are found out sooner.
        quick = {"failures": 2, "patience": 0.5, "interval": 0.2, "timeout": 0.7, "every": 0.0}
        failover = config.failover.model_copy(update=quick)
        self.config = config.model_copy(update={"failover": failover})
        self.links = self._linked(stack)
        ports = {str(port): link.port for port, link in self.links.items()}
        self.plan = replace(plan, config=str(local.config_path), ports=ports)
        self.recorder = Recorder(Path(plan.folder), "stage")
        self.processes: dict[str, Process] = {}
        self.errors: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.lost: set[str] = set()
        self._count: Counter[str] = Counter()

    @classmethod
    def open(cls, plan: Plan, directory: Path, stack: ExitStack, **shaped: Any) -> Self:
        """Start servers, make tables and first rows; have commits wait for a replica."""
        wanted = shape(logical_shards=plan.logical_shards, **shaped)
        local = stack.enter_context(lend(directory, wanted))
        stage = cls(local, plan, stack)
        stage._prepare()
        return stage

    def _linked(self, stack: ExitStack) -> dict[int, FaultProxy]:
        links = {}
        for server in self.local.servers:
            if server.name.startswith("pgbouncer"):
                links[server.port] = FaultProxy("127.0.0.1", server.port)
            elif server.name == "memcached":
                links[server.port] = FaultProxy("127.0.0.1", server.port, protocol="tcp")
        for link in links.values():
            stack.enter_context(link)
        return links

    def _prepare(self) -> None:
        create_tables(self.topology, Base.metadata)
        for name, physical in self.topology.physical.items():
            with self.superuser(name) as connection:
                connection.execute(STAMP.encode())
                # Once, before anybody writes: who owns nothing yet has no timeline either.
                found = connection.execute(f"SELECT {TIMELINE}".encode()).fetchone()
                assert found is not None, "a primary has a timeline"
            with admin(physical) as owner:
                owner.execute("SELECT 1")
        with Plan.cluster(self.plan) as cluster:
            for shard in range(self.plan.logical_shards):
                with cluster.writer() as session:
                    session.add_all(first_rows(shard, self.plan.n_lists))
                    session.commit()
        for shard in range(self.plan.logical_shards):
            accounts = {str(n): OPENED for n in range(ACCOUNTS)}
            self.recorder.fact("bank", bank=f"b{shard}", accounts=accounts)

    # -- servers

    def members(self, physical: str) -> list[LocalServer]:
        """Return the database servers of a physical shard, whatever they are now."""
        return [
            server
            for server in self.local.servers
            if server.physical == physical and server.kind is ServerKind.POSTGRESQL
        ]

    def primary(self, physical: str) -> LocalServer:
        """Return the present primary: of those that take writes, that of the newest timeline.

        Raises:
            psycopg.OperationalError: nobody is it now.
        """
        best: tuple[int, LocalServer] | None = None
        for server in self.members(physical):
            if server.role is not Role.PRIMARY:
                continue
            try:
                with self.superuser_of(server.name) as connection:
                    row = connection.execute(f"SELECT {TIMELINE}".encode()).fetchone()
            except psycopg.Error:
                continue
            if row is not None and (best is None or row[0] > best[0]):
                best = row[0], server
        if best is None:
            raise psycopg.OperationalError(f"{physical} has no primary now")
        return best[1]

    def replicas(self, physical: str) -> list[LocalServer]:
        """Return all but the present primary."""
        primary = self.primary(physical).name
        return [server for server in self.members(physical) if server.name != primary]

    def superuser(self, physical: str) -> psycopg.Connection[tuple[Any, ...]]:
        """Connect to the present primary of a physical shard."""
        return self.superuser_of(self.primary(physical).name)

    def superuser_of(self, server: str) -> psycopg.Connection[tuple[Any, ...]]:
        """Connect to a server."""
        return psycopg.connect(
            self.local.superuser_dsn(server),
            autocommit=True,
            connect_timeout=3,
            options=f"-c statement_timeout={_PATIENCE}s",
        )

    def check_servers(self, *, databases: bool = True) -> None:
        """See that every server runs, once all is healed.

        Args:
            databases: also those that a failover may be about to start.

        Raises:
            AssertionError: one does not; whatever needs it would wait in vain.
        """
        for server in self.local.servers:
            is_asked = databases or server.kind is not ServerKind.POSTGRESQL
            if is_asked and server.status is not ServerStatus.RUNNING:
                raise AssertionError(
                    f"{server.name} is {server.status} though all is healed; the end of its log:\n"
                    f"{log_tail(server.log)}"
                )

    def owners(self) -> dict[int, str]:
        """Return who owns each logical shard, as the servers say."""
        found: dict[int, tuple[int, bool, str]] = {}
        for name in self.topology.physical:
            with self.superuser(name) as connection:
                rows = connection.execute(
                    "SELECT logical_shard, epoch, state FROM shardkit.ownership"
                    " WHERE state <> 'importing'"
                ).fetchall()
            for shard, epoch, state in rows:
                claim = (epoch, state != "retired", name)
                found[shard] = max(found.get(shard, claim), claim)
        return {shard: name for shard, (_, _, name) in found.items()}

    def owner_of(self, shard: int) -> str:
        """Return who owns a logical shard, as soon as every server says something."""
        found: dict[int, str] = {}

        def asked() -> bool:
            try:
                found.update(self.owners())
            except psycopg.Error:
                return False
            return True

        wait_until(asked, 60.0, "every primary says what it owns")
        return found[shard]

    # -- processes

    def start(self, kind: str, *, is_linked: bool = False) -> Process:
        """Start a client or relay process."""
        self._count[kind] += 1
        # A number of at most three digits: clients make the values that they write of it.
        name = f"{kind}-{self._count[kind]}"
        process = self.processes[name] = Process(self.plan, kind, name, is_linked=is_linked)
        return process

    def of(self, kind: str) -> list[Process]:
        """Return the processes of a kind that run."""
        return [each for each in self.processes.values() if each.kind == kind]

    def killed(self, process: Process) -> None:
        """Kill a process, write down that this was meant, and start another in its place."""
        process.kill()
        del self.processes[process.name]
        for path in Path(self.plan.folder).glob(f"{process.name}.*.jsonl"):
            self.recorder.fact("killed", process=path.stem)
        self.start(process.kind, is_linked=process.is_linked)

    def begin(self, *, clients: int, relays: int = 1) -> None:
        """Start the processes, and wait until each has done something."""
        self.plan = replace(self.plan, began=time.monotonic())
        self.plan.write()
        for n in range(clients):
            self.start("client", is_linked=n == clients - 1)
        for _ in range(relays):
            self.start("relay")
        wait_until(lambda: all(map(self._works, self.of("client"))), 180.0, "clients work")

    def _works(self, process: Process) -> bool:
        assert process.is_alive, process.end()
        files = list(Path(self.plan.folder).glob(f"{process.name}.*.jsonl"))
        return bool(files) and all(b'"ok"' in path.read_bytes() for path in files)

    def end(self, kind: str) -> None:
        """End the processes of a kind, and note what they were told."""
        for process in self.of(kind):
            self.errors.update(process.end().get("errors", {}))
            del self.processes[process.name]

    def end_at_once(self) -> None:
        """End whatever still runs."""
        for process in self.processes.values():
            process.kill()
        self.processes.clear()

    # -- facts

    def note(self, text: str) -> None:
        """Write a line into the journal of the run, for those who look for a cause."""
        line = f"{time.monotonic() - self.plan.began:9.3f} {text}\n"
        with (Path(self.plan.folder) / "stage.log").open("a", encoding="utf-8") as journal:
            journal.write(line)

    def fault(self, name: str, began: int) -> None:
        """Write down a fault that is healed now."""
        now = time.monotonic_ns()
        self.recorder.fact("fault", name=name, began=began, healed=now)
        self.note(f"healed after {(now - began) / 1e9:.3f} s: {name}")


def described(errors: Mapping[str, int], most: int = 10) -> list[str]:
    """Return what clients were told most often."""
    return [f"{n:6,}  {text}" for text, n in Counter(errors).most_common(most)]
