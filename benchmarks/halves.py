"""Is a commit over two servers ever half done? `make halves`.

Processes write pairs of rows, one on each physical shard, in atomic sessions. All the while
something is killed at a chosen step of a chosen commit: its process (SIGKILL), the connection to
the coordinator or to the participant, or the primary of either (SIGKILL of every process of the
server, then a restart). A resolver runs beside them, as the relay of the outbox does. Afterwards
every pair is read: what was acknowledged must be there, what certainly failed must not, and of
every pair both halves or none. Nothing may be left prepared.

The control does the same with two plain sessions, one commit after the other.
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
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.orm import DeclarativeBase, Mapped

from benchmarks.measure import connect, report, servers
from shardkit import Cluster, Sharded, ids
from shardkit.config import load
from shardkit.errors import OutcomeUnknownError, ShardkitError
from shardkit.events import Event, TwoPhaseStep
from shardkit.local import LocalCluster
from shardkit.testing import create_tables, wait_until
from shardkit.topology import Topology, schema_name
from shardkit.twophase import in_doubt, resolve

__all__ = ["Base", "Outcome", "run"]

STEPS = ("preparing", "prepared", "deciding", "decided", "finished")
VICTIMS = ("process", "coordinator connection", "participant connection")
PRIMARIES = ("coordinator primary", "participant primary")
RESOLVE_EVERY = 0.5
SETTLED_WITHIN = 10.0
_SPAWN = multiprocessing.get_context("fork")


class Base(DeclarativeBase):
    """Models of the trial."""


class Half(Sharded, Base):
    """One half of a pair: its id is on one physical shard, its pair's number is on both."""

    __tablename__ = "halves"
    pair: Mapped[int]


@dataclass(frozen=True)
class Outcome:
    """What was found when everything had healed.

    Attributes:
        kills: commits that something was killed in.
        pairs: commits tried.
        acknowledged: commits that returned.
        half: pairs of which one half is there.
        lost: acknowledged pairs that are not there.
        undead: pairs that certainly failed and are there.
        prepared: transactions still prepared ten seconds after the last kill.
        longest: seconds that anything was in doubt, at most, while servers were up.
    """

    kills: int
    pairs: int
    acknowledged: int
    half: int
    lost: int
    undead: int
    prepared: int
    longest: float


def run(
    local: LocalCluster,
    topology: Topology,
    folder: Path,
    *,
    kills: int,
    primaries: int,
    atomic: bool = True,
    seed: int = 1,
) -> Outcome:
    """Kill something in each of many commits under traffic, and judge.

    Args:
        local: the servers.
        topology: two physical shards with the table of `Base`.
        folder: where processes write down what they did.
        kills: commits in which a process or a connection is killed.
        primaries: commits in which a primary is killed.
        atomic: whether pairs are written atomically; else one half after the other.
        seed: of the choice of steps.
    """
    chosen = random.Random(seed)  # noqa: S311 - a choice that can be repeated
    plan = [(chosen.choice(VICTIMS), chosen.choice(STEPS)) for _ in range(kills)]
    plan += [(chosen.choice(PRIMARIES), chosen.choice(STEPS)) for _ in range(primaries)]
    chosen.shuffle(plan)
    numbers = itertools.count(1)
    with ExitStack() as running:
        for worker in range(2):
            log = folder / f"traffic{worker}"
            running.enter_context(process(traffic, topology, log, 1_000_000 * (worker + 1), atomic))
        doubts = folder / "doubts"
        running.enter_context(process(resolver, topology, doubts))
        for victim, step in plan:
            one(local, topology, folder / "victims", next(numbers), victim, step, atomic)
    return judge(topology, folder, len(plan))


def one(
    local: LocalCluster,
    topology: Topology,
    log: Path,
    number: int,
    victim: str,
    step: str,
    atomic: bool,
) -> None:
    """Write one pair in a process of its own and kill something at a step."""
    alpha, beta = sorted(topology.physical)
    physical = alpha if victim.startswith("coordinator") else beta

    def kill() -> None:
        if victim == "process":
            os.kill(os.getpid(), signal.SIGKILL)
        elif victim.endswith("connection"):
            with connect(topology.physical[physical], admin=True) as admin:
                admin.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE application_name = 'shardkit write'"
                )
        else:
            crash(topology, physical)

    child = os.fork()
    if child == 0:
        with Cluster(topology) as cluster, log.open("a") as written:
            cluster.listen(lambda event: kill() if at(event, step) else None)
            write(cluster, number, written, atomic, kill if step in ("deciding",) else None)
        os._exit(0)
    os.waitpid(child, 0)
    if victim.endswith("primary"):
        name = local.primary(physical).name
        wait_until(lambda: not answers(topology, physical), 5.0, f"{name} is gone")
        local.start_server(name)
        wait_until(lambda: answers(topology, physical), 30.0, f"{name} is back")


def at(event: Event, step: str) -> bool:
    return isinstance(event, TwoPhaseStep) and event.step == step
