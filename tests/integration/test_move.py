"""`shardkit.ops.moves` on real servers: whole moves under load, ways back, refusals, giving up."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from shardkit import AsyncCluster
from shardkit.errors import (
    EndpointUnavailableError,
    InvalidShardKeyError,
    MoveError,
    RefusedError,
    ShardkitError,
    TryAgainError,
)
from shardkit.local.account import server_account
from shardkit.ops import moves
from shardkit.ops.moves import driver, entries
from shardkit.ops.moves.machine import FORWARD, Goal, Step
from shardkit.ops.moves.replication import subscribe
from shardkit.ops.moves.transitions import Move
from shardkit.testing import wait_until
from shardkit.topology import schema_name
from tests.fixtures.clients import Clients, busy, new_id, new_user
from tests.fixtures.folders import in_reach
from tests.fixtures.moved import POOL, SCRIPT, Servers
from tests.fixtures.servers import lend, options
from tests.models import Photo, User

pytestmark = pytest.mark.integration


class StoppedError(Exception):
    """A mover has died, as far as this process can."""


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, postgres_version: str) -> Iterator[Servers]:  # noqa: ARG001
    shape = options(replicas=0, logical_shards=8, redis=False, pgbouncer=False)
    with lend(tmp_path_factory.mktemp("move") / "cluster", shape) as local:
        yield Servers(local)


def stops_at(name: str) -> Callable[[str], None]:
    """Return a hook that ends the mover where it has written something down."""

    def hook(reached: str) -> None:
        if reached == name:
            raise StoppedError(name)

    return hook


@pytest.mark.slow
def test_under_load_nothing_is_lost_repeated_or_stale_there_and_back(servers: Servers) -> None:
    with (
        servers.cluster(cache=servers.cache) as cluster,
        servers.cluster(cache=servers.cache) as reading,
    ):
        clients = Clients(cluster, reading, 0)
        with clients.relay:
            with busy(*clients.work):
                clients.go_on()
                assert servers.move(0).is_moved
                assert servers.owner(0) == "beta"
                clients.go_on()
                assert moves.verify(servers.topology, 0).is_clean
                for home in ("alpha", "beta"):
                    assert moves.rollback(servers.topology, 0).is_moved
                    assert servers.owner(0) == home
                    clients.go_on()
                assert moves.clean(servers.topology, 0).goal is Goal.CLEAN
                clients.go_on()
            emitted = set(clients.acknowledged)
            wait_until(lambda: emitted <= set(clients.delivered), 60.0, "events are delivered")
    assert not clients.wrong
    rows = servers.fetch(0, f"SELECT caption FROM {{}}.photos WHERE owner_id = {clients.owner}")
    assert Counter(text for (text,) in rows) == Counter(clients.acknowledged)
    assert len(set(clients.minted)) == len(clients.minted)
    again = sum(n - 1 for n in Counter(clients.delivered).values())
    assert again <= 3 * clients.relay.batch
    assert not servers.leftovers()
    [(last,)] = servers.fetch(0, "SELECT last_value FROM {}.version_seq")
    assert last > len(clients.versions), "numbers go on after those that were given away"


# Every step: `make move-grid`.
@pytest.mark.parametrize("step", ["claim done", *(f"{step} begun" for step in FORWARD[2:11:2])])
def test_a_move_is_given_up_wherever_it_stopped(servers: Servers, step: str) -> None:
    source = servers.owner(1)
    with servers.cluster() as cluster:
        owner = new_user(cluster, 1)
        with pytest.raises(StoppedError):
            servers.move(1, hook=stops_at(step))
        [known] = moves.status(servers.topology)[0]
        assert (known.logical_shard, known.source) == (1, source)
        with pytest.raises(RefusedError, match="is being moved"):
            servers.move(1)
        cluster.run(lambda session: session.add(Photo(owner_id=owner, caption=step)))
        outcome = moves.abort(servers.topology, 1)
        cluster.run(lambda session: session.add(Photo(owner_id=owner, caption=step)))
    assert not outcome.is_moved
    assert servers.owner(1) == source
    assert not servers.leftovers()


@pytest.mark.parametrize("step", ["fence done", "decide done", "activate done", "check done"])
def test_a_mover_that_stops_in_the_fence_is_brought_to_an_end(servers: Servers, step: str) -> None:
    source = servers.owner(2)
    with servers.cluster() as cluster:
        owner = new_user(cluster, 2)
        with pytest.raises(StoppedError):
            servers.move(2, hook=stops_at(step))
        outcome = moves.resume(servers.topology, 2, script=SCRIPT)
        assert outcome.is_moved
        cluster.run(lambda session: session.add(Photo(owner_id=owner, caption="on")))
    assert servers.owner(2) != source
    with pytest.raises(RefusedError, match="was moved"):
        servers.move(2)
    with pytest.raises(RefusedError, match="is over"):
        moves.abort(servers.topology, 2)
    moves.clean(servers.topology, 2)
    with pytest.raises(RefusedError, match="not being moved"):
        moves.rollback(servers.topology, 2)
    assert not servers.leftovers()


def test_what_was_decided_cannot_be_given_up_and_is_brought_to_its_end(servers: Servers) -> None:
    with pytest.raises(StoppedError):
        servers.move(3, hook=stops_at("decide done"))
    outcome = moves.abort(servers.topology, 3)
    assert outcome.is_moved
    moves.resume(servers.topology, 3, script=SCRIPT)
    moves.clean(servers.topology, 3)
    assert not servers.leftovers()


def test_a_way_back_that_stops_is_resumed_or_given_up(servers: Servers) -> None:
    home = servers.owner(3)
    servers.move(3)
    for step in ("begin done", "fence done"):
        with pytest.raises(StoppedError):
            moves.rollback(servers.topology, 3, options=moves.Options(hook=stops_at(step)))
        assert moves.resume(servers.topology, 3, script=SCRIPT).is_moved
    assert servers.owner(3) == home
    with pytest.raises(StoppedError):
        moves.rollback(servers.topology, 3, options=moves.Options(hook=stops_at("verify done")))
    moves.abort(servers.topology, 3)
    assert servers.owner(3) == home
    assert not servers.leftovers()


def refused(servers: Servers, match: str, shard: int = 4, **options: Any) -> RefusedError:
    with pytest.raises(RefusedError, match=match) as error:
        servers.move(shard, **options)
    assert error.value.hint
    assert not servers.leftovers()
    return error.value


def test_what_cannot_be_moved_is_refused_before_anything_changes(servers: Servers) -> None:
    topology = servers.topology
    with pytest.raises(InvalidShardKeyError, match="no logical shard 99"):
        moves.move(topology, 99, "beta", script=SCRIPT)
    with pytest.raises(RefusedError, match="no physical shard 'omega'"):
        moves.move(topology, 4, "omega", script=SCRIPT)
    with pytest.raises(RefusedError, match="on beta already"):
        moves.move(topology, 4, "beta", script=SCRIPT)
    refused(servers, "bytes free", free_bytes=1000)
    with servers.admin("beta") as owner:
        owner.execute("CREATE TABLE shard_0004.keyless (n integer)")
        try:
            refused(servers, "keyless has no primary key")
            owner.execute("DROP TABLE shard_0004.keyless")
            owner.execute("CREATE UNLOGGED TABLE shard_0004.keyless (n integer PRIMARY KEY)")
            refused(servers, "keyless is unlogged")
        finally:
            owner.execute("DROP TABLE shard_0004.keyless")
    with servers.admin("alpha") as owner:
        owner.execute("CREATE SCHEMA shard_0004")
        try:
            refused(servers, "shard_0004 exists on alpha")
        finally:
            owner.execute("DROP SCHEMA shard_0004")


def test_transactions_in_the_way_are_named(servers: Servers) -> None:
    with servers.admin("beta") as other:
        other.execute("BEGIN")
        other.execute("UPDATE shardkit.identity SET one = one")
        found = refused(servers, "writing for too long", long=0.0)
        assert str(other.info.backend_pid) in found.message
        other.execute("ROLLBACK")
        other.execute("BEGIN")
        other.execute("UPDATE shardkit.identity SET one = one")
        other.execute("PREPARE TRANSACTION 'forgotten'")
        try:
            with pytest.raises(RefusedError, match="forgotten of shardkit_admin"):
                servers.move(4)
        finally:
            other.execute("ROLLBACK PREPARED 'forgotten'")
    assert not servers.leftovers()


def test_a_wildcard_of_standbys_is_refused(servers: Servers) -> None:
    with psycopg.connect(
        servers.local.superuser_dsn(servers.local.primary("beta").name), autocommit=True
    ) as superuser:
        superuser.execute("ALTER SYSTEM SET synchronous_standby_names = 'ANY 1 (*)'")
        superuser.execute("SET synchronous_commit = off")
        try:
            superuser.execute("SELECT pg_reload_conf()")
            with servers.admin("beta") as asked:
                wait_until(
                    lambda: (
                        asked.execute("SHOW synchronous_standby_names").fetchone() == ("ANY 1 (*)",)
                    ),
                    20.0,
                    "the setting is read",
                )
            found = refused(servers, "counts? as a standby")
            assert "name the standbys" in str(found.hint)
        finally:
            superuser.execute("ALTER SYSTEM RESET synchronous_standby_names")
            superuser.execute("SELECT pg_reload_conf()")


def test_a_slot_without_a_cap_is_refused(servers: Servers) -> None:
    """The copy of a dead mover would fill the disk of its source."""
    unlimited = "SELECT current_setting('max_slot_wal_keep_size') = '-1'"
    with psycopg.connect(
        servers.local.superuser_dsn(servers.local.primary("alpha").name), autocommit=True
    ) as superuser:
        superuser.execute("ALTER SYSTEM SET max_slot_wal_keep_size = -1")
        try:
            superuser.execute("SELECT pg_reload_conf()")
            with servers.admin("alpha") as asked:
                wait_until(
                    lambda: asked.execute(unlimited).fetchone() == (True,),
                    20.0,
                    "the setting is read",
                )
            refused(servers, "max_slot_wal_keep_size")
        finally:
            superuser.execute("ALTER SYSTEM RESET max_slot_wal_keep_size")
            superuser.execute("SELECT pg_reload_conf()")


def test_of_two_movers_one_is_refused(servers: Servers) -> None:
    errors: list[ShardkitError] = []

    def second(name: str) -> None:
        if name == "copy done":
            begins: list[Callable[[], object]] = [
                lambda: servers.move(5),
                lambda: moves.resume(servers.topology, 5, script=SCRIPT),
                lambda: moves.abort(servers.topology, 5),
            ]
            for begin in begins:
                with pytest.raises(RefusedError) as caught:
                    begin()
                errors.append(caught.value)

    assert servers.move(5, hook=second).is_moved
    assert "is being moved" in errors[0].message
    assert all("another mover is at work" in error.message for error in errors[1:])
    moves.clean(servers.topology, 5)
    assert not servers.leftovers()


def test_ddl_in_the_middle_is_found_and_the_move_given_up(servers: Servers) -> None:
    source = servers.owner(5)

    def alter(name: str) -> None:
        if name == "follow done":
            with servers.admin(source) as owner:
                owner.execute("ALTER TABLE shard_0005.photos ADD COLUMN extra text")

    try:
        with pytest.raises(MoveError, match="extra"):
            servers.move(5, hook=alter)
    finally:
        with servers.admin(source) as owner:
            owner.execute("ALTER TABLE shard_0005.photos DROP COLUMN extra")
    assert servers.owner(5) == source
    assert not servers.leftovers()


def test_an_apply_that_meets_a_strange_row_is_found_and_given_up(servers: Servers) -> None:
    with servers.cluster() as cluster:
        taken = new_id(5)
        other = servers.other(5)

        def disturb(name: str) -> None:
            if name == "copy done":
                with servers.admin(other) as there:
                    there.execute(
                        "INSERT INTO shard_0005.users (id, name) VALUES (%s, 'strange')", (taken,)
                    )
                cluster.run(lambda session: session.add(User(id=taken, name="real")))

        with pytest.raises(MoveError, match="cannot apply"):
            servers.move(5, hook=disturb)
        assert servers.fetch(5, f"SELECT name FROM {{}}.users WHERE id = {taken}") == [("real",)]
    assert not servers.leftovers()


def test_a_copy_that_differs_is_not_handed_over(servers: Servers) -> None:
    with servers.cluster() as cluster:
        owner = new_user(cluster, 5)
        other = servers.other(5)

        def disturb(name: str) -> None:
            if name == "follow done":
                with servers.admin(other) as there:
                    there.execute(
                        "UPDATE shard_0005.users SET name = 'wrong' WHERE id = %s", (owner,)
                    )

        with pytest.raises(MoveError, match=f"1 rows differ .users .*{owner}"):
            servers.move(5, hook=disturb)
    assert servers.other(5) == other
    assert not servers.leftovers()


def test_a_writer_that_stays_is_named_when_no_fence_is_had(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardkit.ops.moves.machine.MAX_FENCES", 2)
    with servers.cluster() as cluster, servers.admin(servers.owner(5)) as stays:
        owner = new_user(cluster, 5)

        def hold(name: str) -> None:
            if name == "prepare back done":
                stays.execute("BEGIN")
                stays.execute("UPDATE shard_0005.users SET name = 'held' WHERE id = %s", (owner,))

        with pytest.raises(
            MoveError, match=f"process {stays.info.backend_pid} .*SET name = 'held'"
        ):
            servers.move(5, hook=hold, lock_timeout=0.05)
        stays.execute("ROLLBACK")
    assert not servers.leftovers()


def test_many_are_moved_in_a_batch_and_one_that_fails_stops_no_other(servers: Servers) -> None:
    wanted = [(6, servers.other(6)), (7, servers.other(7)), (4, servers.owner(4))]
    found = moves.move_many(
        servers.topology, wanted, script=SCRIPT, at_once=3, per_server=2, cleans=True
    )
    assert {n: isinstance(each, moves.Outcome) and each.is_moved for n, each in found.items()} == {
        6: True,
        7: True,
        4: False,
    }
    assert "already" in str(found[4])
    assert [servers.owner(n) for n, _ in wanted] == [to for _, to in wanted]
    assert not servers.leftovers()


def test_a_mover_that_is_told_to_stop_can_be_resumed(servers: Servers) -> None:
    stop = threading.Event()

    def reported(report: moves.Report) -> None:
        if report.step == Step.COPY and report.done:
            stop.set()

    with pytest.raises(TryAgainError, match="as it was told"):
        servers.move(6, on_report=reported, stop=stop)
    assert moves.resume(servers.topology, 6, script=SCRIPT).is_moved
    moves.clean(servers.topology, 6)
    assert not servers.leftovers()


def test_ctrl_c_in_the_fence_gives_the_writes_back(servers: Servers) -> None:
    def interrupt(name: str) -> None:
        if name == "drain done":
            raise KeyboardInterrupt

    home = servers.owner(6)
    with pytest.raises(KeyboardInterrupt):
        servers.move(6, hook=interrupt)
    assert servers.owner(6) == home, "active, and not fenced"
    moves.abort(servers.topology, 6)
    assert not servers.leftovers()


def test_a_source_that_stays_away_is_waited_for_and_no_longer(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking whether it is back, the mover once waited for it anew each time, a level deeper."""
    monkeypatch.setattr(driver, "_PATIENCE", 1.0)
    source = servers.local.primary(servers.owner(6)).name

    def lose(name: str) -> None:
        if name == "follow done":
            servers.local.kill_server(source)

    with pytest.raises(EndpointUnavailableError):
        servers.move(6, hook=lose)
    servers.local.start_server(source)
    assert moves.resume(servers.topology, 6, script=SCRIPT).is_moved
    moves.clean(servers.topology, 6)
    assert not servers.leftovers()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a small disk")
