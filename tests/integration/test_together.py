"""Effects of several events in one transaction are those of one transaction each."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select, text

from shardkit import Cluster, WriteSession, ids
from shardkit.events import Committed
from shardkit.outbox import Backoff, Event, Once, once
from shardkit.relay import Relay
from shardkit.testing import wait_until
from tests.fixtures.sharded import admin
from tests.models import Photo, Reading, User

pytestmark = pytest.mark.integration

Handler = Callable[[WriteSession, Event], None]

ANA = ids.compose(1, 3, 0)
FAR = ids.compose(1, 40, 0)
AGAIN = Backoff(0.0, 0.0, attempts=3)


def place(event: Event) -> int:
    """Readings below 1000 are on logical shard 3, others on 40, of another server."""
    return ANA if event.payload < 1_000 else FAR


def add(session: WriteSession, event: Event) -> None:
    session.add(Reading(meter=event.payload, value=event.attempts))


def emit(cluster: Cluster, *payloads: int, key: int | str | None = ANA) -> None:
    with cluster.writer() as session:
        for payload in payloads:
            session.emit("t", payload, key=key, near=ANA)
        session.commit()


def deliver(cluster: Cluster, handler: Handler, **options: Any) -> tuple[int, list[str]]:
    """Drain; return how many events were delivered and the servers that were written to."""
    written: list[str] = []

    def listener(told: object) -> None:
        if isinstance(told, Committed):
            written.extend(told.physical)

    relay = Relay(cluster, backoff=AGAIN, **options)
    relay.on("t")(once(cluster.writer, near=place)(handler))
    silence = cluster.listen(listener)
    try:
        return relay.drain(), written
    finally:
        silence()


def readings(cluster: Cluster) -> dict[int, int]:
    found: dict[int, int] = {}
    with cluster.writer() as session:
        for meter in (0, 1_000):
            rows = session.scalars(
                select(Reading).where(Reading.meter.in_(range(meter, meter + 500)))
            )
            found |= {row.meter: row.value for row in rows}
    return found


def notes(cluster: Cluster) -> int:
    total = 0
    for shard in (3, 40):
        physical = cluster.topology.physical[cluster.topology.shard_map.owner(shard)]
        with admin(physical) as connection:
            query = f"SELECT count(*) FROM shard_{shard:04}.shardkit_effects"
            row = connection.execute(query.encode()).fetchone()
            assert row is not None
            total += int(str(row[0]))
    return total


def test_many_effects_share_few_transactions_in_the_order_of_their_events(cluster: Cluster) -> None:
    seen: list[int] = []

    def handler(session: WriteSession, event: Event) -> None:
        seen.append(event.payload)
        add(session, event)

    emit(cluster, *range(200))
    delivered, written = deliver(cluster, handler)
    assert delivered == 200
    assert seen == list(range(200))
    assert readings(cluster) == dict.fromkeys(range(200), 0)
    assert notes(cluster) == 200
    assert len(written) < 100


def test_what_fails_takes_nobody_with_it(cluster: Cluster) -> None:
    def handler(session: WriteSession, event: Event) -> None:
        add(session, event)
        if event.payload == 5:
            raise ValueError("a poison")

    emit(cluster, *range(10), key=None)
    delivered, _ = deliver(cluster, handler)
    assert delivered == 9
    assert readings(cluster) == dict.fromkeys({*range(10)} - {5}, 0)
    assert notes(cluster) == 9
    with admin(cluster.topology.physical[cluster.topology.shard_map.owner(3)]) as connection:
        dead = connection.execute(
            "SELECT payload, attempts FROM shard_0003.shardkit_outbox_dead"
        ).fetchall()
    assert dead == [(5, 3)]


def test_a_row_that_cannot_be_stored_is_its_own_events_failure(cluster: Cluster) -> None:
    """New rows are sent late, together: the error comes up in another event's turn."""
    with cluster.writer() as session:
        session.add(Reading(meter=3, value=9))
        session.commit()
    emit(cluster, *range(10), key=None)
    delivered, _ = deliver(cluster, add)
    assert delivered == 9
    assert readings(cluster) == dict.fromkeys(range(10), 0) | {3: 9}


def commit(session: WriteSession) -> None:
    session.commit()


def rollback(session: WriteSession) -> None:
    session.rollback()


def forget(session: WriteSession) -> None:
    session.expunge_all()


def leave_open(session: WriteSession) -> None:
    session.begin_nested()


