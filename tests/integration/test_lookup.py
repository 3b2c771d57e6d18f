"""Unique values over all logical shards, on real servers: taken, given up, found, and repaired."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import psycopg
import pytest
from sqlalchemy import delete, func, insert, select, update

from shardkit import AsyncCluster, Cluster, ReadSession, all_shards, ids
from shardkit.errors import (
    CrossShardWriteError,
    InvalidUniqueValueError,
    ScatterNotAllowedError,
    UniqueViolationError,
    UnsupportedStatementError,
    ValueBusyError,
)
from shardkit.local import LocalCluster
from shardkit.lookup import Lookups
from shardkit.testing import watch
from shardkit.topology import Topology, schema_name
from shardkit.uniques import lookups_of
from tests.fixtures.sharded import Settled, admin
from tests.models import Account

pytestmark = pytest.mark.integration

TABLE: Any = Account.__table__
NAME, EMAIL = lookups_of(TABLE)


def add(cluster: Cluster, name: str, **more: Any) -> Account:
    with cluster.writer() as session:
        account = Account(name=name, **more)
        session.add(account)
        session.commit()
    return account


def beside(account: Account, name: str, **more: Any) -> Account:
    """Return an object of the same logical shard, so of the same server."""
    # Not the next one, which may be minted.
    return Account(id=account.id ^ 512, name=name, **more)


def pairs(cluster: Cluster, name: str) -> list[int]:
    """Return the ids that the lookup row of a name has."""
    value = NAME.value(name)
    return [pair.id for pair in cluster.connections.lookups.read([value])[value]]


def name_of(cluster: Cluster, account: Account) -> str | None:
    with cluster.reader(max_lag=1.0) as session:
        found = session.get(Account, account.id)
        return None if found is None else found.name


# -- taking


def test_a_value_is_had_once_in_the_whole_cluster(cluster: Cluster) -> None:
    ana = add(cluster, "ana")
    for n in range(20):  # on other logical shards, of both servers
        with pytest.raises(UniqueViolationError, match=r"accounts\.name") as caught:
            add(cluster, "ana", bio=str(n))
        assert caught.value.column == "accounts.name"
        assert not caught.value.retryable
    with cluster.reader(max_lag=1.0) as session:
        found = session.scalars(select(Account).options(all_shards())).all()
    assert [account.id for account in found] == [ana.id]
    assert pairs(cluster, "ana") == [ana.id]


@pytest.mark.parametrize("other", ["ANA", "\uff21na", "\u1d2cna"])
def test_values_that_fold_to_one_are_one(cluster: Cluster, other: str) -> None:
    ana = add(cluster, "Ana")
    with pytest.raises(UniqueViolationError):
        add(cluster, other)
    with cluster.reader(max_lag=1.0) as session:
        assert session.get_by(Account, name=other).id == ana.id
        assert session.get_by(Account, name="bo") is None
        assert session.scalars(select(Account).where(Account.name == other)).all() == []
        assert session.scalars(select(Account).where(Account.name == "Ana")).one().id == ana.id


def test_a_column_without_folding_tells_case_apart(cluster: Cluster) -> None:
    add(cluster, "one", email="a@b")
    add(cluster, "two", email="A@b")
    with pytest.raises(UniqueViolationError, match="email"):
        add(cluster, "three", email="a@b")
    add(cluster, "three", email=None)
    add(cluster, "four", email=None)


@pytest.mark.parametrize(
    "value", ["a\0b", "x" * 1025, "\xe9" * 513, "\ud800", "y" * 1_000_000, 5, func.lower("A")]
)
def test_a_value_that_cannot_be_kept_is_refused_before_anything_is_written(
    cluster: Cluster, value: Any
) -> None:
    with cluster.writer() as session:
        session.add(Account(name=value))
        with pytest.raises(InvalidUniqueValueError) as caught:
            session.flush()
        assert len(str(caught.value)) < 400
    if isinstance(value, str):
        with cluster.reader() as session, pytest.raises(InvalidUniqueValueError):
            session.scalars(select(Account).where(Account.name == value)).all()
    assert add(cluster, "x" * 1024).id


def test_two_of_one_flush_are_told_apart_before_anything_is_written(cluster: Cluster) -> None:
    with cluster.writer() as session:
        ana = Account(name="ana")
        session.add(ana)
        session.flush()
        session.add_all([beside(ana, "bo"), Account(id=ana.id + 2, name="BO")])
        with pytest.raises(UniqueViolationError, match="one unit of work"):
            session.flush()


def test_a_refused_flush_can_be_corrected_and_tried_again(cluster: Cluster) -> None:
    add(cluster, "ana")
    with cluster.writer() as session:
        bo = Account(name="ana")
        session.add(bo)
        with pytest.raises(UniqueViolationError):
            session.commit()
        bo.name = "bo"
        session.commit()
    assert pairs(cluster, "bo") == [bo.id]


# -- giving up


def test_a_name_given_up_can_be_had_and_its_lookup_row_is_gone(cluster: Cluster) -> None:
    ana = add(cluster, "ana")
    with cluster.writer() as session:
        session.get_one(Account, ana.id).name = "bo"
        session.commit()
    assert (pairs(cluster, "ana"), pairs(cluster, "bo")) == ([], [ana.id])
    with cluster.writer() as session:
        session.delete(session.get_one(Account, ana.id))
        session.commit()
    assert pairs(cluster, "bo") == []
    assert add(cluster, "ana").id != ana.id
    add(cluster, "bo")


def test_a_name_in_another_spelling_stays(cluster: Cluster) -> None:
    ana = add(cluster, "ana")
    with cluster.writer() as session:
        session.get_one(Account, ana.id).name = "ANA"
        session.commit()
    assert name_of(cluster, ana) == "ANA"
    assert pairs(cluster, "ana") == [ana.id]


def test_inserted_then_updated_in_one_transaction(cluster: Cluster) -> None:
    with cluster.writer() as session:
        ana = Account(name="ana")
        session.add(ana)
        session.flush()
        ana.name = "bo"
        session.flush()
        ana.name = "cy"
        session.commit()
    assert [pairs(cluster, n) for n in ("ana", "bo", "cy")] == [[], [], [ana.id]]


def test_two_rows_swap_their_names(cluster: Cluster) -> None:
    ana = add(cluster, "ana")
    with cluster.writer() as session:
        bo = beside(ana, "bo")
        session.add(bo)
        session.commit()
        mine = session.get_one(Account, ana.id)
        mine.name, bo.name = "bo", "ana"
        session.commit()
    assert (name_of(cluster, ana), name_of(cluster, bo)) == ("bo", "ana")
    assert (pairs(cluster, "ana"), pairs(cluster, "bo")) == ([bo.id], [ana.id])


def test_a_swap_that_is_rolled_back_loses_nothing(cluster: Cluster) -> None:
    ana = add(cluster, "ana")
    with cluster.writer() as session:
        bo = beside(ana, "bo")
        session.add(bo)
        session.commit()
        mine = session.get_one(Account, ana.id)
        mine.name, bo.name = "bo", "ana"
        session.flush()
        assert sorted(pairs(cluster, "ana")) == sorted([ana.id, ana.id ^ 512])
        session.rollback()
    assert (pairs(cluster, "ana"), pairs(cluster, "bo")) == ([ana.id], [ana.id ^ 512])
    for name in ("ana", "bo"):
        with pytest.raises(UniqueViolationError):
            add(cluster, name)


def test_deleted_and_made_again_in_one_unit_of_work(cluster: Cluster) -> None:
    ana = add(cluster, "ana")
    with cluster.writer() as session:
        session.delete(session.get_one(Account, ana.id))
        again = beside(ana, "Ana")
        session.add(again)
        session.commit()
    assert pairs(cluster, "ana") == [again.id]
    assert name_of(cluster, ana) is None


def test_a_name_given_up_in_an_earlier_flush_can_be_had_in_a_later_one(cluster: Cluster) -> None:
    ana = add(cluster, "ana")
    with cluster.writer() as session:
        mine = session.get_one(Account, ana.id)
        mine.name = "bo"
        session.flush()
        other = beside(ana, "ana")
        session.add(other)
        session.flush()
        session.add(Account(id=ana.id + 2, name="ana"))
        with pytest.raises(UniqueViolationError):
            session.flush()
        session.rollback()
    assert pairs(cluster, "ana") == [ana.id]


def test_what_is_rolled_back_can_be_had(cluster: Cluster) -> None:
    with cluster.writer() as session:
        session.add(Account(name="ana"))
        session.flush()
        session.rollback()
        assert pairs(cluster, "ana") == []
    add(cluster, "ana")


def test_savepoints(cluster: Cluster) -> None:
    with cluster.writer() as session:
        bo = Account(name="bo")
        session.add(bo)
        session.flush()
        with session.begin_nested() as savepoint:
            session.add(beside(bo, "ana"))
            bo.name = "cy"
            session.flush()
            savepoint.rollback()
        again = Account(id=bo.id + 2, name="ana")
        session.add(again)
        with session.begin_nested():
            session.add(Account(id=bo.id + 3, name="di"))
        session.commit()
    assert [pairs(cluster, n) for n in ("ana", "bo", "cy", "di")] == [
        [again.id], [bo.id], [], [bo.id + 3],
    ]  # fmt: skip


def test_several_logical_shards_of_one_server(cluster: Cluster, topology: Topology) -> None:
    here = topology.shard_map.owned_by(next(iter(topology.physical)))[:8]
    with cluster.writer() as session:
        accounts = [
            Account(id=ids.compose(1_000_000, shard, n), name=f"n{shard}.{n}", email=f"{shard}@{n}")
            for shard in here
            for n in range(5)
        ]
        session.add_all(accounts)
        session.commit()
    with cluster.reader(after=session.token) as reader:
        wanted = select(Account.id).where(Account.name.in_([a.name for a in accounts]))
        assert sorted(reader.scalars(wanted)) == sorted(a.id for a in accounts)


def test_two_servers_are_refused_before_a_name_is_taken(
    cluster: Cluster, topology: Topology
) -> None:
    first, second = (topology.shard_map.owned_by(name)[0] for name in topology.physical)
    with cluster.writer() as session:
        session.add(Account(id=ids.compose(1_000_000, first, 0), name="ana"))
        session.add(Account(id=ids.compose(1_000_000, second, 0), name="bo"))
        with pytest.raises(CrossShardWriteError):
            session.flush()
    assert pairs(cluster, "ana") == pairs(cluster, "bo") == []


# -- statements that write


def test_insert_statements_take_names(cluster: Cluster) -> None:
    ana = add(cluster, "ana")
    rows = [{"id": ana.id + n, "name": f"n{n}"} for n in range(1, 5)]
    with cluster.writer() as session:
        session.execute(insert(Account), rows)
        session.execute(insert(Account).values(id=ana.id + 5, name="n5"))
        session.execute(
            insert(Account).values([{"id": ana.id + n, "name": f"n{n}"} for n in (6, 7)])
        )
        session.execute(insert(TABLE).values(id=ana.id + 8, name="n8", bio=""))
        session.commit()
    for n in range(1, 9):
        assert pairs(cluster, f"n{n}") == [ana.id + n]
    for statement, given in (
        (insert(Account), [{"name": "ANA"}]),
        (insert(Account).values(name="ana"), None),
        (insert(TABLE).values(name="ana", bio=""), None),
    ):
        with cluster.writer() as session, pytest.raises(UniqueViolationError):
            session.execute(statement, given)
    with cluster.writer() as session, pytest.raises(InvalidUniqueValueError):
        session.execute(insert(Account).values(name=func.lower("X")))


def test_delete_statements_give_names_up(cluster: Cluster) -> None:
    ana = add(cluster, "ana")
    with cluster.writer() as session:
        session.execute(delete(Account).where(Account.id == ana.id))
        session.commit()
    assert pairs(cluster, "ana") == []
    bo = add(cluster, "bo", email="b")
    with cluster.writer() as session:
        session.execute(delete(Account).where(Account.name == "bo", Account.bio == ""))
        session.commit()
    assert pairs(cluster, "bo") == []
    assert name_of(cluster, bo) is None


def test_statements_whose_values_are_not_known_are_refused(cluster: Cluster) -> None:
    from sqlalchemy.dialects.postgresql import insert as upsert

    ana = add(cluster, "ana")
    with cluster.writer() as session:
        refused: tuple[tuple[Any, Any, str], ...] = (
            (update(Account).where(Account.id == ana.id).values(name="bo"), None, "load the"),
            (update(Account), [{"id": ana.id, "name": "bo"}], "load the"),
            (
                upsert(Account).values(id=ana.id ^ 512, name="bo").on_conflict_do_nothing(),
                None,
                "look the row up",
            ),
        )
        for statement, given, hint in refused:
            with pytest.raises(UnsupportedStatementError, match=hint):
                session.execute(statement, given)
        options: dict[str, Any] = {"bind_arguments": {"logical_shard": ids.shard_of(ana.id)}}
        numbered: tuple[Any, ...] = (
            update(TABLE).values(name="bo"),
            insert(TABLE).values(id=ana.id ^ 512, name="bo", bio=""),
        )
        for statement in numbered:
            with pytest.raises(UnsupportedStatementError):
                session.execute(statement, **options)
        session.execute(update(Account).where(Account.name == "ana").values(bio="by name"))
        session.commit()
    assert pairs(cluster, "bo") == []
    with cluster.reader(max_lag=1.0) as session:
        assert session.get_by(Account, name="ana").bio == "by name"


def test_a_value_set_by_an_event_is_refused(cluster: Cluster) -> None:
    from sqlalchemy import event

    def rename(_mapper: Any, _connection: Any, account: Account) -> None:
        account.name = "other"

    event.listen(Account, "before_insert", rename)
    try:
        with cluster.writer() as session:
            session.add(Account(name="ana"))
            with pytest.raises(UnsupportedStatementError, match="while it was flushed"):
                session.flush()
    finally:
        event.remove(Account, "before_insert", rename)
    assert pairs(cluster, "ana") == []


# -- reading


def test_a_select_by_name_goes_to_one_logical_shard(cluster: Cluster) -> None:
    accounts = [add(cluster, f"n{n}", email=f"{n}@x") for n in range(6)]
    with cluster.reader(max_lag=1.0) as session:
        for n, account in enumerate(accounts):
            statement = select(Account).where(Account.name == f"n{n}", Account.bio == "")
            assert session.route(statement).shards == (ids.shard_of(account.id),)
            assert session.scalars(statement).one().id == account.id
        several = select(Account.id).where(Account.name.in_(["n1", "n4", "nobody"]))
        assert set(session.route(several).shards) == {
            ids.shard_of(accounts[1].id), ids.shard_of(accounts[4].id),
        }  # fmt: skip
        assert set(session.scalars(several)) == {accounts[1].id, accounts[4].id}
        by_mail = select(Account.name).where(Account.email == "3@x")
        assert session.scalars(by_mail).one() == "n3"
        inner = select(Account).where(Account.name == "n2").subquery()
        assert session.execute(select(inner.c.email)).scalar_one() == "2@x"
        with pytest.raises(ScatterNotAllowedError):
            session.scalars(select(Account).where(Account.name > "n2"))
        with pytest.raises(ScatterNotAllowedError):
            session.scalars(select(Account).where(Account.name == Account.email))


def test_a_name_that_nobody_has_is_no_scatter(cluster: Cluster) -> None:
    add(cluster, "ana")
    with watch(cluster, scatter=False), cluster.reader(max_lag=1.0) as session:
        nobody = select(Account).where(Account.name == "nobody")
        assert len(session.route(nobody).shards) == 1
        assert session.scalars(nobody).all() == []
        count = select(func.count()).select_from(Account).where(Account.name.in_(["x", "y"]))
        assert session.scalar(count) == 0


def test_an_id_decides_without_a_lookup(cluster: Cluster, monkeypatch: Any) -> None:
    ana = add(cluster, "ana")
    monkeypatch.setattr(Lookups, "read", None)
    with cluster.reader(max_lag=1.0) as session:
        both = select(Account).where(Account.id == ana.id, Account.name == "ana")
        assert session.scalars(both).one().id == ana.id


def test_a_stale_pair_finds_nothing(cluster: Cluster) -> None:
    ana = add(cluster, "ana")
    add_pair(cluster, "ghost", ana.id)
    with cluster.reader(max_lag=1.0) as session:
        assert session.scalars(select(Account).where(Account.name == "ghost")).all() == []
        assert session.get_by(Account, name="ghost") is None


def test_a_writer_finds_what_it_has_not_committed(cluster: Cluster) -> None:
    with cluster.writer() as session:
        ana = Account(name="ana")
        session.add(ana)
        assert session.scalars(select(Account).where(Account.name == "ana")).one() is ana
        assert session.get_by(Account, name="ANA") is ana
        ana.name = "bo"
        assert session.scalars(select(Account).where(Account.name == "ana")).all() == []
        assert session.scalars(select(Account).where(Account.name == "bo")).one() is ana


def test_a_token_covers_the_lookup(cluster: Cluster) -> None:
    for n in range(20):
        with cluster.writer() as session:
            session.add(Account(name=f"n{n}"))
            session.commit()
        with cluster.reader(after=session.token) as reader:
            found = reader.scalars(select(Account.name).where(Account.name == f"n{n}"))
            assert found.one() == f"n{n}"


def test_replicas_answer_once_they_have_replayed(cluster: Cluster, settled: Settled) -> None:
    ana = add(cluster, "ana")
    settled()
    with watch(cluster) as seen, cluster.reader() as session:
        found = session.scalars(select(Account).where(Account.name == "ana")).one()
    assert found.id == ana.id
    assert seen.statements[0].from_replica


# -- others at the same time, and what they leave behind


def add_pair(cluster: Cluster, name: str, row_id: int, ticket: int = 7) -> None:
    value = NAME.value(name)
    home = schema_name(value.home(cluster.connections.router.total))
    physical = cluster.connections.physical_of(value.home(cluster.connections.router.total))
    with admin(cluster.topology.physical[physical]) as connection:
        connection.execute(
            f"INSERT INTO {home}.shardkit_lookup VALUES (%s, %s, %s, %s)".encode(),
            [value.lookup.name, value.key, [row_id], [ticket]],
        )


def test_a_pair_that_a_crash_left_behind_is_taken_over(cluster: Cluster) -> None:
    ghost = ids.compose(1_000_000, 5, 0)
    add_pair(cluster, "ana", ghost)
    ana = add(cluster, "ana")
    assert pairs(cluster, "ana") == [ana.id]


def test_a_name_is_waited_for_while_its_transaction_is_open(cluster: Cluster) -> None:
    waiting = threading.Event()

    def take() -> int:
        waiting.set()
        return add(cluster, "ana").id

    with ThreadPoolExecutor(1) as pool, cluster.writer() as session:
        session.add(Account(name="ana"))
        session.flush()
        later = pool.submit(take)
        waiting.wait()
        session.rollback()
        assert later.result(10)
    with ThreadPoolExecutor(1) as pool, cluster.writer() as session:
        session.add(Account(name="bo"))
        session.flush()
        later = pool.submit(lambda: add(cluster, "bo").id)
        session.commit()
        with pytest.raises(UniqueViolationError):
            later.result(10)


def test_a_transaction_that_does_not_end_makes_others_try_again(cluster: Cluster) -> None:
    with cluster.writer() as session:
        session.add(Account(name="ana"))
        session.flush()
        with pytest.raises(ValueBusyError) as caught:
            add(cluster, "ana")
        assert caught.value.retryable
        session.commit()
    with pytest.raises(UniqueViolationError):
        add(cluster, "ana")


def test_a_lookup_row_that_stays_locked_makes_others_try_again(cluster: Cluster) -> None:
    """Nobody of shardkit holds one; somebody at a console may."""
    value = NAME.value("ana")
    home = value.home(cluster.connections.router.total)
    physical = cluster.topology.physical[cluster.connections.physical_of(home)]
    with admin(physical) as connection, connection.transaction():
        connection.execute(
            f"INSERT INTO {schema_name(home)}.shardkit_lookup VALUES (%s, %s, '{{1}}', '{{1}}')".encode(),
            [value.lookup.name, value.key],
        )
        with pytest.raises(ValueBusyError):
            add(cluster, "ana")
    add(cluster, "bo")


def test_a_reader_whose_connection_broke_asks_again(
    cluster: Cluster, local_cluster: LocalCluster
) -> None:
    ana = add(cluster, "ana")

    def cut() -> None:
        for name in cluster.topology.physical:
            dsn = local_cluster.superuser_dsn(local_cluster.primary(name).name)
            with psycopg.connect(dsn, autocommit=True) as superuser:
                superuser.execute(
                    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                    "WHERE application_name = 'shardkit read'"
                )

    with cluster.reader(max_lag=1.0) as session:
        for _ in range(2):
            assert session.get_by(Account, name="ana").id == ana.id
            cut()
            found = session.scalars(select(Account.id).where(Account.name == "ana"))
            assert found.one() == ana.id
            cut()
            session.expunge_all()


def test_two_that_swap_crosswise_end(cluster: Cluster) -> None:
    """Each waits for the other; no server sees it, so one gives up by itself."""
    ana, bo = add(cluster, "ana"), add(cluster, "bo")
    gate = threading.Barrier(2, timeout=10)

    def rename(account: Account, name: str) -> str:
        with cluster.writer() as session:
            mine = session.get_one(Account, account.id)
            mine.bio = "locks the row"
            session.flush()
            gate.wait()
            mine.name = name
            try:
                session.commit()
            except (UniqueViolationError, ValueBusyError) as error:
                return type(error).__name__
            return "done"

    with ThreadPoolExecutor(2) as pool:
        outcomes = [
            run.result(30)
            for run in [pool.submit(rename, ana, "bo"), pool.submit(rename, bo, "ana")]
        ]
    assert "done" not in outcomes, "each name was held by a row that kept it"
    assert (name_of(cluster, ana), name_of(cluster, bo)) == ("ana", "bo")


def test_threads_race_for_the_same_names(cluster: Cluster) -> None:
    names = [f"name{n}" for n in range(12)]

    def take(worker: int) -> list[str]:
        mine = []
        for name in names[worker % 3 :] + names[: worker % 3]:
            while True:
                try:
                    add(cluster, name, bio=str(worker))
                except UniqueViolationError:
                    break
                except ValueBusyError:
                    continue
                mine.append(name)
                break
        return mine

    with ThreadPoolExecutor(4) as pool:
        taken = [name for mine in pool.map(take, range(4)) for name in mine]
    assert sorted(taken) == sorted(names)


# -- asyncio


@pytest.mark.anyio
async def test_the_same_words_awaited(topology: Topology) -> None:
    async with AsyncCluster(topology) as cluster:
        async with cluster.writer() as session:
            ana = Account(name="Ana")
            session.add(ana)
            await session.commit()
            token = session.token
        async with cluster.writer() as session:
            session.add(Account(name="ANA"))
            with pytest.raises(UniqueViolationError):
                await session.commit()
        async with cluster.reader(after=token) as reader:
            statement = select(Account).where(Account.name == "Ana")
            assert (await reader.scalars(statement)).one().id == ana.id
            assert (await reader.get_by(Account, name="ana")).id == ana.id
            with pytest.raises(UnsupportedStatementError, match="looked up"):
                reader.route(statement)
            route = await reader.run_sync(lambda sync: cast("ReadSession", sync).route(statement))
            assert route.shards == (ids.shard_of(ana.id),)
        async with cluster.writer() as session:
            stored = await session.get_one(Account, ana.id)
            stored.name = "bo"
            await session.commit()
            await session.delete(stored)
            await session.commit()
            session.add(Account(name="bo"))
            await session.flush()
            await session.rollback()
        async with cluster.reader(after=token) as reader:
            assert await reader.get_by(Account, name="bo") is None