def test_a_disk_that_fills_up_ends_the_move_and_nothing_else(
    servers: Servers, tmp_path: Path
) -> None:
    home, other = servers.owner(6), servers.other(6)
    disk = in_reach(tmp_path / "disk")
    disk.mkdir()
    account = server_account()
    command = [
        "mount",
        "-t",
        "tmpfs",
        "-o",
        f"size=4m,mode=700,uid={account.uid}",
        "none",
        str(disk),
    ]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("this machine mounts nothing")
    dsn = servers.local.superuser_dsn(servers.local.primary(other).name)
    with servers.cluster() as cluster, psycopg.connect(dsn, autocommit=True) as superuser:
        try:
            superuser.execute(f"CREATE TABLESPACE small LOCATION '{disk}'".encode())
            superuser.execute("GRANT CREATE ON TABLESPACE small TO shardkit_admin")
            superuser.execute("ALTER ROLE shardkit_admin SET default_tablespace = 'small'")
            owner = new_user(cluster, 6)
            with servers.admin(home) as source:
                source.execute(
                    "INSERT INTO shard_0006.photos (id, owner_id, caption) SELECT n, %s, "
                    "repeat(md5(n::text), 30) FROM generate_series(1, 5000) AS n",
                    (owner,),
                )
            with pytest.raises(MoveError, match="No space left") as error:
                servers.move(6)
            assert error.value.hint == "make room on the target"
            assert servers.owner(6) == home
            assert not servers.leftovers()
        finally:
            superuser.execute("ALTER ROLE shardkit_admin RESET default_tablespace")
            superuser.execute("DROP TABLESPACE small")
            subprocess.run(["umount", str(disk)], check=True)
    with servers.admin(home) as source:
        source.execute("DELETE FROM shard_0006.photos WHERE id <= 5000")


