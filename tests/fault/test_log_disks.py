"""Row 9: the disk of the log is slow. That sheds load, and is no reason for a failover."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardkit import Cluster, deadline, ids
from shardkit.config import FailoverConfig, load
from shardkit.errors import OutcomeUnknownError, UnavailableError
from shardkit.ops.failover.hosts import NoHost
from shardkit.ops.failover.machine import Cut, Promote
from shardkit.testing import create_tables
from shardkit.writer import WriteSession
from tests.fixtures.disks import FailingDisk
from tests.fixtures.failing import QUICK, SHARDS, Site
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


def log_folder(site: Site) -> Path:
    return Path(site.ask(PRIMARY, "SHOW data_directory")) / "pg_wal"


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