@pytest.mark.parametrize("intrude", [commit, rollback, forget, leave_open])
def test_a_handler_that_ends_the_transaction_undoes_no_other_effect(
    cluster: Cluster, intrude: Callable[[WriteSession], None]
) -> None:
    def handler(session: WriteSession, event: Event) -> None:
        if event.payload == 5:
            intrude(session)
        else:
            add(session, event)

    emit(cluster, *range(10))
    delivered, _ = deliver(cluster, handler)
    assert delivered == 10
    assert readings(cluster) == dict.fromkeys({*range(10)} - {5}, 0)


def test_a_handler_sees_what_those_before_it_did_and_what_others_commit(cluster: Cluster) -> None:
    with cluster.writer() as session:
        session.add(User(id=ANA, name="ana"))
        session.commit()
    seen: list[Any] = []
    bind = {"logical_shard": 3}

    def handler(session: WriteSession, event: Event) -> None:
        count = text("SELECT count(*) FROM shard_0003.readings")
        there = session.get(Reading, event.payload - 1)
        seen.append(
            (
                session.execute(count, bind_arguments=bind).scalar(),
                None if there is None else there.meter,
                session.get_one(User, ANA).name,
            )
        )
        add(session, event)
        with cluster.writer() as other:
            other.get_one(User, ANA).name = str(event.payload)
            other.commit()

    emit(cluster, 0, 1, 2)
    delivered, _ = deliver(cluster, handler)
    assert delivered == 3
    assert seen == [(0, None, "ana"), (1, 0, "0"), (2, 1, "1")]


def test_events_of_a_key_keep_their_order_over_servers(cluster: Cluster) -> None:
    seen: dict[str, list[int]] = {"a": [], "b": []}

    def handler(session: WriteSession, event: Event) -> None:
        seen[str(event.key)].append(event.payload)
        add(session, event)

    for payload in range(20):
        emit(cluster, (0 if payload % 3 else 1_000) + payload, key="a")
        emit(cluster, (100 if payload % 2 else 1_100) + payload, key="b")
    delivered, _ = deliver(cluster, handler)
    assert delivered == 40
    assert [payload % 100 for payload in seen["a"]] == list(range(20))
    assert [payload % 100 for payload in seen["b"]] == list(range(20))
    assert len(readings(cluster)) == 40


def test_what_takes_too_long_is_committed_and_the_rest_left(cluster: Cluster) -> None:
    emit(cluster, 0, 1, 2)
    events: list[Event] = []
    Relay(cluster, {"t": events.append}).drain()
    handler: Once[[]] = once(cluster.writer, near=place)(add)
    begun: list[int] = []

    def run(late_after: int) -> list[int]:
        handled = handler.run_together(
            events,
            begin=lambda _session, event: begun.append(event.payload),
            is_late=lambda: len(begun) >= late_after,
        )
        return [event.payload for event in handled]

    assert run(1) == [0], "one at least"
    assert (readings(cluster), notes(cluster)) == ({0: 0}, 1)
    assert run(4) == [0, 1, 2], "what had its effect is passed over"
    assert begun == [0, 0, 1, 2]
    assert (readings(cluster), notes(cluster)) == (dict.fromkeys(range(3), 0), 3)


def hands() -> set[threading.Thread]:
    return {each for each in threading.enumerate() if each.name == "shardkit relay"}


def test_a_handler_that_hangs_keeps_no_effect_of_others(cluster: Cluster) -> None:
    release = threading.Event()
    of_others = hands()

    def handler(session: WriteSession, event: Event) -> None:
        add(session, event)
        session.flush()
        if event.payload == 2:
            release.wait(60)

    emit(cluster, *range(5), key=None)
    try:
        delivered, _ = deliver(cluster, handler, deadline=0.5)
        found = set(readings(cluster))
    finally:
        release.set()
        wait_until(
            lambda: hands() <= of_others, 120.0, "the threads that were left to themselves end"
        )
    assert delivered == 4
    assert found == {0, 1, 3, 4}


def test_emitted_events_keep_the_order_of_the_effects_that_emit(cluster: Cluster) -> None:
    emit(cluster, *range(10))
    with cluster.writer() as session:
        session.add(User(id=ANA, name="ana"))
        session.commit()
    seen: list[int] = []

    def handler(session: WriteSession, event: Event) -> None:
        session.add(Photo(owner_id=ANA, rank=event.payload))
        session.emit("next", event.payload, key=ANA)

    handlers = {"next": lambda event: seen.append(event.payload)}
    delivered, _ = deliver(cluster, handler, handlers=handlers)
    assert delivered == 20
    assert seen == list(range(10))
