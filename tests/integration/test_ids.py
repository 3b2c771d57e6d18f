"""Ids from real servers: leases, `shardkit.next_id`, and both through one row."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy.util import greenlet_spawn

import shardkit
from shardkit import AsyncCluster, Cluster, deadline, ids
from shardkit.cli import main
from shardkit.clock import SYSTEM
from shardkit.errors import (
    ClockMovedBackError,
    EndpointUnavailableError,
    IdRequestError,
    UnavailableError,
)
from shardkit.ids import EPOCH_MS, MAX_AHEAD_MS, MAX_LEASE
from shardkit.testing import wait_until
from shardkit.topology import ShardMap, Topology
from tests.fixtures.site import Site

pytestmark = pytest.mark.integration

SHARD = 2
Mint = Callable[[psycopg.Connection[Any]], int]


@pytest.fixture
def ready(site: Site) -> Site:
    """A migrated database of its own."""
    assert site.apply().error is None
    return site


@pytest.fixture
def cluster(ready: Site) -> Iterator[Cluster]:
    """An open cluster over it."""
    with Cluster(ready.topology) as cluster:
        yield cluster


def next_id(connection: psycopg.Connection[Any], shard: int | None = SHARD) -> int:
    row = connection.execute("SELECT shardkit.next_id(%s::int)", (shard,)).fetchone()
    assert row is not None
    assert isinstance(row[0], int)
    return row[0]


def state(admin: psycopg.Connection[Any]) -> int:
    row = admin.execute("SELECT state FROM shard_0002.shardkit_id_state").fetchone()
    assert row is not None
    return int(row[0])


def set_state(site: Site, value: int) -> None:
    with site.admin("alpha") as admin:
        admin.execute("UPDATE shard_0002.shardkit_id_state SET state = %s", (value,))


def state_at(ahead: int) -> int:
    """Return the state of a moment, in milliseconds from now."""
    return (ms_now() + ahead) << 10


def ms_now() -> int:
    return SYSTEM.unix_ms() - EPOCH_MS


@contextmanager
def clock_moved(site: Site, ms: int) -> Iterator[None]:
    """Step the time that ids are made from, and nothing else."""
    with site.admin("alpha") as admin:
        row = admin.execute("SELECT pg_get_functiondef('shardkit.id_clock_ms'::regproc)").fetchone()
        assert row is not None
        try:
            admin.execute(
                "CREATE OR REPLACE FUNCTION shardkit.id_clock_ms() RETURNS bigint LANGUAGE sql AS "
                "'SELECT floor(pg_catalog.date_part(''epoch'', pg_catalog.clock_timestamp())"
                f" * 1000)::bigint - {EPOCH_MS} + {ms}'".encode()
            )
            yield
        finally:
            admin.execute(str(row[0]).encode())


def test_leases_and_sql_clients_share_one_ascending_row(ready: Site, cluster: Cluster) -> None:
    made: list[int] = []
    with ready.app("alpha") as connection:
        for _ in range(20):
            made.append(next_id(connection))
            lease = cluster.connections.lease_ids({SHARD: 5})[SHARD]
            made += ids.expand(lease, 5, SHARD)
    assert made == sorted(set(made))
    assert {ids.shard_of(new) for new in made} == {SHARD}
    assert abs(made[0] - ids.compose(ms_now(), SHARD, 0)) < ids.compose(60_000, 0, 0)


def test_a_column_default_mints(ready: Site, cluster: Cluster) -> None:
    with ready.admin("alpha") as admin:
        admin.execute("ALTER TABLE shard_0002.t ALTER a SET DEFAULT shardkit.next_id(2)")
    with ready.app("alpha") as connection:
        minted = connection.execute(
            "INSERT INTO shard_0002.t SELECT FROM generate_series(1, 5000) RETURNING a"
        ).fetchall()
    made = [a for (a,) in minted]
    assert len(made) == 5000
    assert made == sorted(set(made))
    assert cluster.connections.ids.mint({SHARD: 1})[SHARD][0] > made[-1]


def test_a_rollback_to_a_savepoint_takes_row_and_block_back_together(ready: Site) -> None:
    with ready.app("alpha") as connection:
        with connection.transaction():
            kept = [next_id(connection) for _ in range(4)]
            with connection.transaction(force_rollback=True):
                [next_id(connection) for _ in range(9)]
            kept += [next_id(connection) for _ in range(9)]
        kept.append(next_id(connection))
    assert kept == sorted(set(kept))


def test_a_lease_runs_ahead_of_the_clock_by_no_more_than_the_bound(cluster: Cluster) -> None:
    for _ in range(6):
        first = cluster.connections.lease_ids({SHARD: MAX_LEASE})[SHARD]
        assert (first + MAX_LEASE - 1) >> 10 < ms_now() + MAX_AHEAD_MS + 1


def test_more_ids_than_a_lease_holds_come_from_several(cluster: Cluster) -> None:
    made = cluster.connections.ids.mint({SHARD: 2 * MAX_LEASE + 7})[SHARD]
    assert len(made) == 2 * MAX_LEASE + 7
    assert made == sorted(set(made))


@pytest.mark.parametrize("step_ms", [-5_000, 5_000])
def test_a_stepped_clock_never_leads_back(ready: Site, cluster: Cluster, step_ms: int) -> None:
    before = cluster.connections.lease_ids({SHARD: 10})[SHARD]
    with clock_moved(ready, step_ms):
        if step_ms < 0:
            with pytest.raises(ClockMovedBackError, match=r"4\d\d\d ms too far behind") as caught:
                cluster.connections.lease_ids({SHARD: 10})
            assert caught.value.retryable
            with ready.app("alpha") as app, pytest.raises(psycopg.Error, match="too far behind"):
                next_id(app)
        else:
            assert cluster.connections.lease_ids({SHARD: 10})[SHARD] >> 10 > before >> 10
    if step_ms > 0:
        with pytest.raises(ClockMovedBackError):
            cluster.connections.lease_ids({SHARD: 10})


def test_a_short_step_back_is_waited_out(ready: Site, cluster: Cluster) -> None:
    before = cluster.connections.lease_ids({SHARD: 10})[SHARD]
    with clock_moved(ready, -300):
        assert cluster.connections.lease_ids({SHARD: 10})[SHARD] > before


def test_the_end_of_the_layout_is_an_error_and_no_negative_id(ready: Site) -> None:
    set_state(ready, (1 << 50) - 2)
    past_the_end = pytest.raises(psycopg.errors.NumericValueOutOfRange, match="end of the id")
    with clock_moved(ready, (1 << 40) - 1 - ms_now()), ready.app("alpha") as app, past_the_end:
        app.execute("SELECT shardkit.lease_ids('{2}', '{5}')")


@pytest.mark.parametrize("shard", [8, -1, 9999, 1 << 31])
def test_a_logical_shard_that_does_not_exist_is_refused(cluster: Cluster, shard: int) -> None:
    with pytest.raises(IdRequestError, match="0 to 7"):
        cluster.connections.ids.mint({shard: 1})


def test_a_server_that_does_not_hold_the_shard_says_so(ready: Site) -> None:
    swapped = ShardMap(tuple(reversed(ready.topology.shard_map.owners)), (1,) * 8)
    wrong = Topology(ready.topology.name, ready.topology.physical, swapped)
    with Cluster(wrong) as cluster:  # its map is what the servers say
        cluster.connections.ids.mint({SHARD: 1})
    with ready.app("alpha") as app:
        for shard in (7, 9999, -1, None):
            with pytest.raises(psycopg.Error, match="does not exist") as caught:
                next_id(app, shard)
            assert caught.value.sqlstate == "SK002"


@pytest.mark.parametrize("n", [0, -1, MAX_LEASE + 1, None])
def test_a_lease_of_a_wrong_length_is_refused_by_the_server(ready: Site, n: int | None) -> None:
    with ready.app("alpha") as app, pytest.raises(psycopg.errors.InvalidParameterValue):
        app.execute("SELECT shardkit.lease_ids('{2}', ARRAY[%s::int])", (n,))


def test_a_shard_that_is_not_active_gives_no_ids(ready: Site, cluster: Cluster) -> None:
    with ready.admin("alpha") as admin:
        admin.execute("UPDATE shardkit.ownership SET state = 'fenced' WHERE logical_shard = 2")
        with deadline(0.5), pytest.raises(UnavailableError, match="fenced") as caught:
            cluster.connections.ids.mint({SHARD: 1})
        assert caught.value.retryable


@pytest.mark.anyio
async def test_under_asyncio_a_lease_fails_with_the_same_errors(ready: Site) -> None:
    async with AsyncCluster(ready.topology) as cluster:
        mint = cluster.connections.ids.mint
        made = await greenlet_spawn(mint, {SHARD: 3})
        assert len(made[SHARD]) == 3
        set_state(ready, state_at(60_000))
        with pytest.raises(ClockMovedBackError):
            await greenlet_spawn(mint, {SHARD: 100})
        with ready.admin("alpha") as admin:
            admin.execute("UPDATE shardkit.ownership SET state = 'fenced' WHERE logical_shard = 1")
        with deadline(0.5), pytest.raises(UnavailableError, match="fenced"):
            await greenlet_spawn(mint, {1: 1})


def test_a_lease_that_waits_for_a_fence_is_refused_after_it(ready: Site, cluster: Cluster) -> None:
    failures: list[Exception] = []

    def lease() -> None:
        try:
            cluster.connections.lease_ids({SHARD: 1})
        except UnavailableError as error:
            failures.append(error)

    thread = threading.Thread(target=lease)
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND database = %s"
    with ready.admin("alpha") as admin, ready.admin("alpha") as watcher:
        database = watcher.execute(
            "SELECT oid FROM pg_database WHERE datname = current_database()"
        ).fetchone()
        with admin.transaction():
            admin.execute("LOCK TABLE shard_0002.shardkit_id_state IN ACCESS EXCLUSIVE MODE")
            thread.start()
            wait_until(lambda: watcher.execute(waiting, database).fetchone() == (1,), 5, "it waits")
            admin.execute("UPDATE shardkit.ownership SET state = 'fenced' WHERE logical_shard = 2")
        thread.join()
    assert [str(error.args[0]) for error in failures] == [
        "it is fenced: logical shard 2 is fenced on this server"
    ]


def test_an_open_transaction_holds_leases_up_for_a_bounded_time(
    ready: Site, cluster: Cluster
) -> None:
    with ready.app("alpha") as connection, connection.transaction():
        next_id(connection)
        with pytest.raises(UnavailableError, match="ids are locked") as caught:
            cluster.connections.ids.mint({SHARD: 1})
        assert caught.value.retryable
        assert cluster.connections.ids.mint({1: 1, 5: 1}), "other logical shards are free"


def test_the_application_role_may_mint_and_nothing_else(ready: Site) -> None:
    with ready.app("alpha") as app:
        for statement in (
            "SELECT shardkit.reserve_ids(2, 1)",
            "SELECT shardkit.id_clock_ms()",
            "SELECT state FROM shard_0002.shardkit_id_state FOR UPDATE",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                app.execute(statement.encode())


def test_a_lease_whose_answer_is_lost_is_not_given_again(ready: Site, cluster: Cluster) -> None:
    seen = cluster.connections.lease_ids({SHARD: 10})[SHARD]
    with ready.app("alpha") as lost, ready.admin("alpha") as admin:
        # It commits, and nobody ever reads the answer.
        lost.pgconn.send_query(b"SELECT shardkit.lease_ids('{2}', '{10}')")
        wait_until(lambda: state(admin) >= seen + 19, 5, "the lost lease commits")
        lost.close()
    assert cluster.connections.lease_ids({SHARD: 10})[SHARD] >= seen + 20


def test_a_connection_killed_during_a_lease_is_a_retryable_error(
    ready: Site, cluster: Cluster
) -> None:
    cluster.connections.ids.mint({SHARD: 1})
    with ready.admin("alpha") as admin, ready.app("alpha") as app, app.transaction():
        next_id(app)
        failures: list[Exception] = []

        def lease() -> None:
            try:
                cluster.connections.lease_ids({SHARD: 1})
            except EndpointUnavailableError as error:
                failures.append(error)

        thread = threading.Thread(target=lease)
        thread.start()
        waiting = (
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
            " AND application_name = 'shardkit lease' AND wait_event_type = 'Lock'"
        )
        wait_until(lambda: admin.execute(waiting).fetchone() is not None, 5, "the lease waits")
        admin.execute(f"SELECT pg_terminate_backend(pid) FROM ({waiting}) AS w".encode())
        thread.join()
    assert failures
    assert cluster.connections.lease_ids({SHARD: 1})


def test_the_command_mints_through_a_lease(ready: Site, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[object, str]:
        with pytest.raises(SystemExit) as caught:
            main(["ids", "mint", *arguments, "--config", str(ready.config)])
        captured = capsys.readouterr()
        return caught.value.code, captured.out or captured.err

    code, out = run("--logical-shard", "2", "--count", "3", "--json")
    assert code == 0
    answer = json.loads(out)
    assert answer["logical_shard"] == 2
    texts = answer["ids"]
    assert len(texts) == 3
    assert all(isinstance(text, str) and ids.shard_of(int(text)) == 2 for text in texts)
    code, out = run("--logical-shard", "2")
    assert code == 0
    assert int(out) > int(texts[-1])
    code, out = run("--logical-shard", "8")
    assert code == 2
    assert out.startswith("error: ")
    assert run("--logical-shard", "2", "--count", "0")[0] == 2


def test_a_revision_makes_next_id_the_default_on_every_logical_shard(ready: Site) -> None:
    guide = Path(shardkit.__file__).parent.parent.joinpath("docs/ids.md").read_text("utf-8")
    (default,) = re.findall(r"```sql\n(.*?)```", guide, re.DOTALL)
    assert "ALTER TABLE photos ALTER id" in default
    body = default.replace("ALTER TABLE photos ALTER id", "ALTER TABLE t ALTER a")
    ready.write("r2", f'op.execute("""{body}""")', "r1")
    assert ready.apply().error is None
    for physical, shard in (("alpha", 3), ("beta", 7)):
        with ready.app(physical) as app:
            row = app.execute(
                f"INSERT INTO shard_000{shard}.t DEFAULT VALUES RETURNING a".encode()
            ).fetchone()
        assert row is not None
        assert ids.shard_of(row[0]) == shard
