"""Row 19: the last synchronous standby is lost. `strict` waits; `relaxed` goes on, and notes it.

One cluster of a primary and a standby for the file; each test begins with both well. The watcher is
driven step by step, so that no test waits for its pauses.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest

from shardkit import Cluster, deadline, ids
from shardkit.config import Config, DurabilityConfig, FailoverConfig, load
from shardkit.errors import OutcomeUnknownError
from shardkit.local import LocalCluster, LocalHost
from shardkit.ops.failover.driver import Driver
from shardkit.ops.failover.machine import Action, Promote, Rest
from shardkit.ops.failover.relaxing import Confirm, Relax, Restore
from shardkit.testing import create_tables, wait_until
from shardkit.topology import Topology
from shardkit.writer import WriteSession
from tests.fixtures.commands import shardkit
from tests.fixtures.servers import lend, options
from tests.models import Base, User

pytestmark = [pytest.mark.integration, pytest.mark.fault]

PATIENCE = 60.0
QUICK = FailoverConfig(every=0.0, patience=0.2, failures=2)
STRICT = DurabilityConfig(mode="sync")
RELAXED = DurabilityConfig(mode="sync", last_standby="relaxed", patience=0.5)
CONFIRMED = "ANY 1 (alpha_1)"


@dataclass(slots=True)
class Site:
    """A primary, alpha_0, and its standby, alpha_1."""

    local: LocalCluster
    config: Config
    topology: Topology
    numbers: Iterator[int]

    def ask(self, name: str, query: str) -> Any:
        with psycopg.connect(self.local.superuser_dsn(name), autocommit=True) as superuser:
            cursor = superuser.execute(query.encode())
            row = cursor.fetchone() if cursor.description else None
        return None if row is None else row[0]

    def setting(self, name: str = "alpha_0") -> str:
        return str(self.ask(name, "SHOW synchronous_standby_names"))

    def driver(self, durability: DurabilityConfig, **changes: Any) -> Driver:
        host = LocalHost(self.local, rejoins=False)
        return Driver(
            self.topology, "alpha", failover=QUICK, durability=durability, host=host, **changes
        )

    def add(self, cluster: Cluster, name: str) -> None:
        user = ids.compose(next(self.numbers), 0, 3)

        def unit(session: WriteSession) -> None:
            session.add(User(id=user, name=name))

        cluster.run(unit)

    def has(self, server: str, name: str) -> bool:
        where = f"shard_0000.users WHERE name = '{name}'"
        return bool(self.ask(server, f"SELECT count(*) FROM {where}"))

    def status(self) -> tuple[int | str, dict[str, Any]]:
        code, out, _ = shardkit("status", "--json", "--config", str(self.local.config_path))
        (found,) = json.loads(out)["durability"]
        return code, found

    def findings(self) -> set[str]:
        _, out, _ = shardkit("doctor", "--json", "--config", str(self.local.config_path))
        return {each["check"] for each in json.loads(out)["findings"]}


@pytest.fixture(scope="module")
def site(
    postgres_version: str,  # noqa: ARG001  skips when there is none
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Site]:
    shape = options(physical=1, replicas=1, logical_shards=2, confirm=1, redis=False,
                    memcached=False, pgbouncer=False)  # fmt: skip
    with lend(tmp_path_factory.mktemp("relaxed") / "cluster", shape) as local:
        config, topology = load(local.config_path)
        create_tables(topology, Base.metadata)
        yield Site(local, config, topology, iter(range(1, 10_000)))


@pytest.fixture
def cluster(site: Site) -> Iterator[Cluster]:
    with Cluster(site.topology, failover_wait=0.0) as made:
        yield made


def taken(driver: Driver, is_done: Callable[[Action], bool]) -> list[Action]:
    """Have a watcher take steps until one of them is the last; return all but the idle ones."""
    found: list[Action] = []

    def step() -> bool:
        found.append(driver.step(tends=True)[1])
        return is_done(found[-1])

    wait_until(step, PATIENCE, "the watcher has come so far")
    return [a for a in found if isinstance(a, Relax | Restore | Confirm | Promote)]


def test_strict_has_commits_wait_and_status_says_so(site: Site, cluster: Cluster) -> None:
    site.add(cluster, "before")
    code, found = site.status()
    assert (code, found["waits_for"], found["streaming"]) == (0, 1, ["alpha_1"])
    site.local.kill_server("alpha_1")
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    with closing(site.driver(STRICT)) as driver, ThreadPoolExecutor() as pool:

        def commit() -> None:
            with deadline(2.5):
                site.add(cluster, "waits")

        late = pool.submit(commit)
        wait_until(lambda: site.ask("alpha_0", waiting) == 1, PATIENCE, "it waits")
        for _ in range(5):
            driver.step(tends=True)
        code, found = site.status()
        assert (code, found["is_blocked"], found["is_relaxed"]) == (1, True, False)
        assert found["n_waiting"] == 1
        with pytest.raises(OutcomeUnknownError):
            late.result()
    assert site.setting() == CONFIRMED
    assert "sync-blocked" in site.findings()
    site.local.start_server("alpha_1")
    site.add(cluster, "after")  # on the connection whose wait was given up


def test_relaxed_goes_on_and_notes_from_when_until_when(site: Site, cluster: Cluster) -> None:
    site.local.kill_server("alpha_1")
    with closing(site.driver(RELAXED)) as driver:
        assert taken(driver, lambda a: isinstance(a, Relax)) == [
            Relax(driver.leader, 0, ("alpha_1",))
        ]
        site.add(cluster, "alone")
        code, found = site.status()
        (interval,) = found["intervals"]
        assert (code, found["is_relaxed"], interval["until"]) == (1, True, None)
        assert interval["missing"] == ["alpha_1"]
        assert {"sync-relaxed"} <= site.findings()
        assert "sync-missing" not in site.findings()
        site.local.start_server("alpha_1")
        steps = taken(driver, lambda a: isinstance(a, Confirm))
        assert [type(a) for a in steps] == [Restore, Confirm]
    assert site.setting() == CONFIRMED
    code, found = site.status()
    (interval,) = found["intervals"]
    assert (code, found["is_relaxed"]) == (0, False)
    assert interval["since"] < interval["until"]
    # The standby has all of it: it has confirmed the line that ends the interval.
    flushed = site.ask("alpha_1", "SELECT pg_last_wal_receive_lsn()::text")
    until = interval["until_position"]
    assert site.ask("alpha_1", f"SELECT '{flushed}'::pg_lsn >= '{until}'::pg_lsn")
    wait_until(lambda: site.has("alpha_1", "alone"), PATIENCE, "it is replayed")


class _KilledError(Exception):
    """The watcher ends here."""


def test_a_watcher_that_dies_in_between_leaves_no_setting_without_a_line(
    site: Site, cluster: Cluster
) -> None:
    site.local.kill_server("alpha_1")

    def hook(step: str) -> None:
        if step == "Relax noted":
            raise _KilledError

    with closing(site.driver(RELAXED, hook=hook)) as driver, pytest.raises(_KilledError):
        taken(driver, lambda a: isinstance(a, Relax))
    assert site.setting() == CONFIRMED
    assert site.status()[1]["is_relaxed"]
    with closing(site.driver(RELAXED)) as driver:
        taken(driver, lambda a: isinstance(a, Relax))
        site.add(cluster, "alone too")
    site.local.start_server("alpha_1")
    with closing(site.driver(STRICT)) as driver:  # the configuration was changed meanwhile
        taken(driver, lambda a: isinstance(a, Confirm))
    assert site.setting() == CONFIRMED
    assert not site.status()[1]["is_relaxed"]


def test_a_failover_within_says_what_may_be_lost(site: Site, cluster: Cluster) -> None:
    """The last one of the file: alpha_1 is the primary afterwards."""
    site.add(cluster, "kept")
    site.local.kill_server("alpha_1")
    with closing(site.driver(RELAXED)) as driver:
        taken(driver, lambda a: isinstance(a, Relax))
        site.add(cluster, "lost")
        site.local.kill_server("alpha_0")
        site.local.start_server("alpha_1")
        # The old primary comes back, as a standby that follows the new one.
        *_, promoted = taken(driver, lambda a: isinstance(a, Promote))
        assert isinstance(promoted, Promote)
        assert promoted.may_lose is not None
        assert "may be lost: no standby confirmed them" in promoted.may_lose
        wait_until(
            lambda: (
                bool(site.ask("alpha_1", "SELECT NOT pg_is_in_recovery()"))
                and driver.step(tends=True)[0].node(driver.leader).takes_writes
            ),
            PATIENCE,
            "it is registered",
        )
    assert site.has("alpha_1", "kept")
    assert not site.has("alpha_1", "lost")
    lost = "SELECT detail -> 'may_lose' ->> 'since' FROM shardkit.failovers WHERE kind = 'promoted'"
    assert site.ask("alpha_1", lost) is not None
    _, found = site.status()
    assert found["may_lose"]["since"] is not None
    assert "sync-lost" in site.findings()
    assert site.setting("alpha_1") == "ANY 1 (alpha_0)"
    site.local.rejoin_server("alpha_0", "alpha_1")
    following = Cluster(site.topology, failover_wait=PATIENCE)
    with closing(site.driver(RELAXED)) as driver, following:
        taken(driver, lambda a: isinstance(a, Rest))
        site.add(following, "afterwards")
        # As a server has it that was copied from one that was relaxed: a primary must not.
        site.ask("alpha_0", "ALTER SYSTEM SET synchronous_standby_names = ''")
        site.ask("alpha_0", "SELECT pg_reload_conf()")
        wait_until(lambda: site.setting("alpha_0") == "", PATIENCE, "it is set")
        site.local.kill_server("alpha_1")
        taken(driver, lambda a: isinstance(a, Promote))
        assert site.setting("alpha_0") == CONFIRMED
    assert site.has("alpha_0", "afterwards")
