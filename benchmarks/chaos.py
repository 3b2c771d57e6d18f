"""Does an event get lost, happen twice or come out of order when workers die? `make outbox-chaos`.

Two processes emit events, 40 in each transaction, one for each key of a logical shard; every
twentieth transaction is rolled back after it has emitted. What is emitted is the next number of
the key, counted in a row that the transaction locks, so the numbers of a key are in the order of
commit whatever the outbox does. Two relays deliver; every two seconds one of them is killed
(SIGKILL) and started again. The effect, on a logical shard of the other server, is a row for each
key to which each number is appended. So afterwards that row says what was lost, doubled or out of
order.

Beside it, Celery on Redis with the same effect and the same kills: a task for each event, sent
after COMMIT, `acks_late`, `reject_on_worker_lost` and a visibility timeout of ten seconds, so
that what a killed worker had is delivered again. Celery promises neither order nor once.
"""

from __future__ import annotations

import itertools
import multiprocessing
import random
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

from sqlalchemy import ARRAY, BigInteger, Text, bindparam, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from benchmarks.measure import connect, database, report, servers
from shardkit import Cluster, Sharded, ids
from shardkit.config import load
from shardkit.outbox import Event
from shardkit.relay import Relay
from shardkit.testing import wait_until
from shardkit.topology import Topology, schema_name

__all__ = ["Outcome", "Trial", "run"]

KEYS = 40
EMITTERS, RELAYS = 2, 2
ROLLED_BACK_EVERY = 20
TIMEOUT = 3600.0


class Base(DeclarativeBase):
    """Models of the run."""


class Source(Sharded, Base):
    """The last number of a key that was emitted."""

    __tablename__ = "sources"
    __shard_key__ = "owner_id"
    owner_id: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(default=0)


class Effect(Sharded, Base):
    """The numbers of a key, in the order in which they arrived."""

    __tablename__ = "arrivals"
    __shard_key__ = "owner_id"
    owner_id: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[int] = mapped_column(primary_key=True)
    numbers: Mapped[str] = mapped_column(default="")


# Row locks, in one order.
COUNT = (
    "WITH locked AS (SELECT key FROM {s}.sources WHERE owner_id = :owner ORDER BY key FOR UPDATE)"
    " UPDATE {s}.sources AS s SET number = number + 1 FROM locked"
    " WHERE s.owner_id = :owner AND s.key = locked.key RETURNING s.key, s.number"
)

# Row locks on the keys of a batch, which are all of one logical shard and one relay's.
ARRIVE = (
    "UPDATE {s}.arrivals AS a SET numbers = a.numbers || e.numbers"
    " FROM unnest(:keys, :numbers) AS e (key, numbers) WHERE a.owner_id = :owner AND a.key = e.key"
)


