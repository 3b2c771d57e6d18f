"""Is every username taken exactly once, whoever is killed when? `make lookup-race`.

64 clients, 4 threads in each of 16 processes, all want the same 1,000 usernames, in nearly the
same order. Before and after every statement that any of them runs, and before and after each
COMMIT, the process may be killed (SIGKILL) in the middle of whatever its threads are doing; another
goes on from there. Then the clients rename, swap and delete what they hold, under the same kills.
Each acknowledged account is written down before the client goes on.

Afterwards: how many rows have each name, which acknowledged accounts are not there, which rows
their names do not lead to, and which of the 1,000 names nobody can have any more. The control arm
is what one would write without a lookup: look on every shard, then insert.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import random
import signal
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event, func, select
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped

from benchmarks.measure import database, interleaved, report, servers
from shardkit import Cluster, Sharded, WriteSession, all_shards, ids, unique_lookup
from shardkit.config import PoolConfig, load
from shardkit.errors import ShardkitError, UniqueViolationError
from shardkit.ops import lookup as ops
from shardkit.testing import wait_until
from shardkit.topology import Topology
from shardkit.uniques import lookups_of

__all__ = ["Account", "Base", "Outcome", "Race", "race"]

POOL = PoolConfig(size=2, overflow=4, timeout=30.0)
WINDOW = 8
"""Names that a client may take in an order of its own."""

TIMEOUT = 900.0


class Base(DeclarativeBase):
    pass


class Account(Sharded, Base):
    __tablename__ = "racers"
    __unique__ = (unique_lookup("username", fold="casefold"),)
    username: Mapped[str]


class Plain(Sharded, Base):
    """The same without uniqueness, for the control arm and for the cost."""

    __tablename__ = "plain"
    username: Mapped[str]


@dataclass(frozen=True)
class Race:
    """One run, in a form that other processes can be given.

    Attributes:
        topology: of a database that the run has to itself.
        folder: where clients write down how far they are and what they have.
        kills: how likely a client is to be killed at each step.
        names: how many names there are.
        processes: of clients.
        threads: clients of each process.
        changes: how often each client changes something afterwards.
        naive: whether the clients look and then insert, without a lookup.
    """

    topology: Topology
    folder: Path
    kills: float
    names: int = 1000
    processes: int = 16
    threads: int = 4
    changes: int = 40
    naive: bool = False


@dataclass
class Outcome:
    """What was there afterwards.

    Attributes:
        taken: names that a row has.
        doubled: names that two rows have.
        lost: acknowledged accounts that are not there and that nobody changed.
        missing: rows that their name does not lead to.
        unavailable: names that no row has and that cannot be taken.
        stale: pairs of lookup rows that count for nothing.
        kills: how often a process was killed, by the step it was at.
        seconds: duration of the run.
    """

    taken: int = 0
    doubled: int = 0
    lost: int = 0
    missing: int = 0
    unavailable: int = 0
    stale: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


def race(trial: Race) -> tuple[Outcome, Outcome]:
    """Run the race and the changes after it; return what was there after each."""
    outcomes = []
    (trial.folder / "progress").write_bytes(bytes(4 * trial.processes * trial.threads * 2))
    for part in ("take",) if trial.naive else ("take", "change"):
        for old in trial.folder.glob("killed-*"):
            old.unlink()
        began = time.perf_counter()
        _run(trial, part)
        outcomes.append(judge(trial, part, time.perf_counter() - began))
    return outcomes[0], outcomes[-1]


def _run(trial: Race, part: str) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.lookup"])
    lives: Counter[int] = Counter()

    def start(number: int) -> BaseProcess:
        process = context.Process(target=work, args=(trial, part, number, lives[number]))
        lives[number] += 1
        process.start()
        return process

    workers = [start(number) for number in range(trial.processes)]

    def all_ended() -> bool:
        for number, worker in enumerate(workers):
            if worker.exitcode == -signal.SIGKILL:
                workers[number] = start(number)
            assert worker.exitcode in {None, 0, -signal.SIGKILL}, f"ended with {worker.exitcode}"
        return all(worker.exitcode == 0 for worker in workers)

    try:
        wait_until(all_ended, TIMEOUT, "every client is through")
    finally:
        for worker in workers:
            worker.kill()


def judge(trial: Race, part: str, seconds: float) -> Outcome:
    """Count what went wrong."""
    kind: Any = Plain if trial.naive else Account
    outcome = Outcome(seconds=seconds)
    for file in trial.folder.glob("killed-*"):
        outcome.kills.update(file.read_text().splitlines())
    with Cluster(trial.topology, pool=POOL) as cluster:
        if not trial.naive:
            (lookup,) = lookups_of(Account.__table__)
            checked = ops.run(cluster, lookup, "check")
            assert checked.n_busy == 0, "nobody is left who could be busy"
            outcome.missing, outcome.stale = checked.n_missing, checked.n_stale
        with cluster.writer() as session:
            rows = session.execute(select(kind.id, kind.username).options(all_shards())).all()
        stored: dict[int, str] = dict(rows)
        counts = Counter(name.casefold() for name in stored.values())
        outcome.taken = len(counts)
        outcome.doubled = sum(n > 1 for n in counts.values())
        if part == "take":
            for file in trial.folder.glob("has-*"):
                for line in file.read_text().splitlines():
                    name, row_id = line.split()
                    outcome.lost += stored.get(int(row_id)) != name
        if not trial.naive:
            outcome.unavailable = sum(
                not _can_be_had(cluster, name) for name in set(_names(trial)) - set(counts)
            )
    return outcome


def _can_be_had(cluster: Cluster, name: str) -> bool:
    try:
        with cluster.writer() as session:
            session.add(Account(username=name))
            session.commit()
    except ShardkitError:
        return False
    return True


def _names(trial: Race) -> list[str]:
    return [f"user{n:05}" for n in range(trial.names)]


# -- in the workers


def work(trial: Race, part: str, number: int, life: int) -> None:
    """Run the clients of one process, each from where it was."""
    chance = random.Random(f"{part} {number} {life}")
    log = os.open(trial.folder / f"killed-{number}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    with Cluster(trial.topology, pool=POOL) as cluster:
        ready = threading.Event()
        _kill_anywhere(trial.kills, chance, log, ready)
        failures: list[BaseException] = []

        def client(thread: int) -> None:
            try:
                me = number * trial.threads + thread
                _PARTS[part](trial, cluster, me)
            except BaseException as error:
                failures.append(error)
                raise

        threads = [
            threading.Thread(target=client, args=(thread,)) for thread in range(trial.threads)
        ]
        ready.set()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    sys.exit(1 if failures else 0)


def _kill_anywhere(p: float, chance: random.Random, log: int, ready: threading.Event) -> None:
    """Have this process killed before or after any statement or COMMIT, with a probability."""

    def maybe(step: str) -> None:
        if ready.is_set() and chance.random() < p:
            os.write(log, f"{step}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def before(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
        maybe(f"before {_kind(statement)}")

    def after(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
        maybe(f"after {_kind(statement)}")

    event.listen(Engine, "before_cursor_execute", before)
    event.listen(Engine, "after_cursor_execute", after)
    event.listen(Engine, "commit", lambda _connection: maybe("before COMMIT"))
    event.listen(WriteSession, "after_commit", lambda _session: maybe("after COMMIT"))


_KINDS = {
    "shardkit_lookup AS l (": "reserve",
    "shardkit_lookup AS l SET": "swap",
    "shardkit_lookup AS l USING": "release",
    "shardkit_lookup": "read lookup row",
    "advisory_xact_lock_shared": "wait",
    "advisory_xact_lock": "ticket",
    "lease_ids": "lease ids",
    "FOR UPDATE": "lock rows",
    "INSERT": "insert",
    "UPDATE": "update",
    "DELETE": "delete",
    "SELECT": "read row",
    "COMMIT": "end of wait",
}


def _kind(statement: str) -> str:
    return next((kind for mark, kind in _KINDS.items() if mark in statement), "other")


@contextmanager
def _progress(trial: Race, slot: int) -> Iterator[Callable[[int | None], int]]:
    """Lend a counter that outlives the process."""
    with (trial.folder / "progress").open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:

        def counter(value: int | None = None) -> int:
            if value is not None:
                struct.pack_into("<I", memory, slot * 4, value)
            return int(struct.unpack_from("<I", memory, slot * 4)[0])

        yield counter


def _take(trial: Race, cluster: Cluster, me: int) -> None:
    order = _names(trial)
    mine = random.Random(me)
    for at in range(0, len(order), WINDOW):
        part = order[at : at + WINDOW]
        mine.shuffle(part)
        order[at : at + WINDOW] = part
    log = os.open(trial.folder / f"has-{me}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    take = _look_then_insert if trial.naive else _insert
    with _progress(trial, me) as progress:
        for n in range(progress(None), len(order)):
            row_id = _again(partial(take, cluster, order[n]))
            if row_id is not None:
                os.write(log, f"{order[n]} {row_id}\n".encode())
            progress(n + 1)


def _insert(cluster: Cluster, name: str) -> int | None:
    with cluster.writer() as session:
        account = Account(username=name)
        session.add(account)
        try:
            session.commit()
        except UniqueViolationError:
            return None
        return account.id


def _look_then_insert(cluster: Cluster, name: str) -> int | None:
    with cluster.writer() as session:
        found = select(func.count()).select_from(Plain).where(Plain.username == name)
        if session.scalar(found.options(all_shards())):
            return None
    with cluster.writer() as session:
        account = Plain(username=name)
        session.add(account)
        session.commit()
        return account.id


def _change(trial: Race, cluster: Cluster, me: int) -> None:
    names = _names(trial)
    mine = random.Random(f"change {me}")
    slot = trial.processes * trial.threads + me
    with _progress(trial, slot) as progress:
        for n in range(progress(None), trial.changes):
            ends = [mine.choice(names) for _ in range(2)]
            what = mine.choice((_rename, _swap, _delete))
            _again(partial(what, cluster, *ends))
            progress(n + 1)


def _rename(cluster: Cluster, old: str, new: str) -> None:
    with cluster.writer() as session:
        account = session.scalars(select(Account).where(Account.username == old)).first()
        if account is not None:
            account.username = new
            session.commit()


def _swap(cluster: Cluster, old: str, new: str) -> None:
    with cluster.writer() as session:
        one = session.scalars(select(Account).where(Account.username == old)).first()
        other = session.scalars(select(Account).where(Account.username == new)).first()
        if one is None or other is None or one is other:
            return
        owner = cluster.topology.shard_map.owner
        if owner(ids.shard_of(one.id)) == owner(ids.shard_of(other.id)):
            one.username, other.username = new, old
            session.commit()


def _delete(cluster: Cluster, old: str, new: str) -> None:
    """Delete one and make another with its name, in one transaction."""
    with cluster.writer() as session:
        account = session.scalars(select(Account).where(Account.username == old)).first()
        if account is None:
            return
        session.delete(account)
        if new < old:
            beside = ids.shard_of(account.id)
            (fresh,) = cluster.connections.ids.mint({beside: 1})[beside]
            session.add(Account(id=fresh, username=old.upper()))
        session.commit()


_PARTS = {"take": _take, "change": _change}


def _again(attempt: Callable[[], Any]) -> Any:
    """Try until it is clear."""
    while True:
        try:
            return attempt()
        except UniqueViolationError:
            return None
        except ShardkitError as error:
            if not error.retryable:
                raise
        except DBAPIError as error:
            # Two that write the same rows in another order: PostgreSQL ends one of them.
            if "deadlock" not in str(error.orig):
                raise
        except SQLAlchemyError as error:
            if "expected to" not in str(error) and "deleted" not in str(error):
                raise  # not somebody else's DELETE


# -- as a benchmark


def main(*, as_json: bool = False, quick: bool = False) -> None:
    settings = {"max_connections": "600"}
    with servers(settings=settings) as local, tempfile.TemporaryDirectory() as folder:
        _, topology = load(local.config_path)
        figures: dict[str, float] = {}

        def made(name: str, **options: Any) -> Race:
            own = database(local, topology, name, logical_shards=64, metadata=Base.metadata)
            files = Path(folder) / name
            files.mkdir()
            if quick:
                options |= {"names": 200, "processes": 8, "threads": 4, "changes": 20}
            return Race(own, files, **options)

        plain = made("naive", kills=0.0, naive=True, **({} if quick else {"names": 200}))
        control, _ = race(plain)
        figures["names_doubled_by_look_then_insert"] = control.doubled
        raced = made("race", kills=1 / 2000)
        taken, changed = race(raced)
        for what, outcome in (("taken", taken), ("changed", changed)):
            figures |= {
                f"{what}: names that a row has": outcome.taken,
                f"{what}: names that two rows have": outcome.doubled,
                f"{what}: acknowledged and not there": outcome.lost,
                f"{what}: rows that their name does not lead to": outcome.missing,
                f"{what}: names nobody can have": outcome.unavailable,
                f"{what}: stale pairs": outcome.stale,
                f"{what}: processes killed": sum(outcome.kills.values()),
                f"{what}: steps they were killed at": len(outcome.kills),
                f"{what}: seconds": outcome.seconds,
            }
        cost, medians = _cost(made("cost", kills=0.0).topology, 40 if quick else 200)
        figures |= cost
        if not as_json:
            together = taken.kills + changed.kills
            print("killed", ", ".join(f"{step}: {n}" for step, n in sorted(together.items())))
        targets = {
            name: "≤ 0"
            for name in figures
            if name.endswith(("two rows have", "not there", "lead to", "can have"))
        }
        targets["names_doubled_by_look_then_insert"] = "≥ 1"
        report(
            "lookup",
            figures,
            peers=["look on every shard, then insert"],
            medians=medians,
            targets=targets,
            as_json=as_json,
        )


def _cost(topology: Topology, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Compare inserting and finding with a unique name and without one."""
    numbers = iter(range(1_000_000))
    with Cluster(topology) as cluster, cluster.reader() as reader:

        def add(kind: Any) -> Any:
            with cluster.writer() as session:
                row = kind(username=f"cost{next(numbers)}")
                session.add(row)
                session.commit()
            return row

        known = add(Account)

        def by_id() -> None:
            reader.expunge_all()
            reader.scalars(select(Account).where(Account.id == known.id)).one()

        def by_name() -> None:
            reader.expunge_all()
            reader.scalars(select(Account).where(Account.username == known.username)).one()

        def by_scatter() -> None:
            reader.expunge_all()
            named = select(Plain).where(Plain.username == "nobody").options(all_shards())
            reader.scalars(named).all()

        medians = interleaved(
            {
                "insert": lambda: add(Plain),
                "insert with a unique name": lambda: add(Account),
                "find by id": by_id,
                "find by name": by_name,
                "find by name on every shard": by_scatter,
            },
            rounds=rounds,
        )
    figures = {
        "insert_with_unique_name": medians["insert with a unique name"] / medians["insert"],
        "find_by_name_vs_by_id": medians["find by name"] / medians["find by id"],
        "scatter_vs_find_by_name": medians["find by name on every shard"] / medians["find by name"],
    }
    return figures, medians
