"""A relay is killed at every step, and nothing is lost, doubled or out of order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest

from benchmarks.chaos import Base as ChaosBase
from benchmarks.chaos import Trial, run
from benchmarks.measure import database
from shardkit import Cluster, WriteSession, ids
from shardkit.config import load
from shardkit.local import LocalCluster
from shardkit.ops.failover import adopt
from shardkit.outbox import Backoff, Event, once
from shardkit.relay import Relay
from shardkit.testing import FaultProxy, create_tables, reroute, wait_until
from shardkit.topology import Topology
from tests.fixtures.servers import NewCluster
from tests.fixtures.sharded import admin
from tests.models import Base, Photo, User

pytestmark = [pytest.mark.integration, pytest.mark.fault]

ANA = ids.compose(1, 5, 0)
FAR = ids.compose(1, 40, 0)
LEASE = 1.0
"""Seconds of a claim that is lost by freezing."""

STEPS = ["claimed", "before handler", "in effect", "after handler", "before finish", "finished"]


def relay_of(cluster: Cluster, *, together: bool) -> Relay:
    """Return a relay whose effect, on the other server, is one row for each event, in order."""
    relay = Relay(cluster, backoff=Backoff(0.0, 0.0, attempts=5))

    def shared(session: WriteSession, event: Event) -> None:
        session.add(Photo(owner_id=FAR, rank=event.payload))
        session.flush()
        relay.step("in effect")

    if together:
        relay.on("t")(once(cluster.writer, near=lambda _event: FAR)(shared))
        return relay

    @relay.on("t")
    def handler(event: Event) -> None:
        with cluster.writer() as session:
            if session.once(event, near=FAR):
                session.add(Photo(owner_id=FAR, rank=event.payload))
                session.flush()
                relay.step("in effect")
                session.commit()

    return relay


def work(config: Path, step: str, after: int, together: bool) -> None:
    """Deliver, and die at a step when it is reached for the given time."""
    reached = []

    def die(point: str) -> None:
        if point == step:
            reached.append(point)
            if len(reached) == after:
                os.kill(os.getpid(), signal.SIGKILL)

    with Cluster.from_file(config) as cluster:
        relay = relay_of(cluster, together=together)
        relay.step = die
        relay.drain()


def emit(cluster: Cluster, payloads: range) -> None:
    for payload in payloads:
        with cluster.writer() as session:
            session.emit("t", payload, key=ANA)
            session.commit()


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_a_relay_killed_at_a_step_leaves_its_work_to_the_next(
    cluster: Cluster, cluster_file: Path, step: str, *, together: bool
) -> None:
    context = multiprocessing.get_context("forkserver")
    with cluster.writer() as session:
        session.add(User(id=FAR, name="far"))
        session.commit()
    emit(cluster, range(5))
    after = 3 if step in {"before handler", "in effect", "after handler"} else 1
    if together and step == "after handler":
        after = 1  # it is reached when the transaction of all has been committed
    process = context.Process(target=work, args=(cluster_file, step, after, together))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    relay = relay_of(cluster, together=together)

    def is_empty() -> bool:
        relay.drain()
        return not waiting(cluster)

    wait_until(is_empty, 20.0, "the next relay gets the dead one's events long before its lease")
    with cluster.writer() as session:
        photos = session.query(Photo).filter_by(owner_id=FAR).order_by(Photo.id).all()
        assert [photo.rank for photo in photos] == list(range(5))


def waiting(cluster: Cluster) -> list[Any]:
    physical = cluster.topology.physical[cluster.topology.shard_map.owner(5)]
    with admin(physical) as connection:
        return connection.execute("SELECT id FROM shard_0005.shardkit_outbox").fetchall()


def work_poison(config: Path) -> None:
    with Cluster.from_file(config) as cluster:

        def handler(event: Event) -> None:
            if event.payload == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        Relay(cluster, {"t": handler}, backoff=Backoff(0.0, 0.0, attempts=2)).drain()


@pytest.mark.slow
def test_an_event_that_kills_its_relay_is_found_out_and_given_up(
    cluster: Cluster, cluster_file: Path
) -> None:
    context = multiprocessing.get_context("forkserver")
    emit(cluster, range(2))
    physical = cluster.topology.physical[cluster.topology.shard_map.owner(5)]
    for _ in range(20):
        process = context.Process(target=work_poison, args=(cluster_file,))
        process.start()
        process.join(60)
        with admin(physical) as connection:
            connection.execute("UPDATE shard_0005.shardkit_outbox_retry SET due = now()")
        if not waiting(cluster):
            break
    with admin(physical) as connection:
        dead = connection.execute(
            "SELECT payload, attempts FROM shard_0005.shardkit_outbox_dead"
        ).fetchall()
    assert waiting(cluster) == []
    assert [payload for payload, _ in dead] == [1]


def test_a_server_that_restarts_is_relayed_again(
    cluster: Cluster, topology: Topology, local_cluster: LocalCluster
) -> None:
    seen: list[Any] = []
    name = local_cluster.primary(topology.shard_map.owner(5)).name
    with Relay(cluster, {"t": lambda event: seen.append(event.payload)}):
        emit(cluster, range(1))
        wait_until(lambda: seen == [0], 10.0, "the first is delivered")
        local_cluster.kill_server(name)
        local_cluster.start_server(name)
        emit(cluster, range(1, 2))
        # At least once: the server may have been gone before the first was finished.
        wait_until(lambda: set(seen) == {0, 1}, 20.0, "the relay has found the server again")


def test_a_server_that_takes_no_writes_for_a_while_is_relayed_again(
    cluster: Cluster,
    topology: Topology,
    local_cluster: LocalCluster,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """So it is behind a pooler that leads to the old primary still; the relay once ended there."""
    seen: list[Any] = []
    dsn = local_cluster.superuser_dsn(local_cluster.primary(topology.shard_map.owner(5)).name)
    emit(cluster, range(1))
    with psycopg.connect(dsn, autocommit=True) as superuser:
        superuser.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        superuser.execute("SELECT pg_reload_conf()")
        try:
            with Relay(cluster, {"t": lambda event: seen.append(event.payload)}):
                wait_until(lambda: "read-only" in caplog.text, 20.0, "it is refused")
                superuser.execute("ALTER SYSTEM RESET default_transaction_read_only")
                superuser.execute("SELECT pg_reload_conf()")
                wait_until(lambda: set(seen) == {0}, 20.0, "the event is delivered")
        finally:
            superuser.execute("ALTER SYSTEM RESET default_transaction_read_only")
            superuser.execute("SELECT pg_reload_conf()")


@pytest.mark.slow
def test_the_run_under_kills_in_small(local_cluster: LocalCluster) -> None:
    """`make outbox-chaos`, which emits a million."""
    _, topology = load(local_cluster.config_path)
    made = database(local_cluster, topology, "chaos", logical_shards=8, metadata=ChaosBase.metadata)
    outcome = run(Trial(made, 2_000, kill_every=1.0, shards=8, batch=50))
    assert outcome.n_events >= 2_000
    assert outcome.kills >= 1
    assert (outcome.lost, outcome.doubled, outcome.breaks, outcome.phantoms) == (0, 0, 0, 0)


def work_frozen(config: Path, step: str, mark: Path) -> None:
    """Deliver, and freeze at a step when it is reached for the second time, until thawed."""
    reached = []

    def freeze(point: str) -> None:
        if point == step:
            reached.append(point)
            if len(reached) == (2 if "handler" in step else 1):
                mark.touch()
                # To this thread: it goes no step further, as it might when another is told.
                signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)

    with Cluster.from_file(config) as cluster:
        relay = relay_of(cluster, together=False)
        relay.lease = LEASE
        relay.step = freeze
        relay.drain()


@pytest.mark.parametrize("step", ["claimed", "before handler", "after handler", "before finish"])
def test_a_relay_frozen_past_its_lease_changes_nothing_when_it_thaws(
    cluster: Cluster, cluster_file: Path, tmp_path: Path, step: str
) -> None:
    with cluster.writer() as session:
        session.add(User(id=FAR, name="far"))
        session.commit()
    emit(cluster, range(5))
    mark = tmp_path / "frozen"
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=work_frozen, args=(cluster_file, step, mark))
    process.start()
    try:
        wait_until(mark.exists, 60.0, "the relay reaches the step")
        relay = relay_of(cluster, together=False)
        (held,) = fences(cluster)

        def is_empty() -> bool:
            relay.drain()
            return not waiting(cluster)

        wait_until(is_empty, 60.0, "another relay takes over when the lease has expired")
        assert fences(cluster)[0] > held, "the claim has another fencing number"
        emit(cluster, range(5, 8))  # in the outbox while the frozen one thaws
        assert process.pid is not None
        os.kill(process.pid, signal.SIGCONT)
        process.join(60)
        assert process.exitcode == 0, "to lose a claim is no error"
    finally:
        process.kill()
        process.join()
    wait_until(is_empty, 60.0, "what is left is delivered")
    with cluster.writer() as session:
        photos = session.query(Photo).filter_by(owner_id=FAR).order_by(Photo.id).all()
        assert [photo.rank for photo in photos] == list(range(8))
    with admin(cluster.topology.physical[cluster.topology.shard_map.owner(5)]) as connection:
        dead = connection.execute("SELECT id FROM shard_0005.shardkit_outbox_dead").fetchall()
    assert dead == []


def fences(cluster: Cluster) -> list[int]:
    physical = cluster.topology.physical[cluster.topology.shard_map.owner(5)]
    with admin(physical) as connection:
        rows = connection.execute(
            "SELECT fence FROM shardkit.outbox_lease WHERE logical_shard = 5"
        ).fetchall()
    return [int(str(row[0])) for row in rows]


def test_events_are_delivered_by_the_replica_that_takes_over(new_cluster: NewCluster) -> None:
    """The relay's endpoint is an address that moves, as one of a load balancer does."""
    with new_cluster(
        physical=1, replicas=1, logical_shards=8, redis=False, memcached=False, pgbouncer=False
    ) as local:
        config, topology = load(local.config_path)
        create_tables(topology, Base.metadata)
        physical = topology.physical["alpha"]
        seen: list[Any] = []
        held, go_on = threading.Event(), threading.Event()

        def handler(event: Event) -> None:
            if event.payload == 1:
                held.set()
                go_on.wait(60)
            seen.append(event.payload)

        url = physical.primary.url
        with FaultProxy(url.host, url.port) as proxy:
            moving = reroute(topology, {physical.primary: proxy})
            with (
                Cluster(topology) as writers,
                Cluster(moving) as cluster,
                Relay(cluster, {"t": handler}, lease=LEASE),
            ):
                emit_near(writers, range(3))
                assert held.wait(60), "the relay holds a claim"
                emit_near(writers, range(3, 5))
                wait_until(partial(has_all, local, 5), 60.0, "the replica has them")
                local.kill_server("alpha_0")
                with psycopg.connect(local.superuser_dsn("alpha_1"), autocommit=True) as superuser:
                    superuser.execute("SELECT pg_promote()")
                adopt(config, topology, "alpha")
                proxy.server = ("127.0.0.1", local.server("alpha_1").port)
                go_on.set()
                wait_until(lambda: len(set(seen)) == 5, 60.0, "all are delivered")
        # At least once, and each first time in order.
        assert list(dict.fromkeys(seen)) == list(range(5))


def emit_near(cluster: Cluster, payloads: range) -> None:
    for payload in payloads:
        with cluster.writer() as session:
            session.emit("t", payload, key="k", near=ids.compose(1, 5, 0))
            session.commit()


def has_all(local: LocalCluster, n: int) -> bool:
    with psycopg.connect(local.superuser_dsn("alpha_1"), autocommit=True) as replica:
        row = replica.execute("SELECT max(position) FROM shard_0005.shardkit_outbox").fetchone()
    return row is not None and row[0] is not None and int(row[0]) % (1 << 44) >= n