def test_a_held_move_waits_ready_until_it_is_resumed(servers: Servers) -> None:
    source = servers.owner(6)
    with servers.cluster() as cluster:
        held = servers.move(6, is_held=True)
        assert not held.is_moved
        owner = new_user(cluster, 6)
        diff = moves.verify(servers.topology, 6)
        assert diff.is_clean
        assert Step.CHECK not in moves.status(servers.topology)[0][0].journal.done(Goal.MOVE)
        done = moves.resume(servers.topology, 6, script=SCRIPT)
        assert done.is_moved
        assert servers.owner(6) != source
        assert servers.fetch(6, f"SELECT name FROM {{}}.users WHERE id = {owner}") == [("owner",)]
    moves.clean(servers.topology, 6)


def test_a_source_that_is_switched_over_is_met_with_an_error_to_try_again(servers: Servers) -> None:
    """As before a planned failover: it takes no writes for a while."""
    assert not servers.move(6, is_held=True).is_moved
    dsn = servers.local.superuser_dsn(servers.local.primary(servers.owner(6)).name)
    with psycopg.connect(dsn, autocommit=True) as superuser:
        superuser.execute("SET default_transaction_read_only = off")
        try:
            superuser.execute("ALTER SYSTEM SET default_transaction_read_only = on")
            superuser.execute("SELECT pg_reload_conf()")
            with pytest.raises(TryAgainError, match="read-only"):
                wait_until(
                    lambda: moves.resume(servers.topology, 6, script=SCRIPT).is_moved,
                    30.0,
                    "reload",
                )
        finally:
            superuser.execute("ALTER SYSTEM RESET default_transaction_read_only")
            superuser.execute("SELECT pg_reload_conf()")
    moves.abort(servers.topology, 6)
    assert not servers.leftovers()


