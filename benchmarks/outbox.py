"""What an event costs the writer, and how fast relays deliver, beside other queues.

`emit_overhead`: a transaction that reads a row, adds one and emits an event, over the same one
without the event; interleaved, on a server that writes to disk (fsync). The least a transaction
can do is one INSERT; `emit_overhead_of_one_insert` is the same over that.

Jobs per second, each job with the same effect, one row in the same table of the same server, one
process: shardkit's relay (`relay`: a handler that is given lists; `one_by_one`: one that is given
one event at a time by `once`, which lets effects share a transaction; `own_transaction`: one
that opens a transaction for each event itself), one-row polling (SELECT … FOR UPDATE SKIP LOCKED
LIMIT 1, effect, DELETE, COMMIT), and procrastinate's own worker with one job at a time or ten,
whichever is quicker, and statistics that are up to date. shardkit's effects happen exactly
once; so do those of one-row polling; procrastinate's may happen twice after a crash.
`claim_of_a_million`: milliseconds of a claim from a backlog of 1,000,000 events of which nobody has
made statistics, and `hundredth_claim` after a hundred batches have left.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from benchmarks.measure import connect, database, interleaved, report, servers
from shardkit import Cluster, Sharded, WriteSession, ids
from shardkit.batches import Claims
from shardkit.config import load
from shardkit.outbox import Event, once
from shardkit.relay import Relay
from shardkit.topology import PhysicalShard, Topology, schema_name

PEERS = ("one-row polling", "procrastinate")
TARGETS = {
    "emit_overhead": "≤ 1.15",
    "relay_vs_one_row_polling": "≥ 10",
    "relay_vs_procrastinate": "≥ 3",
    "one_by_one_vs_one_row_polling": "≥ 1",
    "one_by_one_vs_procrastinate": "≥ 3",
    "claim_of_a_million_ms": "≤ 10",
    "hundredth_claim_ms": "≤ 10",
}
SHARD = 7
OWNER = ids.compose(1, SHARD, 0)


class Base(DeclarativeBase):
    """Models of the benchmark."""


class Photo(Sharded, Base):
    __tablename__ = "photos"
    __shard_key__ = "owner_id"
    owner_id: Mapped[int]
    caption: Mapped[str]


class Effect(Sharded, Base):
    __tablename__ = "effects"
    __shard_key__ = "owner_id"
    owner_id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)


ROW = f"INSERT INTO {schema_name(SHARD)}.effects (owner_id, number) VALUES ({OWNER}, %s)"


def emit_overhead(topology: Topology, rounds: int) -> dict[str, float]:
    """Return the medians of transactions with and without an event."""
    with Cluster(topology) as cluster:
        with cluster.writer() as session:
            session.add(Photo(owner_id=OWNER, caption="first"))
            session.commit()
            first = session.scalars(select(Photo).where(Photo.owner_id == OWNER)).first()
            assert first is not None
            key = first.id

        def run(*, reads: bool, emits: bool) -> None:
            with cluster.writer() as session:
                if reads:
                    session.get_one(Photo, key)
                session.add(Photo(owner_id=OWNER, caption="dawn"))
                if emits:
                    session.emit("photo.added", {"caption": "dawn"}, key=OWNER)
                session.commit()

        return interleaved(
            {
                "read, write": partial(run, reads=True, emits=False),
                "read, write, emit": partial(run, reads=True, emits=True),
                "write": partial(run, reads=False, emits=False),
                "write, emit": partial(run, reads=False, emits=True),
            },
            rounds=rounds,
        )


def rate(work: Callable[[], object], n: int) -> float:
    started = time.perf_counter()
    work()
    return n / (time.perf_counter() - started)


def count(shard: PhysicalShard) -> int:
    with connect(shard) as raw:
        row = raw.execute(f"SELECT count(*) FROM {schema_name(SHARD)}.effects".encode()).fetchone()
        assert row is not None
        return int(row[0])


def fill(cluster: Cluster, topic: str, numbers: Iterable[int]) -> None:
    """Emit events of a hundred keys, a hundred in each transaction."""
    with cluster.writer() as session:
        for number in numbers:
            session.emit(topic, number, key=f"key {number % 100}", near=OWNER)
            if number % 100 == 99:
                session.commit()
        session.commit()


def relay_rates(topology: Topology, numbers: list[range]) -> dict[str, float]:
    with Cluster(topology) as cluster:
        relay = Relay(cluster)

        @relay.on("many", batch=500)
        def many(events: list[Event]) -> None:
            with cluster.writer() as session:
                fresh = session.once_many(events, near=OWNER)
                if fresh:
                    rows = [{"owner_id": OWNER, "number": event.payload} for event in fresh]
                    session.execute(insert(Effect), rows)
                session.commit()

        @relay.on("one")
        @once(cluster.writer, near=lambda _event: OWNER)
        def one(session: WriteSession, event: Event) -> None:
            session.add(Effect(owner_id=OWNER, number=event.payload))

        @relay.on("own")
        def own(event: Event) -> None:
            with cluster.writer() as session:
                if session.once(event, near=OWNER):
                    session.add(Effect(owner_id=OWNER, number=event.payload))
                    session.commit()

        found = {}
        for topic, some in zip(("many", "one", "own"), numbers, strict=True):
            fill(cluster, topic, some)
            found[topic] = rate(relay.drain, len(some))
    return found


def polling_rate(shard: PhysicalShard, numbers: range) -> float:
    """Poll as most tutorials show it."""
    with connect(shard, admin=True) as admin:
        admin.execute(
            "CREATE TABLE public.jobs (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,"
            " payload jsonb NOT NULL)"
        )
        admin.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON public.jobs TO PUBLIC")
        admin.execute(
            "INSERT INTO public.jobs (payload)"
            " SELECT to_jsonb(n) FROM generate_series(%s::int, %s::int) AS n",
            (numbers.start, numbers.stop - 1),
        )

    def work() -> None:
        with connect(shard) as raw:
            while True:
                with raw.transaction():
                    row = raw.execute(
                        "SELECT id, payload FROM public.jobs ORDER BY id LIMIT 1"
                        " FOR UPDATE SKIP LOCKED"
                    ).fetchone()
                    if row is None:
                        return
                    raw.execute(ROW.encode(), (row[1],))
                    raw.execute("DELETE FROM public.jobs WHERE id = %s", (row[0],))

    return rate(work, len(numbers))


def procrastinate_rate(shard: PhysicalShard, numbers: range) -> float:
    """Return the better of its rates with one job at a time and with ten."""
    import procrastinate  # noqa: PLC0415  a peer, needed by this arm alone

    url = shard.admin_url.set(drivername="postgresql")
    dsn = url.render_as_string(hide_password=False)
    connector = procrastinate.PsycopgConnector(conninfo=dsn, min_size=12, max_size=12)
    app = procrastinate.App(connector=connector)

    async def effect(number: int) -> None:
        await connector.execute_query_async(ROW.replace("%s", "%(n)s"), n=number)

    task: Any = app.task(name="effect")(effect)

    async def work() -> float:
        async with app.open_async():
            await app.schema_manager.apply_schema_async()
            rates = []
            half = len(numbers) // 2
            for concurrency, some in ((1, numbers[:half]), (10, numbers[half:])):
                jobs = [{"number": number} for number in some]
                for start in range(0, len(jobs), 500):
                    await task.batch_defer_async(*jobs[start : start + 500])
                await connector.execute_query_async("ANALYZE procrastinate_jobs")
                started = time.perf_counter()
                await app.run_worker_async(
                    wait=False,
                    concurrency=concurrency,
                    install_signal_handlers=False,
                    listen_notify=False,
                    delete_jobs="always",
                )
                rates.append(len(jobs) / (time.perf_counter() - started))
            return max(rates)

    return asyncio.run(work())


def claims_of_a_million(shard: PhysicalShard) -> tuple[float, float]:
    """Return milliseconds of a claim of a hundred events: the first ten, and the hundredth."""
    table = f"{schema_name(SHARD)}.shardkit_outbox"
    with connect(shard, admin=True) as admin:
        admin.execute(
            f"INSERT INTO {table} (position, id, key, topic, payload)"
            " SELECT (2::bigint << 44) + n, n, 'key ' || n % 100000, 't', '{}'"
            " FROM generate_series(1, 1000000) AS n".encode()
        )
    claims = Claims(shard, lease=30.0)
    claims.take([SHARD + 1], now=0.0, n_shards=1, n_events=100)  # compiles the functions
    times = []
    for _ in range(100):
        started = time.perf_counter()
        batch = claims.take([SHARD], now=0.0, n_shards=1, n_events=100)
        times.append((time.perf_counter() - started) * 1000)
        assert len(batch.events) == 100
        claims.finish(batch, batch.events, now=0.0, release=True)
    claims.close()
    with connect(shard, admin=True) as admin:
        admin.execute(f"TRUNCATE {table}".encode())
    return statistics.median(times[:10]), statistics.median(times[-10:])


def main(*, as_json: bool, quick: bool = False) -> None:
    n = 5_000 if quick else 20_000
    medians: dict[str, float]
    with servers(physical=1, logical_shards=64, fsync=True) as local:
        _, topology = load(local.config_path)
        made = database(local, topology, "bench", logical_shards=64, metadata=Base.metadata)
        shard = next(iter(made.physical.values()))
        medians = emit_overhead(made, 1_000 if quick else 5_000)
        first, hundredth = claims_of_a_million(shard)
        before = count(shard)
        parts = [range(i * n, (i + 1) * n) for i in range(4)]
        rates: dict[str, Any] = relay_rates(made, parts[:3])
        rates["polling"] = polling_rate(shard, parts[3])
        rates["procrastinate"] = procrastinate_rate(shard, range(4 * n, 4 * n + n // 5))
        assert count(shard) - before == 4 * n + n // 5, "every effect happened"
    figures = {
        "emit_overhead": medians["read, write, emit"] / medians["read, write"],
        "emit_overhead_of_one_insert": medians["write, emit"] / medians["write"],
        "relay_vs_one_row_polling": rates["many"] / rates["polling"],
        "relay_vs_procrastinate": rates["many"] / rates["procrastinate"],
        "one_by_one_vs_one_row_polling": rates["one"] / rates["polling"],
        "one_by_one_vs_procrastinate": rates["one"] / rates["procrastinate"],
        "own_transaction_vs_one_row_polling": rates["own"] / rates["polling"],
        "own_transaction_vs_procrastinate": rates["own"] / rates["procrastinate"],
        "claim_of_a_million_ms": first,
        "hundredth_claim_ms": hundredth,
        "relay_jobs_per_second": rates["many"],
        "one_by_one_jobs_per_second": rates["one"],
        "own_transaction_jobs_per_second": rates["own"],
        "polling_jobs_per_second": rates["polling"],
        "procrastinate_jobs_per_second": rates["procrastinate"],
    }
    report("outbox", figures, peers=PEERS, medians=medians, targets=TARGETS, as_json=as_json)
