"""Atomic commits over several physical shards: all of it holds, or none, whatever ends when."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, insert, update
from sqlalchemy.exc import IntegrityError, PendingRollbackError

from shardkit import AsyncCluster, Cluster, ids
from shardkit.cli import main
from shardkit.config import load
from shardkit.errors import CrossShardWriteError, EndpointUnavailableError
from shardkit.events import Committed, Event, TwoPhaseStep
from shardkit.relay import Relay
from shardkit.testing import create_tables, wait_until
from shardkit.twophase import Gid, in_doubt, resolve
from tests.fixtures.servers import NewCluster
from tests.fixtures.sharded import admin
from tests.models import Base, Country, Photo, User

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def settled_afterwards(cluster: Cluster) -> Iterator[None]:
    """Nothing may stay prepared: a test that leaves something fails."""
    for shard in cluster.topology.physical.values():
        with admin(shard) as connection:  # decisions of tests that killed those who forget them
            connection.execute("DELETE FROM shardkit.decisions")
    yield
    assert prepared(cluster) == []


def prepared(cluster: Cluster) -> list[str]:
    found, silent = in_doubt(cluster.connections, cluster.topology.physical)
    assert not silent
    return [str(part.gid) for part in found]


def on(cluster: Cluster, physical: str, n: int = 0) -> int:
    """Return an id that lives on a physical shard."""
    shard = cluster.topology.shard_map.owned_by(physical)[n]
    return ids.compose(1, shard, n)


def pair(cluster: Cluster) -> tuple[User, User]:
    return (
        User(id=on(cluster, "alpha"), name="ana"),
        User(id=on(cluster, "beta"), name="bela"),
    )


def names(cluster: Cluster) -> list[str | None]:
    with cluster.writer() as session:
        found = [session.get(User, on(cluster, name)) for name in ("alpha", "beta")]
        return [None if user is None else user.name for user in found]


def decisions(cluster: Cluster) -> list[tuple[object, ...]]:
    rows = []
    for shard in cluster.topology.physical.values():
        with admin(shard) as connection:
            rows += connection.execute("SELECT outcome FROM shardkit.decisions").fetchall()
    return rows


def test_a_plain_writer_refuses_and_says_what_lies_where(cluster: Cluster) -> None:
    with cluster.writer() as session:
        session.add_all(pair(cluster))
        with pytest.raises(CrossShardWriteError) as refused:
            session.commit()
        session.rollback()
    told = str(refused.value)
    for expected in (
        f"alpha (User {on(cluster, 'alpha')})", f"beta (User {on(cluster, 'beta')})",
        "one shard key", "atomic=True", "emit",
    ):  # fmt: skip
        assert expected in told
    assert names(cluster) == [None, None]


@pytest.mark.parametrize("begin", [False, True])
def test_all_of_it_holds(cluster: Cluster, begin: bool) -> None:
    steps: list[str] = []
    ended = cluster.listen(lambda e: steps.append(e.step) if isinstance(e, TwoPhaseStep) else None)
    with cluster.writer(atomic=True) as session:
        if begin:
            with session.begin():
                session.add_all(pair(cluster))
        else:
            session.add_all(pair(cluster))
            session.commit()
        assert session.pending == ()
        token = session.token
    ended()
    assert steps == ["preparing", "prepared", "deciding", "decided", "finished"]
    assert names(cluster) == ["ana", "bela"]
    assert decisions(cluster) == []
    with cluster.reader(after=token) as session:
        assert session.get_one(User, on(cluster, "beta")).name == "bela"


def test_one_physical_shard_is_a_plain_commit(cluster: Cluster) -> None:
    seen: list[Event] = []
    cluster.listen(seen.append)
    with cluster.writer(atomic=True) as session:
        session.add_all(User(id=on(cluster, "alpha", n), name=f"{n}") for n in range(8))
        session.commit()
    assert any(isinstance(event, Committed) for event in seen)
    assert not any(isinstance(event, TwoPhaseStep) for event in seen)


def test_statements_and_objects_in_one_transaction_and_the_next(cluster: Cluster) -> None:
    ana, bela = pair(cluster)
    with cluster.writer(atomic=True) as session:
        session.add(ana)
        session.execute(insert(User).values(id=bela.id, name="by statement"))
        with session.begin_nested():
            session.add(Photo(owner_id=bela.id, caption="kept"))
        undone = session.begin_nested()
        session.add(Photo(owner_id=ana.id, caption="undone"))
        session.flush()
        undone.rollback()
        session.commit()
        session.execute(update(User).where(User.id.in_([ana.id, bela.id])).values(name="both"))
        session.commit()
        session.execute(delete(Photo).where(Photo.owner_id == bela.id))
        session.commit()
    assert names(cluster) == ["both", "both"]
    assert decisions(cluster) == []


def test_none_of_it_holds_after_rollback_or_error(cluster: Cluster) -> None:
    with cluster.writer(atomic=True) as session:
        session.add_all(pair(cluster))
        session.flush()
        session.rollback()
        session.add_all(pair(cluster))
        session.flush()
        with pytest.raises(IntegrityError):
            session.execute(
                insert(User).values(id=on(cluster, "beta"), name="again"),
            )
        with pytest.raises((PendingRollbackError, IntegrityError)):
            session.commit()
        session.rollback()
    assert names(cluster) == [None, None]


def test_a_participant_lost_before_the_decision_undoes_the_rest(cluster: Cluster) -> None:
    def lose(event: Event) -> None:
        if isinstance(event, TwoPhaseStep) and event.step == "preparing":
            kill_writers(cluster, "beta")

    cluster.listen(lose)
    with cluster.writer(atomic=True) as session:
        session.add_all(pair(cluster))
        with pytest.raises(EndpointUnavailableError):
            session.commit()
        session.rollback()
    assert names(cluster) == [None, None]


def test_a_coordinator_lost_before_the_decision_undoes_the_rest(cluster: Cluster) -> None:
    def lose(event: Event) -> None:
        if isinstance(event, TwoPhaseStep) and event.step == "prepared":
            kill_writers(cluster, "alpha")

    cluster.listen(lose)
    with cluster.writer(atomic=True) as session:
        session.add_all(pair(cluster))
        with pytest.raises(EndpointUnavailableError):
            session.commit()
    assert names(cluster) == [None, None]
    assert prepared(cluster) == []


def test_a_participant_lost_after_the_decision_is_committed(cluster: Cluster) -> None:
    def lose(event: Event) -> None:
        if isinstance(event, TwoPhaseStep) and event.step == "decided":
            kill_writers(cluster, "beta")

    cluster.listen(lose)
    with cluster.writer(atomic=True) as session:
        session.add_all(pair(cluster))
        session.commit()
        assert session.pending == ()
    assert names(cluster) == ["ana", "bela"]


def kill_writers(cluster: Cluster, physical: str) -> None:
    with admin(cluster.topology.physical[physical]) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE application_name = 'shardkit write' AND xact_start IS NOT NULL "
            "OR application_name = 'shardkit write' AND state = 'idle'"
        )


@pytest.mark.parametrize("step", ["prepared", "deciding", "decided"])
def test_a_killed_process_leaves_doubts_that_end(
    cluster: Cluster, cluster_file: Path, step: str, capsys: pytest.CaptureFixture[str]
) -> None:
    child = os.fork()
    if child == 0:  # a process of its own: it opens its own connections, and kills itself
        dying = Cluster(cluster.topology)
        dying.listen(
            lambda event: os.kill(os.getpid(), signal.SIGKILL) if at(event, step) else None
        )
        with dying.writer(atomic=True) as session:
            session.add_all(pair(cluster))
            session.commit()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    wait_until(lambda: idle(cluster), 5.0, "the servers notice")
    [gid] = prepared(cluster)
    config = ["--config", str(cluster_file)]
    assert shown(capsys, ["twophase", "status", "--json", *config])["in_doubt"][0] | {
        "seconds": 0
    } == {**dict(zip(NAMES, gid.split(":")[1:], strict=True)), "seconds": 0}
    young = shown(capsys, ["twophase", "resolve", "--json", "--older-than", "3600", *config])
    assert young["settled"] == []
    planned = shown(
        capsys, ["twophase", "resolve", "--json", "--dry-run", "--older-than", "0", *config]
    )
    assert len(planned["in_doubt"]) == 1
    done = shown(capsys, ["twophase", "resolve", "--json", "--older-than", "0", *config])
    expected = "commit" if step == "decided" else "abort"
    assert [settled["outcome"] for settled in done["settled"]] == [expected]
    assert names(cluster) == (["ana", "bela"] if step == "decided" else [None, None])
    main_ok(["twophase", "status", *config])
    assert "nothing is in doubt" in capsys.readouterr().out


NAMES = ("transaction", "coordinator", "participant")


def at(event: Event, step: str) -> bool:
    return isinstance(event, TwoPhaseStep) and event.step == step


def shown(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> dict[str, Any]:
    main_ok(arguments)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def main_ok(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0


def idle(cluster: Cluster) -> bool:
    """Tell whether no writer of a killed process is left on any server."""
    left = 0
    for shard in cluster.topology.physical.values():
        with admin(shard) as connection:
            row = connection.execute(
                "SELECT count(*) FROM pg_stat_activity "
                "WHERE application_name = 'shardkit write' AND xact_start IS NOT NULL"
            ).fetchone()
            assert row is not None
            left += int(str(row[0]))
    return left == 0


def test_decisions_that_nobody_needs_are_forgotten(cluster: Cluster) -> None:
    with admin(cluster.topology.physical["alpha"]) as connection:
        connection.execute(
            "INSERT INTO shardkit.decisions (transaction, outcome, decided) VALUES "
            "(repeat('a', 32), 'commit', now() - interval '2 minutes'),"
            "(repeat('b', 32), 'abort', now() - interval '2 days'),"
            "(repeat('c', 32), 'commit', now()), (repeat('d', 32), 'abort', now())"
        )
        resolve(cluster.connections, cluster.topology.physical)
        left = connection.execute(
            "SELECT transaction FROM shardkit.decisions WHERE transaction ~ '^(.)\\1+$' ORDER BY 1"
        )
        assert [row[0] for row in left.fetchall()] == ["c" * 32, "d" * 32]
        connection.execute("DELETE FROM shardkit.decisions")


def test_names_that_are_not_ours_are_left_alone(cluster: Cluster) -> None:
    with admin(cluster.topology.physical["alpha"]) as connection:
        connection.execute("BEGIN")
        connection.execute("PREPARE TRANSACTION 'shardkit:someone else'")
        try:
            assert (
                resolve(cluster.connections, cluster.topology.physical, older_than=0.0).settled
                == ()
            )
        finally:
            connection.execute("ROLLBACK PREPARED 'shardkit:someone else'")
    assert Gid.parse("shardkit:a:b") is None
    assert Gid.parse("shardkit:a:b:") is None
    assert Gid.parse(str(Gid("0" * 32, "alpha", "beta"))) == Gid("0" * 32, "alpha", "beta")


@pytest.mark.anyio
async def test_the_same_for_asyncio(cluster: Cluster) -> None:
    async with AsyncCluster(cluster.topology) as awaited:
        async with awaited.writer(atomic=True) as session:
            session.add_all(pair(cluster))
            await session.commit()
            assert session.token
            assert session.pending == ()
        async with awaited.writer(atomic=True) as session:
            session.add(User(id=on(cluster, "alpha", 1), name="first"))
            await session.flush()
            with pytest.raises(IntegrityError):
                await session.execute(insert(User).values(id=on(cluster, "beta"), name="twice"))
            await session.rollback()
    assert names(cluster) == ["ana", "bela"]


def test_it_works_through_pgbouncer_in_transaction_pooling(
    new_cluster: NewCluster,
) -> None:
    """COMMIT PREPARED needs no connection of its own, so any of the pool will do."""
    local = new_cluster(replicas=0, logical_shards=64, redis=False, memcached=False)
    local.start()
    if "pgbouncer" in local.missing:
        pytest.skip("PgBouncer is not installed")
    _, topology = load(local.config_path)
    create_tables(topology, Base.metadata)
    seen = {shard.primary.url.port for shard in topology.physical.values()}
    assert not seen & {local.primary(name).port for name in topology.physical}, "pooled"
    with Cluster(topology) as cluster:
        for n in range(8):
            with cluster.writer(atomic=True) as session:
                session.add_all(
                    User(id=on(cluster, name, n + 1), name=f"{n}") for name in topology.physical
                )
                session.add(Country(code=f"c{n}", name=f"{n}"))
                session.commit()
                assert session.pending == ()
        assert prepared(cluster) == []
        # A client that is gone while its part is prepared, and the pool goes on.
        child = os.fork()
        if child == 0:
            dying = Cluster(topology)
            dying.listen(
                lambda event: os.kill(os.getpid(), signal.SIGKILL) if at(event, "decided") else None
            )
            with dying.writer(atomic=True) as session:
                session.add_all(
                    User(id=on(cluster, name, 20), name="x") for name in topology.physical
                )
                session.commit()
            os._exit(0)
        os.waitpid(child, 0)
        assert len(prepared(cluster)) == 1
        done = resolve(cluster.connections, topology.physical, older_than=0.0)
        assert [part.outcome for part in done.settled] == ["commit"]
        with cluster.writer() as session:
            for name in topology.physical:
                assert session.get_one(User, on(cluster, name, 20)).name == "x"


def test_a_relay_ends_what_is_in_doubt(cluster: Cluster) -> None:
    child = os.fork()
    if child == 0:
        dying = Cluster(cluster.topology)
        dying.listen(lambda e: os.kill(os.getpid(), signal.SIGKILL) if at(e, "decided") else None)
        with dying.writer(atomic=True) as session:
            session.add_all(pair(cluster))
            session.commit()
        os._exit(0)
    os.waitpid(child, 0)
    assert len(prepared(cluster)) == 1
    with Relay(cluster, {}):
        wait_until(lambda: not prepared(cluster), 10.0, "the relay has ended it")
    assert names(cluster) == ["ana", "bela"]


def test_events_are_prepared_with_the_rest(cluster: Cluster) -> None:
    """NOTIFY cannot be prepared, so relays find these events when they look by themselves."""
    ana, bela = pair(cluster)
    shards = [ids.shard_of(user.id) for user in (ana, bela)]
    with cluster.writer(atomic=True) as session:
        session.add_all((ana, bela))
        for user in (ana, bela):
            session.emit("greeted", {"name": user.name}, near=user, key=user.id)
        session.commit()
        session.emit("alone", near=ana)
        session.commit()
        session.emit("undone", near=ana)
        session.emit("undone", near=bela)
        session.rollback()
    topics = []
    for shard in shards:
        with admin(cluster.topology.physical[cluster.topology.shard_map.owner(shard)]) as there:
            query = f"SELECT topic FROM shard_{shard:04d}.shardkit_outbox ORDER BY position"
            topics.append([row[0] for row in there.execute(query.encode())])
            there.execute(f"DELETE FROM shard_{shard:04d}.shardkit_outbox".encode())
    assert topics == [["greeted", "alone"], ["greeted"]]
