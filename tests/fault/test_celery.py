"""Events handed to Celery: a real worker, killed half-way, and the effect is there once."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import celery
import pytest
import redis

from shardkit import Cluster, ids
from shardkit.config import load
from shardkit.contrib.celery import to_celery
from shardkit.local import LocalCluster
from shardkit.outbox import Backoff
from shardkit.relay import Relay
from shardkit.testing import wait_until
from tests.fixtures.sharded import admin
from tests.models import Photo, User

pytestmark = [pytest.mark.integration, pytest.mark.fault, pytest.mark.slow]

ANA = ids.compose(1, 5, 0)
FAR = ids.compose(1, 40, 0)
ROOT = Path(__file__).parents[2]
QUEUE = "photos"
VISIBILITY = 1
"""Seconds after which a task is delivered again that nobody has acknowledged."""

# As a user's own would be. A task whose worker was killed is delivered again after a second.
WORKER = """
import sys

from celery import Celery
from shardkit import Cluster, ids
from shardkit.contrib.celery import event_of
from tests.models import Photo

FAR = {far}
cluster = Cluster.from_file({config!r})
app = Celery("photos", broker={broker!r})
app.conf.update(
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    task_ignore_result=True,
    worker_prefetch_multiplier=1,
    broker_connection_retry_on_startup=True,
    broker_transport_options={{
        "visibility_timeout": {visibility},
        "unacked_mail_interval": 1,
        # Held by a worker that is killed while it looks for what others left.
        "unacked_mutex_expire": 1,
    }},
)


@app.task(name="photos.add", bind=True)
def add(task, **arguments):
    event = event_of(arguments)
    assert task.request.id == f"shardkit-{{event.id}}"
    print("begins", event.payload, flush=True)
    if {freezes!r} == "before":
        sys.stdin.read()
    with cluster.writer() as session:
        if session.once(event, near=FAR):
            session.add(Photo(owner_id=FAR, rank=event.payload, caption=task.request.id))
            session.flush()
            if {freezes!r} == "inside":
                sys.stdin.read()
            session.commit()
            print("done", event.payload, flush=True)
    if {freezes!r} == "after":
        sys.stdin.read()
"""


@dataclass(frozen=True)
class Worker:
    """A worker of Celery in a process of its own."""

    process: subprocess.Popen[bytes]
    log: Path

    def wait_for(self, text: str, times: int = 1) -> None:
        """Wait until it has said something."""

        def has_said() -> bool:
            return self.log.read_text(errors="replace").count(text) >= times

        wait_until(has_said, 60.0, f"the worker says {text!r}; see {self.log}")


Start = Callable[..., Worker]


@pytest.fixture
def broker(local_cluster: LocalCluster) -> Iterator[str]:
    """A database of the cluster's Redis that nobody else uses."""
    url = load(local_cluster.config_path)[0].services["redis"].rstrip("/")
    url = f"{url.rsplit('/', 1)[0] if url.count('/') > 2 else url}/7"
    with redis.Redis.from_url(url) as client:
        client.flushdb()
        yield url
        client.flushdb()


@pytest.fixture
def start(cluster_file: Path, broker: str, tmp_path: Path) -> Iterator[Start]:
    """Start workers of Celery, each a process; they end with the test."""
    workers: list[Worker] = []

    def run(freezes: str = "") -> Worker:
        name = f"worker{len(workers)}"
        values = {
            "far": FAR,
            "visibility": VISIBILITY,
            "config": str(cluster_file),
            "broker": broker,
            "freezes": freezes,
        }
        tmp_path.joinpath(f"{name}.py").write_text(WORKER.format(**values))
        log = tmp_path / f"{name}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [
                    sys.executable, "-m", "celery", "-A", name, "worker", "--pool=solo",
                    "--without-gossip", "--without-mingle", "--loglevel=WARNING", "-Q", QUEUE,
                ],
                cwd=tmp_path,
                env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin"},
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        workers.append(Worker(process, log))
        return workers[-1]

    yield run
    for worker in workers:
        worker.process.kill()
        worker.process.communicate()


def relay_of(cluster: Cluster, broker: str) -> Relay:
    app = celery.Celery("sender", broker=broker)
    app.conf.broker_transport_options = {"socket_connect_timeout": 1, "max_retries": 0}
    relay = Relay(cluster, backoff=Backoff(0.0, 0.0, attempts=3))
    relay.on("photo.added")(to_celery(app, "photos.add", queue=QUEUE))
    return relay


def emit(cluster: Cluster, *payloads: Any) -> None:
    with cluster.writer() as session:
        if session.get(User, FAR) is None:
            session.add(User(id=FAR, name="far"))
            session.commit()
    with cluster.writer() as session:
        for payload in payloads:
            session.emit("photo.added", payload, key=ANA)
        session.commit()


