"""Is a commit over two servers ever half done? `make halves`.

Processes write pairs of rows, one on each physical shard, in atomic sessions. All the while one
more process after the other writes a pair, and something is killed at a chosen step of its commit:
the process itself (SIGKILL), its connection to the coordinator or to the participant (terminated
by the server, or cut with the answer on its way), or the primary of either (SIGKILL of every
process of the server, then a restart). The steps are messages on the wire: the kill happens while
a proxy holds the message, or the server's answer to it. A resolver runs beside them, as the relay
of the outbox does.

When all has healed every pair is read. What was acknowledged must be there, what certainly failed
must not, and of every pair both halves or none; nothing may be left prepared.

The control is the same with two plain sessions, one commit after the other.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped

from benchmarks.measure import connect, servers
from shardkit import Cluster, Sharded, ids
from shardkit.config import load
from shardkit.errors import OutcomeUnknownError, ShardkitError
from shardkit.local import LocalCluster
from shardkit.testing import FaultProxy, Trigger, When, create_tables, reroute, wait_until
from shardkit.topology import Topology, schema_name
from shardkit.twophase import in_doubt, resolve

__all__ = ["ATOMIC", "PLAIN", "Base", "Outcome", "Trial", "run"]

RESOLVE_EVERY = 0.5
SETTLED_WITHIN = 10.0
TIMEOUT = 30.0
TRAFFIC = 2

_SPAWN = multiprocessing.get_context("forkserver")
_SPAWN.set_forkserver_preload(["benchmarks.halves"])

COORDINATOR, PARTICIPANT = "coordinator", "participant"

ATOMIC: Final = (
    (COORDINATOR, "INSERT INTO .*halves"),
    (PARTICIPANT, "INSERT INTO .*halves"),
    (PARTICIPANT, "^PREPARE TRANSACTION"),
    (COORDINATOR, "INSERT INTO shardkit.decisions .*participants"),
    (COORDINATOR, "^(SHOW synchronous_commit; )?COMMIT(;|$)"),
    (PARTICIPANT, "^COMMIT PREPARED"),
    (COORDINATOR, "DELETE FROM shardkit.decisions"),
)
"""The messages of an atomic commit: to which server, and what."""

PLAIN: Final = ATOMIC[:2]
"""Those of the control: one INSERT is a transaction by itself."""

VICTIMS: Final = ("process", "coordinator connection", "participant connection")
PRIMARIES: Final = ("coordinator primary", "participant primary")


class Base(DeclarativeBase):
    """Models of the trial."""


class Half(Sharded, Base):
    """One half of a pair; the time in its id is the pair's number."""

    __tablename__ = "halves"
    pair: Mapped[int]


@dataclass(frozen=True)
class Trial:
    """What is tried.

    Attributes:
        local: the servers.
        topology: two physical shards with the table of `Base`.
        folder: where processes write down what they did; of its own for every run.
        kills: commits in which a process or a connection is killed.
        primaries: commits in which a primary is killed.
        is_atomic: whether pairs are written atomically; else one half after the other.
        seed: of the order.
    """

    local: LocalCluster
    topology: Topology
    folder: Path
    kills: int
    primaries: int
    is_atomic: bool = True
    seed: int = 1


@dataclass(frozen=True)
class Outcome:
    """What was found when everything had healed.

    Attributes:
        kills: commits in which something was killed.
        pairs: commits tried, with those of the traffic.
        acknowledged: commits that returned.
        unknown: commits that said so, or whose process was killed.
        half: pairs of which one half is there.
        lost: acknowledged pairs that are not there.
        undead: pairs that certainly failed and are there.
        prepared: transactions still prepared ten seconds after the last kill.
        longest: seconds that anything was in doubt, at most, while all servers were up.
        by_victim: kills by what was killed.
    """

    kills: int
    pairs: int
    acknowledged: int
    unknown: int
    half: int
    lost: int
    undead: int
    prepared: int
    longest: float
    by_victim: dict[str, int] = field(default_factory=dict)

    @property
    def is_sound(self) -> bool:
        """Whether all that was promised held."""
        return not (self.half or self.lost or self.undead or self.prepared)


