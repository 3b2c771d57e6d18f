"""A primary is lost, and another server takes its place: nothing acknowledged is lost.

One cluster for the file, with commits that a replica confirms; each test begins with all servers
well and ends so. `SHARDKIT_FAILOVER_GRID=1` has a watcher killed at every step and not only at one
(`make failover-grid`).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import select

from shardkit import Cluster, deadline, ids
from shardkit.config import load
from shardkit.errors import (
    EndpointUnavailableError,
    LocalServerError,
    RefusedError,
    ShardkitError,
)
from shardkit.local import LocalCluster, LocalHost, ServerStatus
from shardkit.local.processes import send
from shardkit.local.settings import DATABASE
from shardkit.ops.failover import adopt, fail_over, watch
from shardkit.ops.failover.machine import Promote, Rejoin, Wait
from shardkit.testing import create_tables, wait_until
from shardkit.topology import Topology, libpq_options
from shardkit.writer import WriteSession
from tests.fixtures.failing import PATIENCE, QUICK, SHARDS, Site, Writers, healed, kept
from tests.fixtures.servers import lend, options
from tests.models import Base, User

pytestmark = [pytest.mark.integration, pytest.mark.fault]

STEPS = (
    "Claim", "Claim done", "Fence done", "Cut", "Cut done", "Promote", "Promote done", "Register",
    "Register done", "Repoint", "Repoint done", "Lead done",
)  # fmt: skip
GRID = STEPS if os.environ.get("SHARDKIT_FAILOVER_GRID") else ("Promote done",)


@pytest.fixture(scope="module")
def shared(
    postgres_version: str,  # noqa: ARG001  skips when there is none
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Site]:
    shape = options(physical=1, replicas=2, logical_shards=SHARDS, confirm=1, redis=False,
                    memcached=False, pgbouncer=False)  # fmt: skip
    with lend(tmp_path_factory.mktemp("failover") / "cluster", shape) as local:
        config, topology = load(local.config_path)
        create_tables(topology, Base.metadata)
        yield Site(local, config.model_copy(update={"failover": QUICK}), topology)


@pytest.fixture
def site(shared: Site) -> Site:
    """The cluster with every server well, and no users."""
    for n in range(3):
        shared.local.resume(f"alpha_{n}")
    healed(shared)
    shared.actions.clear()
    with psycopg.connect(
        shared.local.superuser_dsn(shared.primary()), autocommit=True
    ) as superuser:
        for n in range(SHARDS):
            superuser.execute(f"DELETE FROM shard_{n:04d}.users".encode())
    return shared


def test_a_killed_primary_is_replaced_and_clients_follow(site: Site) -> None:
    before, timeline = site.primary(), site.timeline()
    epoch = site.ask(before, "SELECT max(epoch) FROM shardkit.ownership")
    with (
        Cluster(site.topology, failover_wait=PATIENCE) as cluster,
        site.watched(),
        Writers(cluster) as writers,
    ):
        site.local.kill_server(before)
        writers.go_on(50)
        wait_until(site.is_well, PATIENCE, "every server is well")
        writers.go_on()
        assert cluster.topology.physical["alpha"].primary.url.port != (
            site.local.server(before).port
        )
    kept(site, writers)
    after = site.primary()
    assert after != before
    assert site.timeline() == timeline + 1
    assert site.ask(after, "SELECT min(epoch) FROM shardkit.ownership") == epoch + 1
    assert site.ask(before, "SELECT pg_is_in_recovery()"), "the old one is a standby"


class Stumbling(LocalHost):
    """A host that cannot make a standby of a server the first time."""

    stumbles = 0

    def rejoin(self, physical: str, server: str, primary: str, *, anew: bool = False) -> None:
        if not self.stumbles:
            self.stumbles += 1
            raise LocalServerError(f"{server}: no room")
        super().rejoin(physical, server, primary, anew=anew)


@pytest.mark.slow
def test_a_watcher_outlives_a_host_that_fails(site: Site) -> None:
    host, before = Stumbling(site.local), site.primary()
    with site.watched(host):
        site.local.kill_server(before)
        wait_until(lambda: bool(host.stumbles) and site.is_well(), PATIENCE, "every server is well")
    assert site.ask(before, "SELECT pg_is_in_recovery()"), "the old one is a standby all the same"


def test_a_replica_that_crashed_comes_back_as_it_is(site: Site) -> None:
    """pg_rewind would recover it as a primary, and so put a line of its own into its log."""
    primary = site.primary()
    replica = next(n for n in ("alpha_0", "alpha_1", "alpha_2") if n != primary)
    site.ask(primary, "SELECT pg_switch_wal()")
    site.local.kill_server(replica)
    mark = site.local.config_path.parent / "data" / replica / "mark"
    mark.touch()
    site.local.rejoin_server(replica, primary)
    streams = f"SELECT count(*) FROM pg_stat_replication WHERE application_name = '{replica}'"
    wait_until(lambda: site.ask(primary, streams) == 1, PATIENCE, "it follows")
    assert mark.exists(), "it was copied anew"
    mark.unlink()


def test_a_standby_survives_a_primary_that_dies_while_it_is_made_anew(site: Site) -> None:
    """It may have what nobody else has by then, and without it none could be promoted."""
    before = site.primary()
    standby = next(n for n in ("alpha_0", "alpha_1", "alpha_2") if n != before)
    mark = site.local.config_path.parent / "data" / standby / "mark"
    mark.touch()
    site.local.kill_server(before)
    with pytest.raises(LocalServerError, match="pg_rewind"):
        site.local.rejoin_server(standby, before)
    assert mark.exists(), "what it has is gone"
    assert site.ask(standby, "SELECT pg_is_in_recovery()"), "it is a standby, and runs"
    mark.unlink()
    outcome = fail_over(site.config, site.topology, "alpha", host=LocalHost(site.local))
    assert outcome.primary is not None
    assert site.is_well()


def test_an_old_primary_comes_back_without_its_slots(site: Site) -> None:
    """Nobody would drop them on a standby, and they hold the log back for ever."""
    before = site.primary()
    site.ask(before, "SELECT pg_create_logical_replication_slot('of_a_move', 'pgoutput')")
    with site.watched():
        site.local.kill_server(before)
        wait_until(
            lambda: any(isinstance(a, Rejoin) for a in site.actions) and site.is_well(),
            PATIENCE,
            "every server is well",
        )
    assert site.ask(before, "SELECT pg_is_in_recovery()")
    assert site.ask(before, "SELECT count(*) FROM pg_replication_slots") == 0


def test_a_standby_that_starts_or_is_promoted_has_no_slots_of_old_moves(site: Site) -> None:
    """It may have been the primary before, and stopped in good order; the next move is refused."""
    before = site.primary()
    standbys = [name for name in ("alpha_0", "alpha_1", "alpha_2") if name != before]
    slots = "SELECT count(*) FROM pg_replication_slots WHERE slot_name LIKE 'shardkit_move_%'"
    make = "SELECT pg_create_physical_replication_slot('shardkit_move_0003')"
    site.ask(standbys[0], make)
    site.local.stop_server(standbys[0])
    site.local.start_server(standbys[0])
    assert site.ask(standbys[0], slots) == 0
    for name in standbys:
        site.ask(name, make)
    with site.watched():
        site.local.kill_server(before)
        wait_until(
            lambda: any(isinstance(a, Rejoin) for a in site.actions) and site.is_well(),
            PATIENCE,
            "every server is well",
        )
    assert [site.ask(name, slots) for name in (before, *standbys)] == [0, 0, 0]


def test_who_writes_before_a_promotion_is_registered_does_not_delay_it(site: Site) -> None:
    """Its COMMIT waits for standbys, which follow only afterwards, and it holds its locks."""
    before, threads, held = site.primary(), [], threading.Event()

    def write(name: str) -> None:
        url = site.topology.physical["alpha"].admin_url.set(port=site.local.server(name).port)
        with psycopg.connect(**libpq_options(url), autocommit=True) as owner:
            owner.execute("SET statement_timeout = 0")
            owner.execute("BEGIN; UPDATE shardkit.ownership SET epoch = epoch")
            held.set()
            with suppress(psycopg.OperationalError):
                owner.execute("COMMIT")

    def hook(step: str) -> None:
        if step == "Promote done":
            name = next(
                s.name for s in site.local.servers
                if s.status is ServerStatus.RUNNING
                and not site.ask(s.name, "SELECT pg_is_in_recovery()")
            )  # fmt: skip
            threads.append(threading.Thread(target=write, args=(name,), daemon=True))
            threads[0].start()
            assert held.wait(PATIENCE)

    site.local.kill_server(before)
    fail_over(site.config, site.topology, "alpha", host=LocalHost(site.local), hook=hook)
    threads[0].join(PATIENCE)
    assert not threads[0].is_alive()


@pytest.mark.slow
def test_a_frozen_primary_that_thaws_after_a_promotion_acknowledges_nothing(site: Site) -> None:
    before = site.primary()
    old = site.topology.physical["alpha"]
    port = site.local.server(before).port
    url = next(e.url for e in old.endpoints if e.url.port == port)
    with Cluster(site.topology, failover_wait=PATIENCE) as cluster, Writers(cluster) as writers:
        held = psycopg.connect(autocommit=False, **libpq_options(url))
        held.execute(
            "INSERT INTO shard_0003.users (id, name) VALUES (%s, 'late')",
            [ids.compose(9, 3, 0)],
        )
        with site.watched(LocalHost(site.local, fences=False, rejoins=False)):
            site.local.pause(before)
            writers.go_on(30)
            site.local.resume(before)
            # Its sessions live on, and nobody confirms what they commit.
            outcome: list[BaseException | None] = []

            def commit() -> None:
                try:
                    held.commit()
                except psycopg.Error as error:
                    outcome.append(error)
                else:
                    outcome.append(None)

            late = threading.Thread(target=commit)
            late.start()
            # The watcher finds it, and shuts it out: which ends the session without an answer.
            late.join(PATIENCE)
            assert outcome
            assert outcome[0] is not None
            held.close()
            wait_until(
                lambda: site.ask(before, "SHOW default_transaction_read_only") == "on",
                PATIENCE, "the old primary is closed",
            )  # fmt: skip
            writers.go_on()
    site.local.end_server(before)
    kept(site, writers)
    assert "late" not in site.names()


@pytest.mark.slow
def test_a_stopped_postmaster_is_found_though_old_sessions_work(site: Site) -> None:
    before = site.primary()
    server = site.local._server(before)
    assert server.mark is not None
    with (
        Cluster(site.topology, failover_wait=PATIENCE) as cluster,
        site.watched(),
        Writers(cluster) as writers,
    ):
        send(server.mark, signal.SIGSTOP)
        wait_until(
            lambda: any(isinstance(a, Promote) for a in site.actions), PATIENCE, "a promotion"
        )
        wait_until(site.is_well, PATIENCE, "every server is well")
        writers.go_on()
    kept(site, writers)
    assert site.primary() != before


def test_an_old_primary_that_starts_again_takes_no_writes_of_clients(site: Site) -> None:
    before, timeline = site.primary(), site.timeline()
    with site.watched(LocalHost(site.local, fences=False, rejoins=False)):
        site.local.kill_server(before)
        wait_until(
            lambda: bool(site.primary()) and site.timeline() > timeline, PATIENCE, "another primary"
        )
        # Registered is not followed yet, and whoever looks on stops here.
        followed = "SELECT count(*) FROM pg_stat_replication"
        wait_until(lambda: site.ask(site.primary(), followed) == 1, PATIENCE, "it is followed")
    site.local.start_server(before)  # as its supervisor would: nobody has told it anything
    assert site.ask(before, "SELECT NOT pg_is_in_recovery()")
    # A process that starts now, from a configuration that was written before.
    shard = site.topology.physical["alpha"].led_by(
        f"127.0.0.1:{site.local.server(before).port}/{DATABASE}"
    )
    assert shard.primary.url.port == site.local.server(before).port
    stale = Topology(site.topology.name, {"alpha": shard}, site.topology.shard_map)
    with Cluster(stale, failover_wait=PATIENCE) as cluster, Writers(cluster) as writers:
        writers.go_on(20)
    kept(site, writers)
    site.local.end_server(before)


def test_a_short_absence_is_no_reason(site: Site) -> None:
    timeline = site.timeline()
    patient = site.config.model_copy(update={"failover": QUICK.model_copy(update={"patience": 30})})
    patient_site = Site(site.local, patient, site.topology)
    with (
        Cluster(site.topology, failover_wait=PATIENCE) as cluster,
        Writers(cluster) as writers,
        patient_site.watched(),
    ):
        name = site.primary()
        site.local.kill_server(name)
        site.local.start_server(name)
        writers.go_on(30)
    kept(site, writers)
    assert site.timeline() == timeline


def test_a_switchover_under_load_shows_nobody_an_error(site: Site) -> None:
    before, timeline = site.primary(), site.timeline()
    with Cluster(site.topology, failover_wait=PATIENCE) as cluster, Writers(cluster) as writers:
        done = fail_over(site.config, site.topology, "alpha", is_planned=True,
                         host=LocalHost(site.local))  # fmt: skip
        writers.go_on(30)
    kept(site, writers)
    assert site.timeline() == timeline + 1
    assert site.primary() != before
    assert done.primary.endswith(str(site.local.server(site.primary()).port))
    assert site.ask(before, "SELECT pg_is_in_recovery()")


def test_two_watchers_promote_once(site: Site) -> None:
    timeline = site.timeline()
    second = Site(site.local, site.config, site.topology)
    with (
        Cluster(site.topology, failover_wait=PATIENCE) as cluster,
        site.watched(LocalHost(site.local, rejoins=False)),
        second.watched(LocalHost(site.local, rejoins=False)),
        Writers(cluster) as writers,
    ):
        site.local.kill_server(site.primary())
        writers.go_on(30)
    kept(site, writers)
    assert site.timeline() == timeline + 1


class Slow(LocalHost):
    """A host that makes a standby when it is told to, and counts."""

    def __init__(self, local: LocalCluster) -> None:
        super().__init__(local)
        self.go_on = threading.Event()
        self.begun: list[str] = []

    def rejoin(self, physical: str, server: str, primary: str, *, anew: bool = False) -> None:
        self.begun.append(server)
        assert self.go_on.wait(PATIENCE)
        super().rejoin(physical, server, primary, anew=anew)


def test_two_watchers_make_one_standby_once(site: Site) -> None:
    """Two copies into one folder would be none."""
    second, host, before = (
        Site(site.local, site.config, site.topology),
        Slow(site.local),
        site.primary(),
    )
    at_work = f"another one is at work on 127.0.0.1:{site.local.server(before).port}"

    def is_told() -> bool:
        actions = [*site.actions, *second.actions]
        return any(isinstance(each, Wait) and each.why == at_work for each in actions)

    with site.watched(host), second.watched(host):
        site.local.kill_server(before)
        wait_until(is_told, PATIENCE, "the other watcher is told")
        host.go_on.set()
        wait_until(lambda: site.is_well() and second.is_well(), PATIENCE, "every server is well")
    assert len(host.begun) == 1
    assert site.ask(before, "SELECT pg_is_in_recovery()")


def test_a_promotion_by_somebody_else_counts_when_it_is_adopted(site: Site) -> None:
    before = site.primary()
    chosen = next(s.name for s in site.local.replicas("alpha"))
    with Cluster(site.topology, failover_wait=0.0) as cluster:
        write = partial(_add, cluster)
        write(1)
        site.local.kill_server(before)
        site.ask(chosen, "SELECT pg_promote()")
        with deadline(5.0), pytest.raises(EndpointUnavailableError):
            write(2)
        assert f"2-{2}" not in site.names()
        adopt(site.config, site.topology, "alpha", host=LocalHost(site.local))
        wait_until(partial(_succeeds, write, 3), PATIENCE, "clients follow")
        with cluster.reader() as session:
            user = ids.compose(1, 1, 8)
            assert session.scalars(select(User).where(User.id == user)).one().name == "2-1"


def test_a_living_primary_is_not_replaced_by_mistake(site: Site) -> None:
    with pytest.raises(RefusedError, match="answers"):
        fail_over(site.config, site.topology, "alpha", host=LocalHost(site.local))


def test_too_few_standbys_are_no_majority(site: Site) -> None:
    timeline, before = site.timeline(), site.primary()
    one, other = (s.name for s in site.local.replicas("alpha"))
    site.local.stop_server(other)
    site.local.kill_server(before)
    with pytest.raises(RefusedError, match="1 of 2 standbys"):
        fail_over(site.config, site.topology, "alpha", host=LocalHost(site.local))
    assert site.ask(one, "SELECT pg_is_in_recovery()")
    site.local.start_server(other)
    fail_over(site.config, site.topology, "alpha", host=LocalHost(site.local))
    assert site.timeline() == timeline + 1


@pytest.mark.parametrize("step", GRID)
def test_a_watcher_killed_at_a_step_leaves_the_rest_to_the_next(site: Site, step: str) -> None:
    timeline, before = site.timeline(), site.primary()
    with Cluster(site.topology, failover_wait=PATIENCE) as cluster, Writers(cluster) as writers:
        site.local.end_server(before) if step.startswith("Lead") else site.local.kill_server(before)
        child = _SPAWN.Process(target=_watch_until, args=(site.local.config_path, step))
        child.start()
        child.join(PATIENCE)
        assert child.exitcode == -signal.SIGKILL
        with site.watched():
            wait_until(site.is_well, PATIENCE, "every server is well")
            writers.go_on()
    kept(site, writers)
    assert site.timeline() == timeline + 1


_SPAWN = multiprocessing.get_context("spawn")


class _Led:
    """A host that has poolers to lead, and can do nothing else."""

    can_rejoin = False
    leads = True

    def fence(self, _physical: str, _server: str) -> bool:
        return False

    def rejoin(self, _physical: str, _server: str, _primary: str, *, anew: bool = False) -> None:
        """Never called."""

    def lead(self, _physical: str, _primary: str) -> None:
        """Nobody to lead."""


def _watch_until(file: Path, step: str) -> None:
    """Watch, in a process of its own, and be killed at a step."""
    config, topology = load(file)

    def hook(name: str) -> None:
        if name == step:
            os.kill(os.getpid(), signal.SIGKILL)

    watch(config.model_copy(update={"failover": QUICK}), topology, host=_Led(), hook=hook)


def _add(cluster: Cluster, number: int) -> None:
    def unit(session: WriteSession) -> None:
        session.add(User(id=ids.compose(number, 1, 8), name=f"2-{number}"))

    cluster.run(unit)


def _succeeds(write: Callable[[int], None], number: int) -> bool:
    try:
        with deadline(5.0):
            write(number)
    except ShardkitError:
        return False
    return True