def photos(cluster: Cluster) -> list[tuple[int | None, str]]:
    with cluster.writer() as session:
        found = session.query(Photo).filter_by(owner_id=FAR)
        return sorted((photo.rank, photo.caption) for photo in found)


def waiting(cluster: Cluster) -> list[tuple[int, str]]:
    """Return ids of events that are not delivered, and what was wrong with them."""
    physical = cluster.topology.physical[cluster.topology.shard_map.owner(5)]
    with admin(physical) as connection:
        rows = connection.execute(
            "SELECT o.id, coalesce(r.error, '') FROM shard_0005.shardkit_outbox AS o"
            " LEFT JOIN shard_0005.shardkit_outbox_retry AS r USING (id) ORDER BY o.position"
        ).fetchall()
    return [(int(str(number)), str(error)) for number, error in rows]


@pytest.mark.parametrize("freezes", ["before", "inside", "after"])
def test_a_worker_killed_half_way_leaves_the_effect_once(
    cluster: Cluster, broker: str, start: Start, freezes: str
) -> None:
    emit(cluster, 1, 2, 3)
    numbers = [f"shardkit-{number}" for number, _ in waiting(cluster)]
    assert relay_of(cluster, broker).drain() == 3
    victim = start(freezes)
    victim.wait_for("done" if freezes == "after" else "begins")
    victim.process.kill()
    victim.process.wait()
    with redis.Redis.from_url(broker) as client:

        def is_visible() -> bool:
            ((_, taken),) = client.zrange("unacked_index", 0, 0, withscores=True)
            return float(taken) + VISIBILITY < time.time()

        # Celery looks for it when it starts, and then every hundred seconds.
        wait_until(is_visible, 30.0, "the task may be delivered again")
    start()

    def is_done() -> bool:
        return len(photos(cluster)) >= 3

    wait_until(is_done, 90.0, "the next worker gets what the dead one had")
    with redis.Redis.from_url(broker) as client:

        def is_acknowledged() -> bool:
            return not client.llen(QUEUE) and not client.hlen("unacked")

        wait_until(is_acknowledged, 90.0, "every task is acknowledged")
    assert photos(cluster) == list(zip([1, 2, 3], numbers, strict=True))


def test_a_relay_that_dies_after_handing_over_does_it_again_and_the_effect_is_there_once(
    cluster: Cluster, broker: str, start: Start
) -> None:
    class Died(BaseException):
        """What kills this relay, as far as its thread can be killed."""

    def die(step: str) -> None:
        if step == "before finish":
            raise Died

    emit(cluster, 1, 2)
    relay = relay_of(cluster, broker)
    relay.step = die
    with pytest.raises(Died):
        relay.drain()
    assert len(waiting(cluster)) == 2

    def is_empty() -> bool:
        relay_of(cluster, broker).drain()
        return not waiting(cluster)

    wait_until(is_empty, 30.0, "the next relay hands over again")
    with redis.Redis.from_url(broker) as client:
        assert client.llen(QUEUE) == 4, "at least once"
        start().wait_for("done", times=2)
        wait_until(
            lambda: not client.llen(QUEUE) and not client.hlen("unacked"),
            60.0,
            "every task is acknowledged",
        )
    assert [rank for rank, _ in photos(cluster)] == [1, 2]


def test_a_broker_that_is_down_is_a_failure_of_the_event_and_not_a_loss(
    cluster: Cluster, broker: str
) -> None:
    emit(cluster, 1)
    dead = "redis://127.0.0.1:1/0"
    pausing = relay_of(cluster, dead)
    pausing.backoff = Backoff(3600.0, 3600.0, attempts=3)
    assert pausing.drain() == 0
    ((_, error),) = waiting(cluster)
    assert "OperationalError" in error
    physical = cluster.topology.physical[cluster.topology.shard_map.owner(5)]
    with admin(physical) as connection:
        connection.execute("UPDATE shard_0005.shardkit_outbox_retry SET due = now()")
    assert relay_of(cluster, broker).drain() == 1
    with redis.Redis.from_url(broker) as client:
        assert client.llen(QUEUE) == 1


def test_the_arguments_of_a_task_are_the_event(cluster: Cluster, broker: str) -> None:
    """As a worker would read them: through Celery's own JSON."""
    from shardkit.contrib.celery import event_of

    payload = {"é": [1, None, 2.5, "\0"]}
    emit(cluster, payload)
    ((number, _),) = waiting(cluster)
    relay_of(cluster, broker).drain()
    with celery.Celery("reader", broker=broker).connection_for_read() as connection:
        message = connection.SimpleQueue(QUEUE).get(timeout=30)
        message.ack()
    arguments = message.payload[1]
    event = event_of(arguments)
    assert (event.id, event.topic, event.key, event.payload) == (
        number, "photo.added", str(ANA), payload,
    )  # fmt: skip
    assert event.logical_shard == 5
    assert event.created.utcoffset() is not None
    assert message.headers["id"] == f"shardkit-{number}"