@dataclass(frozen=True)
class Trial:
    """One run, in a form that other processes can be given.

    Attributes:
        topology: of two physical shards, whose database the run has to itself.
        n_events: how many are emitted, at least.
        kill_every: seconds between two kills.
        shards: logical shards that take part.
        batch: events that a relay claims at once.
        redis: address of Celery's broker.
    """

    topology: Topology
    n_events: int
    kill_every: float = 2.0
    shards: int = 64
    batch: int = 500
    redis: str = ""

    @property
    def n_transactions(self) -> int:
        """Committed transactions, all together."""
        return -(-self.n_events // KEYS)


@dataclass(frozen=True)
class Outcome:
    """What the rows say in the end.

    Attributes:
        n_events: emitted and committed.
        lost: events without effect.
        doubled: events with more than one.
        breaks: how often an effect did not follow the one before of its key.
        phantoms: effects of transactions that were rolled back.
        kills: workers killed.
        seconds: duration of the run.
    """

    n_events: int
    lost: int
    doubled: int
    breaks: int
    phantoms: int
    kills: int
    seconds: float


def owner(shard: int) -> int:
    return ids.compose(1, shard, 0)


def target(shard: int, total: int) -> int:
    """Return where the effects of a logical shard are: on the other server."""
    return (shard + total // 2) % total


def prepare(trial: Trial) -> None:
    with Cluster(trial.topology) as cluster:
        for shard in range(trial.shards):
            for kind, where in ((Source, shard), (Effect, target(shard, trial.shards))):
                with cluster.writer() as session:
                    session.add_all(kind(owner_id=owner(where), key=key) for key in range(KEYS))
                    session.commit()


def run(trial: Trial) -> Outcome:
    """Emit and deliver under kills, and count what went wrong."""
    prepare(trial)
    return _run(trial, emit_to_outbox, relay_work, lambda: remaining(trial) == 0)


def run_celery(trial: Trial) -> Outcome:
    """Do the same with tasks of Celery; in the end what is not acknowledged gets a minute."""
    import redis  # noqa: PLC0415  needed by this arm alone

    prepare(trial)
    client = redis.Redis.from_url(trial.redis)
    client.flushdb()

    def is_acknowledged() -> bool:
        return not client.llen("celery") and not client.hlen("unacked")

    def settle() -> None:
        with suppress(AssertionError):  # then it is lost, and counted
            wait_until(is_acknowledged, 60.0, "every task is acknowledged")

    with client:
        return _run(trial, emit_to_celery, celery_work, lambda: not client.llen("celery"), settle)


def _run(
    trial: Trial,
    emit: Callable[[Trial, int], None],
    work: Callable[[Trial], None],
    is_empty: Callable[[], bool],
    settle: Callable[[], None] = lambda: None,
) -> Outcome:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.chaos"])  # a new worker is there at once
    began = time.perf_counter()
    emitters = [context.Process(target=emit, args=(trial, number)) for number in range(EMITTERS)]

    def start() -> BaseProcess:
        worker = context.Process(target=work, args=(trial,))
        worker.start()
        return worker

    workers = [start() for _ in range(RELAYS)]
    kills = 0
    pause = threading.Event()
    chance = random.Random(7)
    try:
        for emitter in emitters:
            emitter.start()
        while any(emitter.is_alive() for emitter in emitters) or not is_empty():
            pause.wait(trial.kill_every)
            number = chance.randrange(RELAYS)
            assert workers[number].exitcode is None, "a worker ended by itself"
            workers[number].kill()
            workers[number].join()
            kills += 1
            workers[number] = start()
            assert time.perf_counter() - began < TIMEOUT, "it takes too long"
        for emitter in emitters:
            emitter.join()
            assert emitter.exitcode == 0, f"an emitter ended with {emitter.exitcode}"
        seconds = time.perf_counter() - began
        settle()
    finally:
        for process in (*emitters, *workers):
            process.kill()
    return judge(trial, kills, seconds)


def remaining(trial: Trial) -> int:
    """Return how many logical shards have events that are not delivered."""
    found = 0
    for name, shard in trial.topology.physical.items():
        with connect(shard) as raw:
            tests = " + ".join(
                f"(EXISTS (SELECT FROM {schema_name(n)}.shardkit_outbox))::int"
                for n in trial.topology.shard_map.owned_by(name)
            )
            row = raw.execute(f"SELECT {tests}".encode()).fetchone()
            assert row is not None
            found += row[0]
    return found


def judge(trial: Trial, kills: int, seconds: float) -> Outcome:
    last: dict[tuple[int, int], int] = {}
    arrived: dict[tuple[int, int], list[int]] = {}
    for name, shard in trial.topology.physical.items():
        with connect(shard) as raw:
            for n in trial.topology.shard_map.owned_by(name)[: trial.shards]:
                query = f"SELECT key, number FROM {schema_name(n)}.sources"
                last.update(((n, key), number) for key, number in raw.execute(query.encode()))
                query = f"SELECT key, numbers FROM {schema_name(n)}.arrivals"
                source = target(n, trial.shards)  # half a turn, so it leads back as well
                for key, numbers in raw.execute(query.encode()):
                    arrived[source, key] = [int(number) for number in numbers.split()]
    lost = doubled = breaks = phantoms = 0
    for place, number in last.items():
        found = arrived[place]
        lost += len(set(range(1, number + 1)) - set(found))
        doubled += len(found) - len(set(found))
        breaks += sum(b != a + 1 for a, b in itertools.pairwise([0, *found]))
        phantoms += sum(number < 0 for number in found)
    return Outcome(sum(last.values()), lost, doubled, breaks, phantoms, kills, seconds)


# -- in the processes


def transactions(trial: Trial, number: int) -> Sequence[tuple[int, bool]]:
    """Return logical shard and whether it is to be rolled back, of an emitter's transactions."""
    chance = random.Random(number)
    n = trial.n_transactions // EMITTERS + 1
    committed = [(chance.randrange(trial.shards), False) for _ in range(n)]
    rolled_back = [(chance.randrange(trial.shards), True) for _ in range(n // ROLLED_BACK_EVERY)]
    mixed = committed + rolled_back
    chance.shuffle(mixed)
    return mixed


def emit_to_outbox(trial: Trial, number: int) -> None:
    with Cluster(trial.topology) as cluster:
        for shard, is_rolled_back in transactions(trial, number):
            with cluster.writer() as session:
                rows = session.execute(
                    text(COUNT.format(s=schema_name(shard))),
                    {"owner": owner(shard)},
                    bind_arguments={"logical_shard": shard},
                ).all()
                for key, counted in rows:
                    payload = -counted if is_rolled_back else counted
                    session.emit("number", [shard, key, payload], key=key, near=owner(shard))
                if is_rolled_back:
                    session._events.send(with_commit=False)  # noqa: SLF001  stored, then undone
                    session.rollback()
                else:
                    session.commit()


def arrive(session: Any, trial: Trial, numbers: Sequence[Sequence[int]]) -> None:
    """Note numbers of keys of one logical shard, in the order in which they came."""
    if not numbers:
        return
    found: dict[int, list[int]] = {}
    for _, key, number in numbers:
        found.setdefault(key, []).append(number)
    place = target(numbers[0][0], trial.shards)
    texts = ["".join(f"{number} " for number in some) for some in found.values()]
    statement = text(ARRIVE.format(s=schema_name(place))).bindparams(
        bindparam("keys", type_=ARRAY(BigInteger)), bindparam("numbers", type_=ARRAY(Text))
    )
    session.execute(
        statement,
        {"owner": owner(place), "keys": list(found), "numbers": texts},
        bind_arguments={"logical_shard": place},
    )


def relay_work(trial: Trial) -> None:
    with Cluster(trial.topology) as cluster:
        relay = Relay(cluster, batch=trial.batch, lease=5.0)

        @relay.on("number", batch=trial.batch)
        def handle(events: list[Event]) -> None:
            place = target(events[0].logical_shard, trial.shards)
            with cluster.writer() as session:
                fresh = session.once_many(events, near=owner(place))
                arrive(session, trial, [event.payload for event in fresh])
                session.commit()

        relay.run()


def celery_app(trial: Trial) -> Any:
    import celery  # noqa: PLC0415  a peer, needed by this arm alone

    app = celery.Celery("chaos", broker=trial.redis)
    app.conf.update(
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_ignore_result=True,
        broker_connection_retry_on_startup=True,
        broker_transport_options={"visibility_timeout": 10},
    )
    return app


def emit_to_celery(trial: Trial, number: int) -> None:
    app = celery_app(trial)
    with Cluster(trial.topology) as cluster:
        for shard, is_rolled_back in transactions(trial, number):
            with cluster.writer() as session:
                statement = text(COUNT.format(s=schema_name(shard)))
                rows = session.execute(
                    statement, {"owner": owner(shard)}, bind_arguments={"logical_shard": shard}
                ).all()
                if is_rolled_back:  # nothing is sent before COMMIT
                    session.rollback()
                    continue
                session.commit()
            for key, counted in rows:
                app.send_task("number", args=[[shard, key, counted]])


def celery_work(trial: Trial) -> None:
    app = celery_app(trial)
    with Cluster(trial.topology) as cluster:

        def number(event: list[int]) -> None:
            place = target(event[0], trial.shards)
            with cluster.writer() as session:
                session._note_written((place,))  # noqa: SLF001  its SQL is text
                arrive(session, trial, [event])
                session.commit()

        app.task(name="number")(number)
        quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        app.worker_main(["--quiet", "worker", "--pool=solo", "--loglevel=CRITICAL", *quiet])


def main(*, as_json: bool, quick: bool = False) -> None:
    n_events, n_tasks = (50_000, 2_000) if quick else (1_000_000, 40_000)
    with servers(logical_shards=64, redis=True) as local:
        settings, topology = load(local.config_path)
        made = database(local, topology, "chaos", logical_shards=64, metadata=Base.metadata)
        outcome = run(Trial(made, n_events))
        other = database(local, topology, "celery", logical_shards=64, metadata=Base.metadata)
        peer = run_celery(Trial(other, n_tasks, redis=settings.services["redis"]))
    figures: dict[str, float] = {}
    for name, found in (("", outcome), ("celery_", peer)):
        figures |= {
            f"{name}events": found.n_events,
            f"{name}lost": found.lost,
            f"{name}doubled": found.doubled,
            f"{name}order_breaks": found.breaks,
            f"{name}from_rolled_back": found.phantoms,
            f"{name}kills": found.kills,
            f"{name}events_per_second": found.n_events / found.seconds,
        }
    targets = {
        "events": f"≥ {n_events}",
        "lost": "≤ 0",
        "doubled": "≤ 0",
        "order_breaks": "≤ 0",
        "from_rolled_back": "≤ 0",
    }
    medians = {"relays, the whole run": outcome.seconds, "Celery, the whole run": peer.seconds}
    report("chaos", figures, peers=("celery",), medians=medians, targets=targets, as_json=as_json)
