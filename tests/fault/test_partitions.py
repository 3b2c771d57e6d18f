"""Rows 6, 7 and 8: links between clients, watcher, primary and replicas are cut, or flap.

One cluster for the file, with commits that a replica confirms. Clients and the watcher go through a
proxy before every server; whether replicas do, a test says.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from shardkit import Cluster, deadline, ids
from shardkit.config import FailoverConfig, load
from shardkit.errors import OutcomeUnknownError, UnavailableError
from shardkit.ops.failover.hosts import NoHost
from shardkit.ops.failover.machine import Cut, Promote, Wait
from shardkit.testing import FaultProxy, create_tables, reroute, wait_until
from shardkit.testing.faults import Way
from shardkit.writer import WriteSession
from tests.fixtures.failing import PATIENCE, SHARDS, Site, Writers
from tests.fixtures.lateness import over_in
from tests.fixtures.servers import lend, options
from tests.models import Base, User

pytestmark = [pytest.mark.integration, pytest.mark.fault]

PRIMARY = "alpha_0"
REPLICAS = ("alpha_1", "alpha_2")
EAGER = FailoverConfig(patience=0.0, failures=1, interval=0.1, timeout=0.5)
"""No hysteresis but the time between two failovers, which is 60 s."""


class Links:
    """A proxy before each server, by name."""

    def __init__(self, site: Site, proxies: dict[str, FaultProxy]) -> None:
        self.direct = site
        self._proxies = proxies
        shard = site.topology.physical["alpha"]
        names = dict(zip(shard.endpoints, (PRIMARY, *REPLICAS), strict=True))
        through = {each: proxies[name] for each, name in names.items()}
        topology = reroute(site.topology, through)
        admin = shard.admin_url.set(port=proxies[PRIMARY].port)
        led = replace(topology.physical["alpha"], admin_url=admin)
        self.site = Site(
            site.local,
            site.config.model_copy(update={"failover": EAGER}),
            replace(topology, physical={"alpha": led}),
        )

    def __getitem__(self, name: str) -> FaultProxy:
        return self._proxies[name]

    def heal(self) -> None:
        for proxy in self._proxies.values():
            proxy.heal()

    def follow(self, replica: str, port: int) -> None:
        """Have a replica reach its primary at a port, and wait until it does."""
        said: dict[str, Any] = conninfo_to_dict(self.direct.ask(replica, "SHOW primary_conninfo"))
        text = make_conninfo(**{**said, "port": port}).replace("'", "''")
        self.direct.ask(replica, f"ALTER SYSTEM SET primary_conninfo = '{text}'")
        self.direct.ask(replica, "SELECT pg_reload_conf()")
        wait_until(partial(self.streams, replica, port), PATIENCE, f"{replica} follows {port}")

    def streams(self, replica: str, port: int) -> bool:
        query = "SELECT sender_port FROM pg_stat_wal_receiver WHERE status = 'streaming'"
        return bool(self.direct.ask(replica, query) == port)


@pytest.fixture(scope="module")
def links(
    postgres_version: str,  # noqa: ARG001  skips when there is none
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Links]:
    shape = options(physical=1, replicas=2, logical_shards=SHARDS, confirm=1, redis=False,
                    memcached=False, pgbouncer=False)  # fmt: skip
    with (
        lend(tmp_path_factory.mktemp("partitions") / "cluster", shape) as local,
        ExitStack() as ends,
    ):
        config, topology = load(local.config_path)
        create_tables(topology, Base.metadata)
        proxies = {
            name: ends.enter_context(
                FaultProxy("127.0.0.1", local.server(name).port, protocol="tcp")
            )
            for name in (PRIMARY, *REPLICAS)
        }
        yield Links(Site(local, config, topology), proxies)


@pytest.mark.parametrize(
    "ways",
    [
        pytest.param((), id="both"),
        pytest.param((Way.TO_CLIENT,), id="answers", marks=pytest.mark.slow),
        pytest.param((Way.TO_SERVER,), id="questions", marks=pytest.mark.slow),
    ],
)
def test_rows_6_and_8_who_is_cut_off_alone_does_not_fail_over(
    links: Links, ways: tuple[Way, ...]
) -> None:
    """Clients and watcher lose the primary, in both directions or in one; its replicas do not."""
    site, timeline = links.site, links.direct.timeline()
    with (
        Cluster(site.topology, failover_wait=0.0) as cluster,
        site.watched(NoHost()),
    ):
        wait_until(lambda: "alpha" in site.latest, PATIENCE, "the watcher looks")
        add(cluster, "before")
        links[PRIMARY].black_hole(*ways)
        with deadline(1.0), over_in(1.0), pytest.raises((UnavailableError, OutcomeUnknownError)):
            add(cluster, "meanwhile")
        wait_until(
            lambda: "still reach" in getattr(site.latest["alpha"], "why", ""),
            PATIENCE,
            "the replicas say that they reach it",
        )
        links.heal()
        wait_until(partial(succeeds, cluster), PATIENCE, "clients write again")
    assert not any(isinstance(each, Cut | Promote) for each in site.actions)
    assert links.direct.timeline() == timeline
    assert links.direct.primary() == PRIMARY


def test_row_7_cut_off_replicas_leave_commits_unknown_and_nobody_fails_over(links: Links) -> None:
    """Connections of replicas are ended and refused: whatever address they are told to follow."""
    site, timeline = links.site, links.direct.timeline()
    with (
        Cluster(site.topology, failover_wait=0.0) as cluster,
        site.watched(NoHost()),
        refused_replication(links.direct),
    ):
        site.actions.clear()
        outcomes = []
        for n in range(3):
            with deadline(0.5), over_in(0.5), pytest.raises(OutcomeUnknownError) as caught:
                add(cluster, f"unconfirmed {n}")
            outcomes.append(caught.value)
        wait_until(lambda: len(site.actions) > 0, PATIENCE, "the watcher goes on looking")
        assert not any(isinstance(each, Cut | Promote) for each in site.actions)
    wait_until(
        lambda: all(links.streams(r, links[PRIMARY].server[1]) or
                    links.streams(r, links[PRIMARY].port) for r in REPLICAS),
        PATIENCE, "the replicas are back",
    )  # fmt: skip
    with Cluster(site.topology) as cluster:
        add(cluster, "after")
    assert links.direct.timeline() == timeline
    # What is unknown is the same everywhere.
    there = set(links.direct.names())
    assert {f"unconfirmed {n}" for n in range(3)} <= there, "the primary has them"
    count = "SELECT count(*) FROM shard_0001.users WHERE name LIKE 'unconfirmed%'"

    def has_all(replica: str) -> bool:
        return bool(links.direct.ask(replica, count) == 3)

    for replica in REPLICAS:
        wait_until(partial(has_all, replica), PATIENCE, "and so have its replicas")


@pytest.mark.slow
def test_row_8_a_link_that_loses_a_fifth_of_its_packets_is_no_reason(links: Links) -> None:
    """What is lost is sent again a moment later, and all that comes after it waits."""
    links[PRIMARY].shape(stumbles=0.2, stumble=0.25)
    site = replace(links.site, config=links.direct.config, latest={}, actions=[])
    try:
        with (
            Cluster(site.topology, failover_wait=PATIENCE) as cluster,
            site.watched(NoHost()),
            Writers(cluster) as writers,
        ):
            writers.go_on(40)
    finally:
        links.heal()
    assert site.actions
    assert not any(isinstance(each, Cut | Promote) for each in site.actions)
    assert not writers.failures


@pytest.mark.slow
def test_row_8_a_flapping_primary_is_replaced_once_a_minute_at_most(links: Links) -> None:
    """The last one of the file: another server is the primary afterwards, and the old one shut."""
    site, timeline = links.site, links.direct.timeline()
    for replica in REPLICAS:
        links.follow(replica, links[PRIMARY].port)
    with (
        Cluster(site.topology, failover_wait=PATIENCE) as cluster,
        site.watched(NoHost()),
        Writers(cluster) as writers,
    ):
        with flapping(links[PRIMARY]):
            wait_until(
                lambda: any(isinstance(a, Promote) for a in site.actions), PATIENCE, "it is lost"
            )
            wait_until(lambda: links.direct.timeline() > timeline, PATIENCE, "it is replaced")
        writers.go_on()
        leader = links.direct.primary()
        assert leader != PRIMARY
        with flapping(links[leader]) as flaps:
            wait_until(lambda: len(flaps) > 4, PATIENCE, "it has flapped for seconds")
            wait_until(
                lambda: any(isinstance(a, Wait) and "the last failover was only" in a.why
                            for a in site.actions),
                PATIENCE, "it would be replaced again",
            )  # fmt: skip
        links.heal()
        writers.go_on()
    assert sum(isinstance(each, Promote) for each in site.actions) == 1
    assert links.direct.timeline() == timeline + 1
    found = Counter(links.direct.names())
    assert {found[name] for name in writers.acknowledged} == {1}


_NUMBERS = itertools.count(1)


def add(cluster: Cluster, name: str) -> None:
    user = ids.compose(next(_NUMBERS), 1, 8)

    def unit(session: WriteSession) -> None:
        session.add(User(id=user, name=name))

    cluster.run(unit)


def succeeds(cluster: Cluster) -> bool:
    try:
        with deadline(2.0):
            add(cluster, "again")
    except (UnavailableError, OutcomeUnknownError):
        return False
    return True


@contextmanager
def refused_replication(site: Site) -> Iterator[None]:
    """End the connections of replicas to the primary, and let no new ones in."""
    rules = Path(site.ask(PRIMARY, "SHOW hba_file"))
    before = rules.read_text(encoding="utf-8")
    pids = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_replication"
    rules.write_text(f"host replication all all reject\n{before}", encoding="utf-8")
    try:
        site.ask(PRIMARY, "SELECT pg_reload_conf()")
        gone: Callable[[], bool] = lambda: site.ask(PRIMARY, pids) == 0  # noqa: E731
        wait_until(gone, PATIENCE, "no replica is connected")
        yield
    finally:
        rules.write_text(before, encoding="utf-8")
        site.ask(PRIMARY, "SELECT pg_reload_conf()")


@contextmanager
def flapping(proxy: FaultProxy) -> Iterator[list[int]]:
    """Have a server be there for half a second, and not for the next; yield how often it was not."""
    stop, flaps = threading.Event(), list[int]()

    def flap() -> None:
        while not stop.is_set():
            proxy.refuse()
            flaps.append(len(flaps))
            stop.wait(0.5)
            proxy.heal()
            stop.wait(0.5)

    thread = threading.Thread(target=flap)
    thread.start()
    try:
        yield flaps
    finally:
        stop.set()
        thread.join()
