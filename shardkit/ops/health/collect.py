"""Asks every node at the same time, and makes facts of what they answer.

Two rounds. First all servers are asked for what they are; then those things are looked at that
need several servers: reference tables, outboxes, unique columns. Every round has a deadline, and
what does not answer becomes a fact like everything else. Called by `shardkit.ops.doctor`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import psycopg

from shardkit import deadlines
from shardkit.cluster import Cluster
from shardkit.config import Config
from shardkit.errors import ConfigurationError, OperationError, ShardkitError, TryAgainError
from shardkit.ops import lookup as lookups
from shardkit.ops import outbox, reference
from shardkit.ops.health import questions, services
from shardkit.ops.health.facts import (
    Expected,
    Facts,
    Login,
    Memcached,
    PgBouncer,
    Redis,
    Server,
    Silent,
    State,
)
from shardkit.ops.migrate import load_metadata
from shardkit.parallel import run
from shardkit.topology import Endpoint, PhysicalShard, Role, Topology

__all__ = ["collect"]

_STATE = ", schema shardkit"

SAMPLE = 20
"""Rows of each logical shard that are looked up by their unique values: the oldest, since what a
forgotten backfill has missed is what was there before."""


@dataclass(slots=True)
class _Found:
    """What the first round has collected so far."""

    servers: list[Server] = field(default_factory=list)
    logins: list[Login] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    silent: list[Silent] = field(default_factory=list)
    poolers: list[PgBouncer] = field(default_factory=list)
    failures: dict[str, ShardkitError] = field(default_factory=dict)


def collect(config: Config, expected: Expected, *, timeout: float) -> Facts:
    """Return everything the checks look at.

    Args:
        config: the file.
        expected: what it says about the servers.
        timeout: seconds for each of the two rounds, above 0.
    """
    topology = expected.topology
    with ThreadPoolExecutor(max(1, len(config.services)) + 3) as threads:
        asked = _ask_services(threads, config, timeout)
        found = _ask_servers(topology, timeout)
        facts = Facts(
            expected,
            servers=tuple(found.servers),
            logins=tuple(found.logins),
            states=tuple(found.states),
            poolers=tuple(found.poolers),
        )
        facts = _ask_together(threads, config, facts, found, timeout)
        redis, memcached = _answers(asked, found)
    return replace(
        facts,
        silent=tuple(found.silent),
        redis=redis,
        memcached=memcached,
        failures=found.failures,
    )


def _ask_servers(topology: Topology, timeout: float) -> _Found:
    """Ask every PostgreSQL and every PgBouncer, all at once, from one thread."""
    found = _Found()
    questionnaire = _Questions(topology, found)
    for shard in topology.physical.values():
        questionnaire.about(shard)
    with deadlines.deadline(timeout):
        answers = run([task.ask for task in questionnaire.tasks])
    for task, answer in zip(questionnaire.tasks, answers, strict=True):
        if isinstance(answer, Exception):
            task.failed(_reason(answer))
        else:
            task.into.append(answer)
    # A server that does not answer is one finding, not one for each question.
    for each in found.silent:
        found.failures.pop(f"{each.where}{_STATE}", None)
    return found


@dataclass(frozen=True, slots=True)
class _Question:
    """What is asked, where the answer goes, and who is told why there is none."""

    ask: Callable[[], Any]
    into: list[Any]
    failed: Callable[[str], None]


class _Questions:
    """Everything that is asked of servers, each on a connection of its own."""

    def __init__(self, topology: Topology, found: _Found) -> None:
        self.tasks: list[_Question] = []
        self._topology = topology
        self._found = found

    def about(self, shard: PhysicalShard) -> None:
        """Add what is asked about one physical shard."""
        found, state = self._found, partial(questions.ask_state, self._topology, shard)
        for endpoint in shard.endpoints:
            self._about_endpoint(shard, endpoint)
        unlooked = self._unlooked(f"{shard.primary}{_STATE}")
        self.tasks.append(_Question(state, found.states, unlooked))
        if shard.pooler is not None:
            urls = {(e.url.host, e.url.port): e.url for e in shard.endpoints}
            for url in urls.values():
                ask = partial(questions.ask_pooler, shard, shard.looking_at(url))
                unlooked = self._unlooked(f"pgbouncer {url.host}:{url.port or 5432}")
                self.tasks.append(_Question(ask, found.poolers, unlooked))

    def _about_endpoint(self, shard: PhysicalShard, endpoint: Endpoint) -> None:
        is_replica = endpoint.role is Role.REPLICA
        straight = endpoint.server_url or endpoint.url
        looking = shard.looking_at(straight) if is_replica else shard.looking_url
        silent = self._silent(
            str(endpoint), "the monitor's login" if shard.monitor_url else "the admin login"
        )
        ask = partial(questions.ask_server, endpoint, looking)
        self.tasks.append(_Question(ask, self._found.servers, silent))
        for url in (endpoint.url, endpoint.read_url):
            if url is not None:
                is_reader = url is endpoint.read_url
                where = f"{endpoint} (reader)" if is_reader else str(endpoint)
                silent = self._silent(where, "the application's login")
                login = partial(
                    questions.ask_login, endpoint, url, is_for_readers=is_replica or is_reader
                )
                self.tasks.append(_Question(login, self._found.logins, silent))

    def _silent(self, where: str, what: str) -> Callable[[str], None]:
        return lambda reason: self._found.silent.append(Silent(where, what, reason))

    def _unlooked(self, where: str) -> Callable[[str], None]:
        return lambda reason: self._found.failures.update({where: OperationError(reason)})


def _ask_services(
    threads: ThreadPoolExecutor, config: Config, timeout: float
) -> dict[str, tuple[str, Future[Redis | Memcached]]]:
    asked: dict[str, tuple[str, Future[Redis | Memcached]]] = {}
    for name, address in config.services.items():
        ask: Callable[[], Redis | Memcached]
        if services.is_redis(address):
            ask = partial(services.ask_redis, name, address, timeout=timeout)
        elif "memcached" in name:
            ask = partial(services.ask_memcached, name, address, timeout=timeout)
        else:
            continue
        asked[name] = (address, threads.submit(ask))
    return asked


def _answers(
    asked: dict[str, tuple[str, Future[Redis | Memcached]]], found: _Found
) -> tuple[tuple[Redis, ...], tuple[Memcached, ...]]:
    redis: list[Redis] = []
    memcached: list[Memcached] = []
    for name, (_, future) in asked.items():
        error = future.exception()
        if error is None:
            answer = future.result()
            if isinstance(answer, Redis):
                redis.append(answer)
            else:
                memcached.append(answer)
        elif isinstance(error, ImportError):
            found.failures[name] = OperationError(
                "was not looked at: the client is not installed",
                hint="pip install shardkit[cache]",
            )
        else:
            found.silent.append(Silent(name, "", _reason(error)))
    return tuple(redis), tuple(memcached)


def _ask_together(
    threads: ThreadPoolExecutor, config: Config, facts: Facts, found: _Found, timeout: float
) -> Facts:
    """Look at what needs several primaries, where shardkit has been used and answers."""
    used = {state.physical for state in facts.states if state.ledger.identity is not None}
    topology = facts.expected.topology
    some = replace(
        topology,
        physical={name: shard for name, shard in topology.physical.items() if name in used},
    )
    if not some.physical:
        return facts
    outboxes = threads.submit(outbox.status, some, interval=0)
    is_whole = len(some.physical) == len(topology.physical)
    compared = None
    if len(some.physical) > 1:
        compared = threads.submit(reference.check, some, patience=timeout)
    sampled = threads.submit(_sample, config, topology, timeout) if is_whole else None
    reports: Sequence[lookups.Report] = ()
    differences = None
    if compared is not None:
        try:
            differences = compared.result()
        except (ShardkitError, psycopg.Error) as error:
            found.failures["reference tables"] = _told(error)
    if sampled is not None:
        try:
            reports = sampled.result()
        except Exception as error:  # noqa: BLE001  importing the models may raise anything
            found.failures["unique columns"] = _told(error)
    return replace(
        facts,
        outboxes=tuple(outboxes.result()),
        reference=differences,
        lookups=tuple(reports),
    )


def _sample(config: Config, topology: Topology, timeout: float) -> list[lookups.Report]:
    """Look up some rows of every unique column that the models declare."""
    if config.migrations.models is None:
        return []
    if os.getcwd() not in sys.path:  # noqa: PTH109  sys.path holds text
        sys.path.insert(0, os.getcwd())  # noqa: PTH109  the package may be the one at hand
    metadata = load_metadata(config.migrations.models)
    try:
        columns = lookups.lookups_in(metadata)
    except ConfigurationError:
        return []  # they declare none
    limits = lookups.Limits(rows=SAMPLE)
    with Cluster(topology, pool=config.pool, statement_timeout=timeout) as cluster:
        return [lookups.run(cluster, column, "check", limits=limits) for column in columns]


def _told(error: Exception) -> ShardkitError:
    return error if isinstance(error, ShardkitError) else TryAgainError(_reason(error))


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
