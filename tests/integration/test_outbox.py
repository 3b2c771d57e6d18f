"""Events are stored with what they announce, and delivered once, in order, whatever happens."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from shardkit import AsyncCluster, Cluster, ids
from shardkit.emitting import SLEEPING
from shardkit.errors import (
    CrossShardWriteError,
    EventTooLargeError,
    InvalidEventError,
    InvalidShardKeyError,
    NoShardKeyError,
    UnavailableError,
)
from shardkit.minting import IdMinter
from shardkit.outbox import Backoff, Event, once
from shardkit.relay import Relay
from shardkit.testing import wait_until
from tests.fixtures.sharded import admin
from tests.models import User

pytestmark = pytest.mark.integration

ANA = ids.compose(1, 5, 0)
BEN = ids.compose(1, 6, 0)
FAR = ids.compose(1, 40, 0)
STATE = "UPDATE shardkit.ownership SET state = %s WHERE logical_shard = 5"
QUICK = Backoff(first=0.0, longest=0.0, attempts=3)


def stored(cluster: Cluster, shard: int = 5, table: str = "shardkit_outbox") -> list[Any]:
    physical = cluster.topology.physical[cluster.topology.shard_map.owner(shard)]
    order = "position" if table == "shardkit_outbox" else "1"
    with admin(physical) as connection:
        query = f"SELECT topic, key, payload FROM shard_{shard:04d}.{table} ORDER BY {order}"
        return connection.execute(query.encode()).fetchall()


def emit(cluster: Cluster, *payloads: Any, topic: str = "t", key: Any = ANA) -> None:
    for payload in payloads:
        with cluster.writer() as session:
            session.emit(topic, payload, key=key, near=ANA)
            session.commit()


class Seen(list[Any]):
    """A handler that keeps the payloads."""

    def __call__(self, event: Event) -> None:
        self.append(event.payload)


def test_an_event_commits_with_its_rows_and_is_delivered(cluster: Cluster) -> None:
    seen: list[Event] = []
    with cluster.writer() as session:
        user = User(name="ana")
        session.add(user)
        session.emit("user.added", {"name": "ana"}, near=user)
        session.emit("user.greeted", ["é", 1, None, "\0"], key="k", near=user)
        session.commit()
    relay = Relay(cluster, {"user.added": seen.append, "user.greeted": seen.append})
    assert relay.drain() == 2
    assert [(e.topic, e.key, e.payload, e.attempts) for e in seen] == [
        ("user.added", None, {"name": "ana"}, 0),
        ("user.greeted", "k", ["é", 1, None, "\0"], 0),
    ]
    assert {e.logical_shard for e in seen} == {ids.shard_of(user.id)}
    assert {ids.shard_of(e.id) for e in seen} == {ids.shard_of(user.id)}
    assert relay.drain() == 0


def test_what_is_rolled_back_is_never_emitted(cluster: Cluster) -> None:
    with cluster.writer() as session:
        session.emit("t", 1, key=ANA)
        session.rollback()
        session.emit("t", 2, key=ANA)
        with session.begin_nested() as savepoint:
            session.emit("t", 3, key=ANA)
            with session.begin_nested():
                session.emit("t", 4, key=ANA)
            savepoint.rollback()
        with session.begin_nested():
            session.emit("t", 5, key=ANA)
        session.commit()
        session.emit("t", 6, key=ANA)
    assert [row[2] for row in stored(cluster)] == [2, 5]
    with cluster.writer() as session:
        session.commit()
    assert [row[2] for row in stored(cluster)] == [2, 5]


def test_an_event_may_be_all_that_a_transaction_does(cluster: Cluster) -> None:
    with cluster.writer() as session, session.begin():
        session.emit("t", {"n": 1}, key=ANA)
    assert stored(cluster) == [("t", str(ANA), {"n": 1})]
    assert session.token


def test_an_event_lies_where_it_says_or_where_the_transaction_writes(cluster: Cluster) -> None:
    with cluster.writer() as session:
        session.add(User(id=ANA, name="ana"))
        session.emit("beside", 1, key="a text")
        session.commit()
        session.emit("nowhere", 2)
        with pytest.raises(NoShardKeyError, match="near="):
            session.commit()
    assert [row[0] for row in stored(cluster)] == ["beside"]


@pytest.mark.parametrize(
    ("topic", "payload", "options", "error"),
    [
        ("t", "x" * 70_000, {"key": ANA}, EventTooLargeError),
        ("t", object(), {"key": ANA}, InvalidEventError),
        ("t", float("nan"), {"key": ANA}, InvalidEventError),
        ("t", 1, {"key": "a\0b", "near": ANA}, InvalidEventError),
        ("t", 1, {"key": "\ud800", "near": ANA}, InvalidEventError),
        ("t", 1, {"key": "k" * 501, "near": ANA}, InvalidEventError),
        ("t", 1, {"key": 1.5, "near": ANA}, InvalidEventError),
        ("t", 1, {"key": True}, InvalidEventError),
        ("", 1, {"key": ANA}, InvalidEventError),
        ("a\0b", 1, {"key": ANA}, InvalidEventError),
        ("t" * 201, 1, {"key": ANA}, InvalidEventError),
        (None, 1, {"key": ANA}, InvalidEventError),
        ("t", 1, {"near": "text"}, InvalidEventError),
        ("t", 1, {"near": -1}, InvalidShardKeyError),
        ("t", 1, {"key": ids.compose(1, 8000, 0)}, InvalidShardKeyError),
    ],
)
def test_what_cannot_be_stored_is_refused_at_once(
    cluster: Cluster, topic: Any, payload: Any, options: Any, error: type[Exception]
) -> None:
    with cluster.writer() as session:
        with pytest.raises(error):
            session.emit(topic, payload, **options)
        session.emit("good", 1, key=ANA)
        session.commit()
    assert [row[0] for row in stored(cluster)] == ["good"]


def test_an_event_on_another_physical_shard_is_refused_before_it_is_written(
    cluster: Cluster,
) -> None:
    with cluster.writer() as session:
        session.add(User(id=ANA, name="ana"))
        session.flush()
        with pytest.raises(CrossShardWriteError):
            session.emit("t", 1, key=FAR)


def test_a_transaction_waits_for_another_one_with_events_of_its_key_and_no_other(
    cluster: Cluster,
) -> None:
    def commit(key: int, payload: str) -> None:
        with cluster.writer() as session:
            session.emit("t", payload, key=key, near=ANA)
            session.commit()

    with cluster.writer() as first, ThreadPoolExecutor(1) as pool:
        first.emit("t", "first", key=ANA)
        first._events.send(with_commit=False)
        commit(ANA + 1, "another key")
        second = pool.submit(commit, ANA, "second")
        wait_until(lambda: waits_for_lock(cluster), 10.0, "the second one waits")
        assert not second.done()
        first.commit()
        second.result(10.0)
    assert [row[2] for row in stored(cluster)] == ["first", "another key", "second"]


def waits_for_lock(cluster: Cluster) -> bool:
    physical = cluster.topology.physical[cluster.topology.shard_map.owner(5)]
    with admin(physical) as connection:
        query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        row = connection.execute(query).fetchone()
    return row is not None and row[0] == 1


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_events_of_a_key_become_visible_in_the_order_of_delivery(
    cluster: Cluster, isolation: str
) -> None:
    """An observer never sees an event before one that it sees later at an earlier position."""
    writers, each = 4, 40
    barrier = threading.Barrier(writers)

    def write(number: int) -> None:
        barrier.wait()
        for n in range(each):
            with cluster.writer() as session:
                session.emit("t", [number, n, 0], key=ANA)
                session._connection_to(5).exec_driver_sql(
                    f"SET TRANSACTION ISOLATION LEVEL {isolation}"
                )
                session.emit("t", [number, n, 1], key=ANA)
                session.commit()

    physical = cluster.topology.physical[cluster.topology.shard_map.owner(5)]
    observed: list[int] = []
    with ThreadPoolExecutor(writers) as pool, admin(physical) as connection:
        jobs = [pool.submit(write, number) for number in range(writers)]
        while len(observed) < 2 * writers * each:
            ended = all(job.done() for job in jobs)
            rows = connection.execute("SELECT position FROM shard_0005.shardkit_outbox")
            known = set(observed)
            fresh = sorted(int(str(row[0])) for row in rows if row[0] not in known)
            assert not fresh or not observed or fresh[0] > max(observed)
            observed += fresh
            assert not ended or len(observed) == 2 * writers * each
        for job in jobs:
            job.result()
    payloads: Any = [row[2] for row in stored(cluster)]
    pairs = zip(payloads[::2], payloads[1::2], strict=True)
    assert all(a[:2] == b[:2] for a, b in pairs), "events of one transaction stay together"
    for number in range(writers):
        assert [p[1] for p in payloads[::2] if p[0] == number] == list(range(each))


def test_a_logical_shard_that_is_being_moved_takes_no_events(cluster: Cluster) -> None:
    """Also when the event travels with COMMIT; nothing of the transaction is kept."""
    cluster.connections.ids = IdMinter(cluster.connections.lease_ids, block_ttl=600.0)
    emit(cluster, 0)
    emit(cluster, 0)
    with admin(physical_of(cluster)) as connection:
        connection.execute(STATE, ["fenced"])
        try:
            for writes in (True, False):
                with cluster.writer() as session:
                    if writes:
                        session.add(User(id=ANA, name="ana"))
                    session.emit("t", 1, key=ANA)
                    with pytest.raises(UnavailableError, match="no events now") as caught:
                        session.commit()
                    assert caught.value.logical_shard == 5
        finally:
            connection.execute(STATE, ["active"])
    assert [row[2] for row in stored(cluster)] == [0, 0]
    with cluster.reader(after="all") as session:
        assert session.get(User, ANA) is None


# -- delivery


def test_an_event_that_fails_is_tried_again_and_then_given_up(cluster: Cluster) -> None:
    calls: list[tuple[Any, int]] = []

    def handler(event: Event) -> None:
        calls.append((event.payload, event.attempts))
        if event.payload == "poison":
            raise ValueError("no\0t today")

    emit(cluster, "poison", "behind")
    emit(cluster, "beside", key=BEN)
    relay = Relay(cluster, {"t": handler}, backoff=QUICK)
    assert relay.drain() == 2
    assert [payload for payload, _ in calls].index("beside") <= 1, "others go on"
    assert [c for c in calls if c[0] != "beside"] == [
        ("poison", 0), ("poison", 1), ("poison", 2), ("behind", 0),
    ]  # fmt: skip
    assert stored(cluster) == []
    assert [row[2] for row in stored(cluster, table="shardkit_outbox_dead")] == ["poison"]


def test_later_events_of_a_key_wait_while_one_is_paused(cluster: Cluster) -> None:
    seen = Seen()

    def handler(event: Event) -> None:
        if event.payload == "first" and not event.attempts:
            raise ValueError
        seen(event)

    emit(cluster, "first", "second")
    emit(cluster, "other", key=BEN)
    relay = Relay(cluster, {"t": handler}, backoff=Backoff(first=3600, longest=3600))
    relay.drain()
    emit(cluster, "third")
    relay.drain()
    assert seen == ["other"]
    with admin(physical_of(cluster)) as connection:
        connection.execute("UPDATE shard_0005.shardkit_outbox_retry SET due = now()")
    relay.drain()
    assert seen == ["other", "first", "second", "third"]


def physical_of(cluster: Cluster, shard: int = 5) -> Any:
    return cluster.topology.physical[cluster.topology.shard_map.owner(shard)]


def test_an_unknown_topic_is_a_dead_letter_at_once(cluster: Cluster) -> None:
    seen = Seen()
    emit(cluster, "lost", topic="unknown")
    emit(cluster, "kept")
    Relay(cluster, {"t": seen}).drain()
    assert seen == ["kept"]
    assert [row[0] for row in stored(cluster, table="shardkit_outbox_dead")] == ["unknown"]


def test_a_handler_may_emit(cluster: Cluster) -> None:
    seen = Seen()
    relay = Relay(cluster)
    relay.on("second")(seen)

    @relay.on("first")
    def handler(event: Event) -> None:
        with cluster.writer() as session:
            session.emit("second", event.payload + 1, key=event.key, near=ANA)
            session.commit()

    emit(cluster, 1, 2, topic="first")
    relay.drain()
    assert seen == [2, 3]


def test_a_handler_that_hangs_is_left_alone_and_others_go_on(cluster: Cluster) -> None:
    seen, release = Seen(), threading.Event()

    def handler(event: Event) -> None:
        if event.payload == "hangs":
            release.wait(30)
        else:
            seen(event)

    emit(cluster, "hangs", "behind")
    emit(cluster, "other", key=BEN)
    relay = Relay(cluster, {"t": handler}, deadline=0.2, backoff=Backoff(0.0, 0.0, attempts=2))
    try:
        relay.drain()
    finally:
        release.set()
    assert sorted(seen) == ["behind", "other"]
    with admin(physical_of(cluster)) as connection:
        row = connection.execute("SELECT error FROM shard_0005.shardkit_outbox_dead").fetchone()
    assert row is not None
    assert "HandlerTimeoutError" in str(row[0])


def test_a_batch_handler_is_given_lists_and_isolates_what_fails(cluster: Cluster) -> None:
    calls: list[list[Any]] = []
    relay = Relay(cluster, backoff=QUICK)

    @relay.on("t", batch=3)
    def handler(events: list[Event]) -> None:
        calls.append([event.payload for event in events])
        if "poison" in calls[-1]:
            raise ValueError

    emit(cluster, 1, 2, 3, 4)
    relay.drain()
    assert calls == [[1, 2, 3], [4]]
    calls.clear()
    for key, payload in enumerate(["a", "poison", "b"]):
        emit(cluster, payload, key=str(key))
    relay.drain()
    assert calls == [["a", "poison", "b"], ["a"], ["poison"], ["b"], ["poison"], ["poison"]]


def test_threads_keep_the_order_of_each_key(cluster: Cluster) -> None:
    seen: dict[str | None, list[Any]] = {}

    def handler(event: Event) -> None:
        seen.setdefault(event.key, []).append(event.payload)

    for n in range(30):
        emit(cluster, n, key=str(n % 5))
    assert Relay(cluster, {"t": handler}, threads=4, batch=7).drain() == 30
    assert seen == {str(k): list(range(k, 30, 5)) for k in range(5)}


def test_an_effect_happens_once_however_often_it_is_delivered(cluster: Cluster) -> None:
    calls = []
    with cluster.writer() as session:
        session.add(User(id=BEN, name="ben"))
        session.commit()

    @once(cluster.writer, near=lambda _: BEN)
    def handler(session: Any, event: Event) -> None:
        calls.append(event.payload)
        session.get_one(User, BEN).name += "!"

    def twice(event: Event) -> None:
        handler(event)
        handler(event)
        if not event.attempts:
            raise ValueError("after the effect")

    emit(cluster, 1)
    Relay(cluster, {"t": twice}, backoff=QUICK).drain()
    assert calls == [1]
    with cluster.writer() as session:
        assert session.get_one(User, BEN).name == "ben!"


def test_an_effect_that_is_rolled_back_is_tried_again(cluster: Cluster) -> None:
    emit(cluster, 1)
    tries = []

    @once(cluster.writer, near=lambda _: ANA)
    def handler(session: Any, event: Event) -> None:
        session.add(User(id=ANA, name="ana"))
        session.flush()
        tries.append(event.attempts)
        if not event.attempts:
            raise ValueError

    assert Relay(cluster, {"t": handler}, backoff=QUICK).drain() == 1
    assert tries == [0, 1]


# -- several relays


def test_a_relay_that_thaws_after_its_lease_finishes_nothing(cluster: Cluster) -> None:
    seen, frozen, thaw = Seen(), threading.Event(), threading.Event()

    def freeze(_: Event) -> None:
        if not frozen.is_set():
            frozen.set()
            thaw.wait(30)

    emit(cluster, 1, 2, 3)
    slow = Relay(cluster, {"t": freeze}, lease=60.0)
    quick = Relay(cluster, {"t": seen})
    with ThreadPoolExecutor(1) as pool:
        drained = pool.submit(slow.drain)
        assert frozen.wait(10)
        assert quick.drain() == 0, "its lease holds"
        with admin(physical_of(cluster)) as connection:
            connection.execute(
                "UPDATE shardkit.outbox_lease SET expires = now() WHERE owner IS NOT NULL"
            )
        assert quick.drain() == 3
        emit(cluster, 4)
        thaw.set()
        drained.result(10)
    assert seen == [1, 2, 3]
    assert [row[2] for row in stored(cluster)] in ([4], [])


@pytest.mark.unpooled("nobody sees a relay behind a pooler end, so its claims last for their lease")
def test_a_claim_is_void_once_its_logical_shard_has_another_epoch(cluster: Cluster) -> None:
    epochs = []

    def move(event: Event) -> None:
        epochs.append(event.payload)
        if len(epochs) == 1:
            with admin(physical_of(cluster)) as connection:
                connection.execute(
                    "UPDATE shardkit.ownership SET epoch = 2 WHERE logical_shard = 5"
                )

    emit(cluster, 1)
    relay = Relay(cluster, {"t": move})
    try:
        assert relay.drain() == 1, "what it did first was not acknowledged"
        assert stored(cluster) == []
    finally:
        with admin(physical_of(cluster)) as connection:
            connection.execute("UPDATE shardkit.ownership SET epoch = 1 WHERE logical_shard = 5")
    assert epochs == [1, 1], "it was delivered again, under the new epoch and at once"


def test_positions_go_on_growing_when_the_logical_shard_has_another_epoch(
    cluster: Cluster,
) -> None:
    emit(cluster, 1)
    with admin(physical_of(cluster)) as connection:
        connection.execute("UPDATE shardkit.ownership SET epoch = 2 WHERE logical_shard = 5")
        connection.execute("ALTER SEQUENCE shardkit.outbox_position RESTART")
        try:
            emit(cluster, 2)
            seen = Seen()
            Relay(cluster, {"t": seen}).drain()
            assert seen == [1, 2]
        finally:
            connection.execute("UPDATE shardkit.ownership SET epoch = 1 WHERE logical_shard = 5")


def test_a_logical_shard_that_is_fenced_does_not_stop_the_others(cluster: Cluster) -> None:
    role = physical_of(cluster).primary.url.username
    seen = Seen()

    def handler(event: Event) -> None:
        seen(event)
        if event.payload == "fenced":
            with admin(physical_of(cluster)) as connection:
                connection.execute(
                    f"REVOKE INSERT, DELETE ON shard_0005.shardkit_outbox FROM {role}"
                )
                connection.execute(STATE, ["fenced"])

    emit(cluster, "fenced")
    with cluster.writer() as session:
        session.emit("t", "open", key=BEN)
        session.commit()
    try:
        assert Relay(cluster, {"t": handler}).drain() == 1
    finally:
        with admin(physical_of(cluster)) as connection:
            connection.execute(f"GRANT INSERT, DELETE ON shard_0005.shardkit_outbox TO {role}")
            connection.execute(STATE, ["active"])
    assert sorted(seen) == ["fenced", "open"]
    assert [row[2] for row in stored(cluster)] == ["fenced"]
    assert stored(cluster, 6) == []


@pytest.mark.unpooled("LISTEN and locks of a session: a relay behind a pooler polls")
def test_a_relay_that_sleeps_is_woken_by_a_commit(cluster: Cluster) -> None:
    seen = Seen()
    with Relay(cluster, {"t": seen}, poll=60.0):
        wait_until(lambda: sleepers(cluster) == 2, 10.0, "both servers' loops sleep")
        emit(cluster, "ring")
        wait_until(lambda: seen == ["ring"], 10.0, "it wakes long before it would look")
        wait_until(lambda: sleepers(cluster) == 2, 10.0, "they sleep again")
        emit(cluster, "ring")
        wait_until(lambda: seen == ["ring", "ring"], 10.0, "it wakes again")


def sleepers(cluster: Cluster) -> int:
    count = 0
    for shard in cluster.topology.physical.values():
        with admin(shard) as connection:
            row = connection.execute(
                "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted"
                " AND mode = 'ExclusiveLock' AND objsubid = 1 AND classid::bigint << 32"
                " | objid::bigint = %s",
                [SLEEPING],
            ).fetchone()
            count += int(str(row[0])) if row else 0
    return count


@pytest.mark.anyio
async def test_the_async_session_emits_and_async_handlers_are_awaited(
    cluster: Cluster, cluster_file: Path
) -> None:
    stop = threading.Event()
    done: list[str] = []
    async with AsyncCluster.from_file(cluster_file) as twin:
        async with twin.writer() as session:
            session.add(User(id=ANA, name="ana"))
            session.emit("t", "x", key=ANA)
            await session.commit()
        relay = Relay(twin)

        @relay.on("t")
        async def handler(event: Event) -> None:
            async with twin.writer() as session:
                if await session.once(event, near=ANA):
                    (await session.get_one(User, ANA)).name = event.payload
                    await session.commit()
            done.append(event.payload)
            stop.set()

        await relay.run_async(stop)
        async with twin.writer() as session:
            assert (await session.get_one(User, ANA)).name == "x"
    assert done == ["x"]
    assert stored(cluster) == []


def test_old_notes_of_effects_are_deleted(cluster: Cluster) -> None:
    with cluster.writer() as session:
        session.once(Event(1, "t", None, 0, None, 0, 5), near=ANA)  # type: ignore[arg-type]
        session.commit()
    with Relay(cluster, retention=0.0):
        wait_until(lambda: not effects(cluster), 20.0, "the note is gone")


def effects(cluster: Cluster) -> list[Any]:
    with admin(physical_of(cluster)) as connection:
        return connection.execute("SELECT * FROM shard_0005.shardkit_effects").fetchall()