def run(trial: Trial) -> Outcome:
    """Kill something in each of many commits under traffic, and judge."""
    chosen = random.Random(trial.seed)
    points = [
        (server, pattern, when)
        for server, pattern in (ATOMIC if trial.is_atomic else PLAIN)
        for when in When
    ]
    plan: list[tuple[tuple[str, str, When], str]] = []
    for victims, wanted in ((VICTIMS, trial.kills), (PRIMARIES, trial.primaries)):
        each = list(itertools.product(points, victims))
        chosen.shuffle(each)
        plan += itertools.islice(itertools.cycle(each), wanted)
    chosen.shuffle(plan)
    _empty(trial.topology)
    counts: dict[str, int] = {}
    stop = _SPAWN.Event()
    with ExitStack() as stack:
        proxies, through = {}, trial.topology
        for name, physical in zip(
            (COORDINATOR, PARTICIPANT), sorted(through.physical), strict=True
        ):
            endpoint = trial.topology.physical[physical].primary
            proxy = stack.enter_context(FaultProxy(endpoint.url.host, endpoint.url.port))
            proxies[name] = proxy
            through = reroute(through, {endpoint: proxy})
        for worker in range(TRAFFIC):
            first = 1_000_000 * (worker + 1)
            log = trial.folder / f"traffic{worker}"
            stack.enter_context(
                _process(traffic, stop, trial.topology, log, first, trial.is_atomic)
            )
        stack.enter_context(_process(resolver, stop, trial.topology, trial.folder / "doubts"))
        stack.callback(stop.set)
        numbers = iter(range(1, 2 * len(plan) + 10))
        while plan:
            point, victim = plan[-1]
            if _one(trial, through, proxies, number=next(numbers), point=point, victim=victim):
                counts[victim] = counts.get(victim, 0) + 1
                plan.pop()
        with Cluster(trial.topology) as cluster:
            stop.set()  # the traffic; the resolver looks once more
            prepared = 0
            try:
                wait_until(lambda: not _doubts(cluster), SETTLED_WITHIN, "nothing is in doubt")
            except AssertionError:
                prepared = len(_doubts(cluster))
    return _judge(trial, counts, prepared)


def _one(
    trial: Trial,
    through: Topology,
    proxies: dict[str, FaultProxy],
    *,
    number: int,
    point: tuple[str, str, When],
    victim: str,
) -> bool:
    """Write one pair in a process of its own and kill something at a message.

    Returns:
        Whether there was such a message: the pair may have failed before, of what went before.
    """
    server, pattern, when = point
    what, _, kind = victim.partition(" ")
    names = dict(zip((COORDINATOR, PARTICIPANT), sorted(trial.topology.physical), strict=True))
    child = _SPAWN.Process(
        target=victim_process,
        args=(through, trial.folder / "victims", number, trial.is_atomic),
    )

    def kill() -> None:
        if what == "process":
            os.kill(child.pid or 0, signal.SIGKILL)
        elif kind == "connection" and when is When.BEFORE:
            with connect(trial.topology.physical[names[what]], admin=True) as admin:
                admin.execute(_TERMINATE)
        elif kind == "connection":
            proxies[what].reset()
        else:
            trial.local.kill_server(trial.local.primary(names[what]).name)

    trigger: Trigger = proxies[server].on(pattern, kill, when=when)
    child.start()
    child.join(TIMEOUT)
    if child.is_alive():
        child.kill()
        raise AssertionError(f"pair {number}, {victim} at {point}: the commit does not end")
    trigger.cancel()
    if kind == "primary" and trigger.fired:
        trial.local.start_server(trial.local.primary(names[what]).name)
    return trigger.fired


# As the application's own role would see it: only what writes.
_TERMINATE = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE application_name = 'shardkit write'"
)


def victim_process(topology: Topology, log: Path, number: int, is_atomic: bool) -> None:  # noqa: FBT001
    """Write one pair and end."""
    with Cluster(topology) as cluster, log.open("a", buffering=1) as written:
        _write(cluster, number, written, is_atomic=is_atomic)


def traffic(stop: Any, topology: Topology, log: Path, first: int, is_atomic: bool) -> None:  # noqa: FBT001
    """Write pairs until told to stop."""
    with Cluster(topology) as cluster, log.open("a", buffering=1) as written:
        for number in itertools.count(first):
            if stop.wait(0.005):
                return
            _write(cluster, number, written, is_atomic=is_atomic)


def resolver(stop: Any, topology: Topology, log: Path) -> None:
    """Settle what is in doubt, now and then, and write down how long it was."""
    with Cluster(topology) as cluster, log.open("a", buffering=1) as written:
        while True:
            is_last = stop.wait(RESOLVE_EVERY)
            found, silent = in_doubt(cluster.connections, topology.physical)
            if not silent:
                written.write("".join(f"{part.seconds}\n" for part in found))
            resolve(cluster.connections, topology.physical)
            if is_last and not found and not silent:
                return