def test_rights_triggers_and_comments_go_with_it(servers: Servers) -> None:
    schema = schema_name(7)
    with servers.admin(servers.owner(7)) as owner:
        owner.execute(f"COMMENT ON COLUMN {schema}.users.name IS 'how people call them'".encode())
        owner.execute(f"GRANT SELECT (name) ON {schema}.users TO shardkit_replication".encode())
    with pytest.raises(MoveError, match="differ"):
        servers.move(7)
    with servers.admin(servers.owner(7)) as owner:
        owner.execute(f"REVOKE SELECT (name) ON {schema}.users FROM shardkit_replication".encode())
        owner.execute(f"COMMENT ON COLUMN {schema}.users.name IS NULL".encode())
    before = servers.fetch(7, "SELECT c.relname, c.relacl::text, (SELECT count(*) FROM pg_trigger WHERE tgrelid = c.oid) FROM pg_class AS c WHERE relnamespace = '{}'::regnamespace AND relkind IN ('r', 'S') ORDER BY 1")  # fmt: skip
    servers.move(7)
    after = servers.fetch(7, "SELECT c.relname, c.relacl::text, (SELECT count(*) FROM pg_trigger WHERE tgrelid = c.oid) FROM pg_class AS c WHERE relnamespace = '{}'::regnamespace AND relkind IN ('r', 'S') ORDER BY 1")  # fmt: skip
    moves.clean(servers.topology, 7)

    def plain(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        return [(name, sorted((acl or "").strip("{}").split(",")), n) for name, acl, n in rows]

    assert plain(before) == plain(after)


def test_the_journal_keeps_the_last_moves_and_whatever_is_needed(servers: Servers) -> None:
    begun = [Move(str(uuid.UUID(int=n))) for n in range(9)]
    query = b"SELECT DISTINCT move_id::text FROM shardkit.move_journal WHERE logical_shard = %s"
    with servers.admin("alpha") as alpha:
        for move in begun:
            for _ in range(3):
                entries.journal(alpha, 97, move, Step.CLAIM)
        entries.journal(alpha, 98, begun[0], Step.CLAIM)
        # The last two are among those that are kept anyhow; the first is needed, however old.
        assert entries.prune(alpha, 97, [begun[-1].id, begun[0].id]) == 3 * (9 - entries.KEPT - 1)
        left = {name for (name,) in alpha.execute(query, (97,))}
        assert left == {begun[0].id, *(move.id for move in begun[-entries.KEPT :])}
        assert entries.prune(alpha, 97, [begun[-1].id, begun[0].id]) == 0
        assert len(alpha.execute(query, (98,)).fetchall()) == 1, "of another logical shard"
        alpha.execute("DELETE FROM shardkit.move_journal WHERE logical_shard IN (97, 98)")


def test_a_logical_shard_that_goes_there_and_back_leaves_a_bounded_journal(
    servers: Servers,
) -> None:
    shard = 7
    target = servers.other(shard)
    with servers.admin(target) as there:
        for n in range(9):
            entries.journal(there, shard, Move(str(uuid.UUID(int=n))), Step.CLAIM)
        servers.move(shard)
        query = b"SELECT DISTINCT move_id FROM shardkit.move_journal WHERE logical_shard = %s"
        assert len(there.execute(query, (shard,)).fetchall()) == entries.KEPT
    moves.rollback(servers.topology, shard)
    moves.clean(servers.topology, shard)


def writers_at(servers: Servers, physical: str) -> int:
    """Return how many connections clients have to a server for what they write."""
    with servers.admin(physical) as connection:
        row = connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'shardkit write'"
        ).fetchone()
    return int(row[0]) if row else -1


