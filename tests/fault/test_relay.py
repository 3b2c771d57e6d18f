"""A relay is killed at every step, and nothing is lost, doubled or out of order."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chaos import Base as ChaosBase
from benchmarks.chaos import Trial, run
from benchmarks.measure import database
from shardkit import Cluster, WriteSession, ids
from shardkit.config import load
from shardkit.local import LocalCluster
from shardkit.outbox import Backoff, Event, once
from shardkit.relay import Relay
from shardkit.testing import wait_until
from shardkit.topology import Topology
from tests.fixtures.sharded import admin
from tests.models import Photo, User

pytestmark = [pytest.mark.integration, pytest.mark.fault]

ANA = ids.compose(1, 5, 0)
FAR = ids.compose(1, 40, 0)
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
        wait_until(lambda: seen == [0, 1], 20.0, "the relay has found the server again")


def test_the_run_under_kills_in_small(local_cluster: LocalCluster) -> None:
    """`make outbox-chaos`, which emits a million."""
    _, topology = load(local_cluster.config_path)
    made = database(local_cluster, topology, "chaos", logical_shards=8, metadata=ChaosBase.metadata)
    outcome = run(Trial(made, 2_000, kill_every=1.0, shards=8, batch=50))
    assert outcome.n_events >= 2_000
    assert outcome.kills >= 1
    assert (outcome.lost, outcome.doubled, outcome.breaks, outcome.phantoms) == (0, 0, 0, 0)
