"""Rows 9 and 10: the disk of the log is full, fails, or is slow.

PostgreSQL stops when it cannot write or sync its log (PANIC), so that is a primary that is lost: a
replica takes over, and nothing acknowledged is lost. A slow one is no reason for that.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest

from shardkit import Cluster, deadline, ids
from shardkit.config import FailoverConfig, load
from shardkit.errors import LocalServerError, OutcomeUnknownError, UnavailableError
from shardkit.local import LocalHost, ServerStatus
from shardkit.local.settings import ADMIN_ROLE
from shardkit.ops.failover.hosts import NoHost
from shardkit.ops.failover.machine import Cut, Promote
from shardkit.testing import create_tables, wait_until
from shardkit.writer import WriteSession
from tests.fixtures.disks import FailingDisk, SmallDisk
from tests.fixtures.failing import PATIENCE, QUICK, SHARDS, Site, Writers, healed, kept
from tests.fixtures.lateness import in_time
from tests.fixtures.servers import lend, options
from tests.models import Base, User

pytestmark = [pytest.mark.integration, pytest.mark.fault, pytest.mark.slow]

PRIMARY = "alpha_0"
ROOM = 24 << 20
"""Bytes: more than one file of log, and less than two."""


@pytest.fixture
def site(
    postgres_version: str,  # noqa: ARG001  skips when there is none
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Site]:
    """A cluster of its own, whose servers sync what they write."""
    shape = options(physical=1, replicas=2, logical_shards=SHARDS, confirm=1, redis=False,
                    memcached=False, pgbouncer=False, fsync=True)  # fmt: skip
    with lend(tmp_path_factory.mktemp("logs") / "cluster", shape) as local:
        config, topology = load(local.config_path)
        create_tables(topology, Base.metadata)
        yield Site(local, config.model_copy(update={"failover": QUICK}), topology)


class OnlyReplicas(LocalHost):
    """A host that cannot make the server with the broken disk anew."""

    def rejoin(self, physical: str, server: str, primary: str, *, anew: bool = False) -> None:
        if self._named(physical, server) == PRIMARY:
            raise LocalServerError(f"{server}: its disk is broken")
        super().rejoin(physical, server, primary, anew=anew)


def log_folder(site: Site) -> Path:
    return Path(site.ask(PRIMARY, "SHOW data_directory")) / "pg_wal"


@contextmanager
def written(site: Site) -> Iterator[None]:
    """Have somebody write much log to the first primary for as long as it is one."""
    stop = threading.Event()

    def write() -> None:
        dsn = site.local.superuser_dsn(PRIMARY)
        while not stop.wait(0.05):
            with suppress(psycopg.Error), psycopg.connect(dsn, autocommit=True) as superuser:
                superuser.execute("SET synchronous_commit = local")
                while not stop.is_set():
                    superuser.execute(
                        "SELECT pg_logical_emit_message(false, 'much', repeat('x', 1 << 20), true)"
                    )

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def log_of(site: Site) -> str:
    return (site.local.config_path.parent / "logs" / f"{PRIMARY}.log").read_text(errors="replace")


def is_lost_and_replaced(site: Site, disk: SmallDisk | FailingDisk) -> Writers:
    """Break the disk under a primary that clients write to, and see that they go on elsewhere."""
    timeline = site.timeline()
    with (
        Cluster(site.topology, failover_wait=PATIENCE) as cluster,
        site.watched(OnlyReplicas(site.local)),
        Writers(cluster) as writers,
    ):
        disk.fail() if isinstance(disk, FailingDisk) else disk.fill()
        with written(site):
            wait_until(
                lambda: any(isinstance(a, Promote) for a in site.actions), PATIENCE, "it is lost"
            )
        writers.go_on(30)
    assert site.timeline() == timeline + 1
    assert site.primary() != PRIMARY
    kept(site, writers)
    return writers


def test_row_10_a_full_disk_of_the_log_is_a_lost_primary_that_comes_back(site: Site) -> None:
    folder = log_folder(site)
    site.local.stop_server(PRIMARY)
    with SmallDisk(folder, 4 * ROOM) as disk:
        site.local.start_server(PRIMARY)
        writers = is_lost_and_replaced(site, disk)
        assert "No space left on device" in log_of(site)
        disk.empty()
        # With room again the watcher makes it a standby: nobody has to help.
        healed(site)
        assert site.ask(PRIMARY, "SELECT pg_is_in_recovery()")
        kept(site, writers)
        site.local.stop_server(PRIMARY)


@pytest.mark.parametrize("helped", ["by a new file", "by a copy"])
def test_row_9_a_log_that_cannot_be_synced_is_a_lost_primary(site: Site, helped: str) -> None:
    """PostgreSQL never tries to sync again what the kernel may have forgotten.

    About every other time the second standby has the beginning of a record, and needs help.
    """
    if helped == "by a copy":
        site.ask(PRIMARY, f"REVOKE EXECUTE ON FUNCTION pg_switch_wal() FROM {ADMIN_ROLE}")
    folder = log_folder(site)
    site.local.stop_server(PRIMARY)
    with FailingDisk(folder, 4 * ROOM) as disk:
        site.local.start_server(PRIMARY)
        is_lost_and_replaced(site, disk)
        said = log_of(site)
        assert "PANIC:  could not fsync file" in said
        site.local.kill_server(PRIMARY)
        wait_until(
            lambda: site.local.server(PRIMARY).status is not ServerStatus.RUNNING, PATIENCE, "gone"
        )


def test_row_9_a_slow_disk_sheds_load_and_is_no_reason_for_a_failover(site: Site) -> None:
    folder = log_folder(site)
    site.local.stop_server(PRIMARY)
    patient = Site(
        site.local,
        site.config.model_copy(update={"failover": FailoverConfig()}),
        site.topology,
    )
    outcomes: list[BaseException | None] = []
    took: list[float] = []
    lock = threading.Lock()
    with FailingDisk(folder, 4 * ROOM) as disk:
        site.local.start_server(PRIMARY)
        stop = threading.Event()

        def stumble() -> None:
            while not stop.wait(0.05):
                disk.freeze()
                stop.wait(0.5)
                disk.thaw()

        def write(worker: int) -> None:
            for number in range(1, 9):
                user = ids.compose(number, worker % SHARDS, worker)

                def unit(session: WriteSession, user: int = user) -> None:
                    session.add(User(id=user, name=str(user)))

                found: BaseException | None = None
                began = time.monotonic()
                with in_time(3.0):
                    try:
                        with deadline(3.0):
                            cluster.run(unit)
                    except (UnavailableError, OutcomeUnknownError) as error:
                        found = error
                took.append(time.monotonic() - began)
                with lock:
                    outcomes.append(found)

        slow = threading.Thread(target=stumble)
        with (
            Cluster(site.topology, failover_wait=0.0, adaptive=True) as cluster,
            patient.watched(NoHost()),
        ):
            slow.start()
            workers = [threading.Thread(target=write, args=(n,)) for n in range(16)]
            for thread in workers:
                thread.start()
            for thread in workers:
                thread.join()
            stop.set()
            slow.join()
        assert len(outcomes) == 16 * 8, "nobody was late, and nobody met another error"
        assert outcomes.count(None) > 0
        assert max(took) > 0.3, "somebody has met the disk while it stood still"
        assert not any(isinstance(each, Cut | Promote) for each in patient.actions)
        assert site.primary() == PRIMARY
        assert len(site.names()) >= outcomes.count(None)
        site.local.kill_server(PRIMARY)
