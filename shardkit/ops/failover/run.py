"""Failover as functions: for the command line, for the watcher, and for other tools.

`fail_over` makes one, planned or not; `watch` looks on until it is told to stop, and makes those
that are needed; `adopt` registers what somebody else has promoted. Each is a loop around
`shardkit.ops.failover.driver`, ends within its time, and can be begun again after any crash.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

from shardkit.clock import SYSTEM, Clock
from shardkit.config import Config
from shardkit.errors import ConfigurationError, RefusedError, TryAgainError
from shardkit.ops.failover import machine
from shardkit.ops.failover.driver import Driver, Hook, Wish
from shardkit.ops.failover.hosts import Host, host_of
from shardkit.ops.failover.lost import LostRow, commits_beyond, fork_of, lost_rows, next_xid
from shardkit.ops.failover.machine import Action, View
from shardkit.ops.poolers import server_url
from shardkit.topology import Topology, libpq_options, like

__all__ = ["Done", "Progress", "adopt", "fail_over", "list_lost", "plan", "watch"]

Progress = Callable[[str, Action], object]
"""Told the name of a physical shard and each step; of steps that wait, only when they change."""

_PAUSE = 0.1
"""Seconds between two looks while a failover is under way."""


@dataclass(frozen=True, slots=True)
class Done:
    """What has become of a physical shard.

    Attributes:
        physical: its name.
        primary: address of its primary now.
        steps: what was done, in order.
        view: what was seen last.
    """

    physical: str
    primary: str
    steps: tuple[Action, ...] = ()
    view: View | None = field(default=None, repr=False)


def fail_over(
    config: Config,
    topology: Topology,
    physical: str,
    *,
    to: str | None = None,
    is_planned: bool = False,
    accepts_loss: bool = False,
    host: Host | None = None,
    hook: Hook = lambda _step: None,
    progress: Progress = lambda _physical, _action: None,
    timeout: float = 60.0,
    clock: Clock = SYSTEM,
) -> Done:
    """Make another server of a physical shard its primary.

    Args:
        config: the file; `[failover]` and `[durability]` count.
        topology: made of it.
        physical: name of the physical shard.
        to: address (`host:port`) of the new primary; None for the standby that has most.
        is_planned: a switchover: the primary lives, becomes a standby, and nothing is lost.
        accepts_loss: fewer standbys than are needed will do.
        host: what can be done from outside; None for the commands of the file.
        hook: told of each step before and after it.
        progress: told of each step.
        timeout: seconds for all of it.
        clock: source of monotonic time.

    Raises:
        RefusedError: it would not be safe; nothing was changed.
        TryAgainError: it is not done yet; what was done is kept, and the next call goes on.
        ConfigurationError: there is no such physical shard or server.
    """
    driver = _driver(config, topology, physical, host=host, hook=hook, clock=clock)
    try:
        first = driver.look()
        if to is not None and to not in driver.servers:
            raise ConfigurationError(
                f"{to} is no server of physical shard {physical!r}",
                hint=f"there are {', '.join(driver.servers)}",
            )
        if is_planned and to is None:
            to = _best(first, driver.leader)
        if not is_planned and first.node(driver.leader).takes_writes:
            raise RefusedError(
                f"{driver.leader} is the primary of {physical!r} and answers",
                hint="for a switchover without loss add --planned",
            )
        wish = Wish(to=to, is_planned=is_planned, is_ordered=not is_planned,
                    accepts_loss=accepts_loss)  # fmt: skip

        def is_done(view: View) -> bool:
            return _is_led(view, driver.leader, to) and _is_settled(view, driver.leader)

        return _until(
            driver, wish, is_done,
            timeout=timeout, progress=progress, clock=clock,
        )  # fmt: skip
    finally:
        driver.close()


def adopt(
    config: Config,
    topology: Topology,
    physical: str,
    *,
    server: str | None = None,
    host: Host | None = None,
    progress: Progress = lambda _physical, _action: None,
    timeout: float = 60.0,
    clock: Clock = SYSTEM,
) -> Done:
    """Register a server that somebody else has promoted, so that clients use it.

    Args:
        config: the file.
        topology: made of it.
        physical: name of the physical shard.
        server: its address; None where only one was promoted.
        host: as for `fail_over`.
        progress: told of each step.
        timeout: seconds for all of it.
        clock: source of monotonic time.

    Raises:
        RefusedError: it was not promoted, or several were.
        TryAgainError: it is not done yet (retryable).
    """
    driver = _driver(config, topology, physical, host=host, clock=clock)
    try:
        if server is None:
            view = driver.look()
            newest = max((n.registered or 0 for n in view.nodes), default=0)
            raised = [n.name for n in view.nodes if n.takes_writes and n.timeline > newest]
            if len(raised) > 1:
                raise RefusedError(
                    f"{', '.join(raised)} were promoted", hint="name one, and stop the others"
                )
            if not raised:
                return Done(physical, driver.leader, view=view)
            (server,) = raised
        return _until(
            driver, Wish(adopts=server), lambda _view: driver.leader == server,
            timeout=timeout, progress=progress, clock=clock,
        )  # fmt: skip
    finally:
        driver.close()


def plan(
    config: Config,
    topology: Topology,
    physical: str,
    *,
    to: str | None = None,
    is_planned: bool = False,
    accepts_loss: bool = False,
    host: Host | None = None,
) -> tuple[View, Action]:
    """Return what is seen, and what the first step of `fail_over` would be; changes nothing."""
    driver = _driver(config, topology, physical, host=host)
    try:
        view = driver.look()
        if is_planned and to is None:
            to = _best(view, driver.leader)
        wish = Wish(to=to, is_planned=is_planned, is_ordered=not is_planned,
                    accepts_loss=accepts_loss)  # fmt: skip
        view = driver.look(wish)
        return view, machine.decide(view, driver.policy)
    finally:
        driver.close()


def list_lost(
    topology: Topology, physical: str, *, data: Path, old: str, pg_waldump: Path, timeline: int
) -> list[LostRow]:
    """Return the rows that only an old primary has; see `shardkit.ops.failover.lost`.

    Args:
        topology: as the configuration says; the primary of now is looked for.
        physical: name of the physical shard.
        data: the old primary's data folder; not made anew yet.
        old: how to connect to it, started as a standby that follows nobody.
        pg_waldump: the program, of the server's version.
        timeline: of the old primary.

    Raises:
        OperationError: the log cannot be read, or it is no old primary.
    """
    shard = topology.physical[physical]
    url = shard.control_url or shard.admin_url
    servers = [libpq_options(like(url, server_url(shard, e))) for e in shard.endpoints]
    where = {
        **servers[0],
        "host": ",".join(str(each["host"]) for each in servers),
        "port": ",".join(str(each["port"]) for each in servers),
        "target_session_attrs": "read-write",
    }
    with psycopg.connect(replication="database", autocommit=True, **where) as stream:
        fork = fork_of(stream, timeline)
    commits = commits_beyond(pg_waldump, data, timeline, fork)
    with (
        psycopg.connect(old, autocommit=True) as there,
        psycopg.connect(autocommit=True, **where) as new,
    ):
        rows = new.execute("SELECT logical_shard FROM shardkit.ownership ORDER BY 1").fetchall()
        first = next_xid(new, timeline)
        return [*lost_rows(there, new, commits, [n for (n,) in rows], first_xid=first)]


def watch(
    config: Config,
    topology: Topology,
    *,
    physical: Sequence[str] = (),
    host: Host | None = None,
    stop: threading.Event | None = None,
    hook: Hook = lambda _step: None,
    progress: Progress = lambda _physical, _action: None,
    clock: Clock = SYSTEM,
) -> None:
    """Look on until told to stop, and make the failovers that are needed.

    Any number of watchers may run: who acts holds a lock on every standby it changes.

    Args:
        config: the file.
        topology: made of it.
        physical: which physical shards; none for all.
        host: as for `fail_over`.
        stop: ends it; None for never.
        hook: as for `fail_over`, called in a thread for each physical shard.
        progress: told of each step, from several threads.
        clock: source of monotonic time.
    """
    end = stop or threading.Event()
    failures: list[BaseException] = []

    def one(name: str) -> None:
        driver = _driver(config, topology, name, host=host, hook=hook, clock=clock)
        told: Action | None = None
        try:
            while not end.is_set():
                _, action = driver.step(tends=True)
                if action != told:
                    progress(name, action)
                told = action
                if isinstance(action, machine.Rest):
                    driver.release()
                is_idle = isinstance(action, machine.Rest | machine.Wait | machine.Refuse)
                end.wait(config.failover.interval if is_idle else 0.0)
        except BaseException as error:  # noqa: BLE001  raised by the thread that waits
            failures.append(error)
            end.set()
        finally:
            driver.close()

    names = list(physical) or list(topology.physical)
    threads = [threading.Thread(target=one, args=(name,), daemon=True) for name in names]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():  # a join without time cannot be interrupted
                thread.join(0.5)
    finally:
        end.set()
    if failures:
        raise failures[0]


def _until(
    driver: Driver,
    wish: Wish,
    is_done: Callable[[View], bool],
    *,
    timeout: float,
    progress: Progress,
    clock: Clock,
) -> Done:
    """Take steps until it is done."""
    until = clock.monotonic() + timeout
    steps: list[Action] = []
    told: Action | None = None
    while True:
        view, action = driver.step(wish)
        if action != told:
            progress(driver.physical, action)
        told = action
        if isinstance(action, machine.Refuse):
            if steps:
                raise TryAgainError(action.why, hint=action.hint)
            raise RefusedError(action.why, hint=action.hint)
        is_step = not isinstance(action, machine.Rest | machine.Wait)
        if is_step:
            steps.append(action)
        elif is_done(view):
            return Done(driver.physical, driver.leader, tuple(steps), view)
        if clock.monotonic() > until:
            why = action.why if isinstance(action, machine.Rest | machine.Wait) else str(action)
            raise TryAgainError(
                f"physical shard {driver.physical!r}: not done within {timeout:g} s: {why}",
                hint="run the same command again; it goes on where this one stopped",
            )
        if not is_step:
            clock.sleep(_PAUSE)


def _is_led(view: View, leader: str, to: str | None) -> bool:
    """Tell whether there is a primary, and the one that is wanted."""
    return view.node(leader).takes_writes and to in {None, leader}


def _is_settled(view: View, leader: str) -> bool:
    """Tell whether every server that answers follows the primary."""
    return all(n.streams for n in view.nodes if n.answers and n.name != leader)


def _best(view: View, leader: str) -> str:
    standbys = [n for n in view.nodes if n.is_standby and n.streams]
    if not standbys:
        raise RefusedError(f"no standby follows {leader}", hint="see shardkit status")
    return max(standbys, key=lambda n: (n.has, n.name)).name


def _driver(
    config: Config,
    topology: Topology,
    physical: str,
    *,
    host: Host | None,
    hook: Hook = lambda _step: None,
    clock: Clock = SYSTEM,
) -> Driver:
    if physical not in topology.physical:
        raise ConfigurationError(
            f"no physical shard {physical!r}", hint=f"there are {', '.join(topology.physical)}"
        )
    return Driver(
        topology,
        physical,
        failover=config.failover,
        durability=config.durability,
        host=host or host_of(config.failover),
        hook=hook,
        clock=clock,
    )