def _write(cluster: Cluster, number: int, log: Any, *, is_atomic: bool) -> None:
    """Write one pair, and write down what the commit said."""
    shards = [cluster.topology.shard_map.owned_by(n)[0] for n in sorted(cluster.topology.physical)]
    halves = [Half(id=ids.compose(number, shard, 0), pair=number) for shard in shards]
    log.write(f"{number} try\n")
    try:
        for part in [halves] if is_atomic else [[half] for half in halves]:
            with cluster.writer(atomic=is_atomic) as session:
                session.add_all(part)
                session.commit()
    except OutcomeUnknownError:
        log.write(f"{number} unknown\n")
    except (ShardkitError, SQLAlchemyError) as error:
        why = str(error).replace("\n", " ")
        log.write(f"{number} failed {type(error).__name__} {why}\n")
    else:
        log.write(f"{number} done\n")


def _doubts(cluster: Cluster) -> list[Any]:
    found, silent = in_doubt(cluster.connections, cluster.topology.physical)
    return [*found, *silent]


def _empty(topology: Topology) -> None:
    for physical in topology.physical.values():
        with connect(physical, admin=True) as admin:
            shard = topology.shard_map.owned_by(physical.name)[0]
            admin.execute(f"TRUNCATE {schema_name(shard)}.halves".encode())


def _judge(trial: Trial, counts: dict[str, int], prepared: int) -> Outcome:
    said: dict[int, str] = {}
    for log in (trial.folder / "victims", *trial.folder.glob("traffic*")):
        for line in log.read_text().splitlines():
            number, word, *_ = line.split(" ", 2)
            said[int(number)] = word
    there = []
    for physical in sorted(trial.topology.physical):
        shard = trial.topology.shard_map.owned_by(physical)[0]
        with connect(trial.topology.physical[physical], admin=True) as admin:
            query = f"SELECT pair FROM {schema_name(shard)}.halves"
            there.append({row[0] for row in admin.execute(query.encode())})
    both, either = there[0] & there[1], there[0] | there[1]
    doubts = trial.folder / "doubts"
    seconds = [float(line) for line in doubts.read_text().split()] if doubts.exists() else []
    return Outcome(
        kills=sum(counts.values()),
        pairs=len(said),
        acknowledged=sum(word == "done" for word in said.values()),
        unknown=sum(word in {"unknown", "try"} for word in said.values()),
        half=len(either - both),
        lost=sum(word == "done" and number not in both for number, word in said.items()),
        undead=sum(word == "failed" and number in either for number, word in said.items()),
        prepared=prepared,
        longest=max(seconds, default=0.0),
        by_victim=counts,
    )


@contextmanager
def _process(work: Callable[..., None], stop: Any, *arguments: Any) -> Iterator[BaseProcess]:
    process = _SPAWN.Process(target=work, args=(stop, *arguments))
    process.start()
    try:
        yield process
    finally:
        process.join(TIMEOUT)
        if process.is_alive():
            process.kill()
            process.join()


def main(*, as_json: bool, quick: bool = False) -> None:
    outcomes = {}
    kills, primaries = (28, 4) if quick else (270, 40)
    for arm, is_atomic in (("atomic", True), ("control", False)):
        with servers(logical_shards=16) as local, tempfile.TemporaryDirectory() as folder:
            _, topology = load(local.config_path)
            create_tables(topology, Base.metadata)
            trial = Trial(
                local,
                topology,
                Path(folder),
                kills=kills if is_atomic else min(kills, 60),
                primaries=primaries if is_atomic else min(primaries, 4),
                is_atomic=is_atomic,
            )
            outcomes[arm] = run(trial)
    if as_json:
        figures = {arm: asdict(outcome) for arm, outcome in outcomes.items()}
        print(json.dumps({"subject": "halves", "figures": figures}))
    else:
        table = Table("figure", *outcomes, box=None, title="halves")
        for name in asdict(outcomes["atomic"]):
            table.add_row(name, *(str(getattr(o, name)) for o in outcomes.values()))
        Console().print(table)
    if not outcomes["atomic"].is_sound or not outcomes["control"].half:
        sys.exit("the promise does not hold, or the control shows nothing")