def connects_first(servers: Servers, shard: int) -> None:
    """Move a logical shard, and see that clients are at the target before anybody can use it."""
    target = servers.other(shard)
    before = writers_at(servers, target)

    def hook(name: str) -> None:
        if name == "prepare back done":
            wait_until(lambda: writers_at(servers, target) > before, 60.0, "they connect")

    assert servers.move(shard, hook=hook).is_moved
    moves.clean(servers.topology, shard)


def test_clients_are_connected_to_the_target_before_it_opens(servers: Servers) -> None:
    with servers.cluster() as cluster:
        owner = new_user(cluster, 5)
        connects_first(servers, 5)
        cluster.run(lambda session: session.add(Photo(owner_id=owner, caption="after")))


def test_tasks_are_connected_to_the_target_before_it_opens(servers: Servers) -> None:
    async def work() -> None:
        async with AsyncCluster(servers.topology, pool=POOL, map_age=1.0) as cluster:

            async def unit(session: Any) -> None:
                session.add(User(id=new_id(5), name="owner"))

            await cluster.run(unit)
            await asyncio.to_thread(connects_first, servers, 5)
            await cluster.run(unit)

    asyncio.run(work())


def test_a_subscription_that_fails_leaves_no_password_in_the_log(servers: Servers) -> None:
    """PostgreSQL logs each statement that fails, and this one is made with a password."""
    url = servers.topology.physical["alpha"].admin_url
    nobody = url.set(host="127.0.0.1", port=1)
    log = servers.local.server("beta_0").log
    with servers.admin("beta") as connection:
        with pytest.raises(psycopg.OperationalError, match="could not connect to the publisher"):
            subscribe(connection, 5, nobody)
        assert connection.execute("SHOW log_min_error_statement").fetchone() == ("error",)
    text = log.read_text(encoding="utf-8")
    assert 'subscription "shardkit_move_0005" could not connect' in text
    assert str(url.password) not in text
