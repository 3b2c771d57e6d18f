"""What is done to servers, processes and links: each fault is begun, lasts, and is healed.

A fault is a generator: it breaks something, yields for how many seconds, and heals it afterwards.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Final

import psycopg

from shardkit.local.server import LocalServer
from shardkit.testing import Fault, Way, When
from shardkit.topology import Role
from tests.history.live.stage import Process, Stage

__all__ = ["FAULTS", "SERVERS", "Broken"]

Broken = Iterator[tuple[str, float]]
"""First what was done to whom, and for how many seconds; healed when it is asked to go on."""

Break = Callable[[Stage, random.Random], Broken]


def _physical(stage: Stage, draw: random.Random) -> str:
    return draw.choice(sorted(stage.topology.physical))


def _primary(stage: Stage, draw: random.Random) -> LocalServer:
    physical = _physical(stage, draw)
    try:
        return stage.primary(physical)
    except psycopg.Error:  # in the middle of a failover
        return draw.choice(stage.members(physical))


def _replica(stage: Stage, draw: random.Random) -> LocalServer:
    physical = _physical(stage, draw)
    found = [server for server in stage.members(physical) if server.role is Role.REPLICA]
    return draw.choice(found or stage.members(physical))


def _killed(stage: Stage, server: LocalServer, seconds: float) -> Broken:
    with stage.lock:
        stage.local.kill_server(server.name)
    yield f"kill {server.name}", seconds
    with stage.lock:  # a failover may have made something else of it
        if server.name not in stage.lost:
            stage.local.start_server(server.name)


def _frozen(stage: Stage, server: LocalServer, seconds: float) -> Broken:
    stage.local.pause(server.name)
    yield f"freeze {server.name}", seconds
    # Without the lock: who holds it may be making another server anew from this one.
    if server.name not in stage.lost:
        stage.local.resume(server.name)


def kill_primary(stage: Stage, draw: random.Random) -> Broken:
    """A primary crashes and starts again at once."""
    return _killed(stage, _primary(stage, draw), draw.random() * 0.5)


def freeze_primary(stage: Stage, draw: random.Random) -> Broken:
    """A primary stops for a moment."""
    return _frozen(stage, _primary(stage, draw), draw.random() * 1.5)


def kill_replica(stage: Stage, draw: random.Random) -> Broken:
    """A replica crashes and stays away for a while."""
    return _killed(stage, _replica(stage, draw), draw.random() * 3)


def freeze_replica(stage: Stage, draw: random.Random) -> Broken:
    """A replica stops: commits wait for another, readers go elsewhere."""
    return _frozen(stage, _replica(stage, draw), draw.random() * 3)


def pause_replay(stage: Stage, draw: random.Random) -> Broken:
    """A replica receives and shows nothing of it."""
    server = _replica(stage, draw)
    with suppress(psycopg.Error), stage.superuser_of(server.name) as connection:
        connection.execute("SELECT pg_wal_replay_pause()")
    yield f"pause the replay of {server.name}", draw.random() * 3
    with suppress(psycopg.Error), stage.superuser_of(server.name) as connection:
        connection.execute("SELECT pg_wal_replay_resume()")


def _pooler(stage: Stage, draw: random.Random) -> LocalServer:
    return stage.local.server(f"pgbouncer_{_physical(stage, draw)}")


def kill_pooler(stage: Stage, draw: random.Random) -> Broken:
    """A pooler crashes and starts again."""
    return _killed(stage, _pooler(stage, draw), draw.random() * 0.5)


def freeze_pooler(stage: Stage, draw: random.Random) -> Broken:
    """A pooler stops for a moment."""
    return _frozen(stage, _pooler(stage, draw), draw.random() * 1.5)


def kill_cache(stage: Stage, draw: random.Random) -> Broken:
    """The cache crashes and comes back empty."""
    return _killed(stage, stage.local.server(stage.plan.cache), draw.random())


def freeze_cache(stage: Stage, draw: random.Random) -> Broken:
    """The cache stops, and comes back with what it had."""
    return _frozen(stage, stage.local.server(stage.plan.cache), draw.random() * 2)


def _process(stage: Stage, draw: random.Random, kind: str) -> Process:
    return draw.choice(stage.of(kind))


def _restarted(stage: Stage, process: Process) -> Broken:
    stage.killed(process)
    yield f"kill {process.name}", 0.0


def _stopped(process: Process, seconds: float) -> Broken:
    process.signal(signal.SIGSTOP)
    yield f"freeze {process.name}", seconds
    process.signal(signal.SIGCONT)


def kill_client(stage: Stage, draw: random.Random) -> Broken:
    """A client process dies; another takes its place."""
    return _restarted(stage, _process(stage, draw, "client"))


def freeze_client(stage: Stage, draw: random.Random) -> Broken:
    """A client process stops, and goes on with an old map of the cluster."""
    return _stopped(_process(stage, draw, "client"), draw.random() * 3)


def kill_relay(stage: Stage, draw: random.Random) -> Broken:
    """A relay dies with what it has claimed."""
    return _restarted(stage, _process(stage, draw, "relay"))


def freeze_relay(stage: Stage, draw: random.Random) -> Broken:
    """A relay stops for longer than its lease."""
    return _stopped(_process(stage, draw, "relay"), 1 + draw.random() * 3)


def cut_link(stage: Stage, draw: random.Random) -> Broken:
    """A link loses everything: in one direction or in both."""
    link = draw.choice([stage.links[port] for port in sorted(stage.links)])
    ways = draw.choice(((), (Way.TO_SERVER,), (Way.TO_CLIENT,)))
    link.black_hole(*ways)
    yield (
        f"cut the link to port {link.server[1]} {[way.value for way in ways] or ''}",
        draw.random() * 2,
    )
    link.heal()


def refuse_link(stage: Stage, draw: random.Random) -> Broken:
    """A link ends its connections and takes none."""
    link = draw.choice([stage.links[port] for port in sorted(stage.links)])
    link.reset()
    link.refuse()
    yield f"refuse the link to port {link.server[1]}", draw.random()
    link.heal()


def lose_answer(stage: Stage, draw: random.Random) -> Broken:
    """A COMMIT is done, and its client never hears of it."""
    pooler = _pooler(stage, draw)
    stage.links[pooler.port].on("COMMIT", Fault.RESET, when=When.AFTER)
    yield f"lose the answer of {pooler.name} to a COMMIT", draw.random() * 0.5


SERVERS: Final[dict[str, Break]] = {
    "kill primary": kill_primary,
    "freeze primary": freeze_primary,
    "kill replica": kill_replica,
    "freeze replica": freeze_replica,
    "pause replay": pause_replay,
}
"""Faults of database servers: of each physical shard one at a time."""

FAULTS: Final[dict[str, Break]] = {
    **SERVERS,
    "kill pooler": kill_pooler,
    "freeze pooler": freeze_pooler,
    "kill cache": kill_cache,
    "freeze cache": freeze_cache,
    "kill client": kill_client,
    "freeze client": freeze_client,
    "kill relay": kill_relay,
    "freeze relay": freeze_relay,
    "cut link": cut_link,
    "refuse link": refuse_link,
    "lose answer": lose_answer,
}
"""Every fault, by name."""
