"""`shardkit cache`: whether servers answer, emptying one, and whether any shows something old.

Called by the command line. The audit reads as a client does, and judges by the database: what a
row's version was when it was sampled had been committed, so from the bound on nobody may be shown
less. It writes nothing.
"""

from __future__ import annotations

import importlib
import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

from psycopg import sql

from shardkit.cached import CachePlan, plan_of
from shardkit.caches.backend import Backend, Place
from shardkit.caches.opening import backend
from shardkit.caches.served import ServedCache
from shardkit.caching.entries import uncarried
from shardkit.caching.operations import UNKNOWN, Answer, Kind, Op, Outcome, Request
from shardkit.clock import SYSTEM, Clock
from shardkit.errors import ConfigurationError
from shardkit.ops.direct import connect
from shardkit.rowcache import RowCache
from shardkit.sections import CacheConfig
from shardkit.topology import Topology, schema_name

__all__ = [
    "DELAYS",
    "AuditReport",
    "NodeStatus",
    "Violation",
    "audit",
    "flush",
    "node_status",
    "plans_in",
    "shown",
    "write_metrics",
]

DELAYS: Final = (0.25, 1.0, 5.0)
"""Seconds after the rows were sampled at which every server is read."""

_PATIENT: Final = 1.0
"""Seconds a server has to answer: nobody's request waits for a command."""
_BATCH: Final = 500

# Locks nothing. The last pages of a table hold what was written last; a range of TIDs reads no
# others. Source: PostgreSQL manual, "System Columns", ctid; TID range scans are of 14 and newer.
_LATEST: Final = sql.SQL(
    "SELECT {columns} FROM {table} WHERE ctid >= ('(' || greatest(0, pg_relation_size({name})"
    " / current_setting('block_size')::int - 2) || ',0)')::tid ORDER BY ctid DESC LIMIT {limit}"
)


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """One cache server.

    Attributes:
        name: `host:port`.
        is_gutter: whether it stands in for others.
        answers: whether it may be read; a Redis with the data of an earlier moment may not.
        must_flush: whether it has to be emptied first.
        seconds: the answer took; None without one.
    """

    name: str
    is_gutter: bool
    answers: bool
    must_flush: bool
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Violation:
    """A server shows something older than what had been committed.

    Attributes:
        node: the server.
        key: of the entry.
        table: of the row.
        identity: its primary key, as text.
        committed: version of the row when it was sampled.
        found: version that is shown; 0 for "no such row".
        after: seconds since then.
    """

    node: str
    key: str
    table: str
    identity: tuple[str, ...]
    committed: int
    found: int
    after: float


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What an audit saw.

    Attributes:
        rows: that were sampled.
        checked: reads that a server answered.
        consistent: of these, that showed nothing old.
        cached: of these, that showed the row.
        unanswered: reads that no server answered.
        violations: the others.
    """

    rows: int
    checked: int
    consistent: int
    cached: int
    unanswered: int
    violations: tuple[Violation, ...]

    @property
    def bound(self) -> float | None:
        """Share of reads that may be old at most, at 95 % confidence; None when some were.

        Source: the rule of three, 1 - 0.05 ** (1 / n).
        """
        if self.violations or not self.checked:
            return None
        return -math.expm1(math.log(0.05) / self.checked)


@dataclass(frozen=True, slots=True)
class _Sample:
    key: str
    plan: CachePlan
    identity: tuple[Any, ...]
    version: int


def plans_in(location: str) -> list[CachePlan]:
    """Return how the classes of a program are cached.

    Args:
        location: `module:name` of the declarative base.

    Raises:
        ConfigurationError: there is no such thing, or none of its classes is cached.
    """
    module, _, name = location.partition(":")
    try:
        mappers = getattr(importlib.import_module(module), name).registry.mappers
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"models {location!r} cannot be loaded: {error}",
            hint='write "module:Base" of a module that imports every model',
        ) from error
    plans = [plan for mapper in mappers if (plan := plan_of(mapper)) is not None]
    if not plans:
        raise ConfigurationError(
            f"no class of {location!r} is cached", hint="declare __cache_ttl__ in one"
        )
    return sorted(plans, key=lambda plan: plan.name)


def node_status(config: CacheConfig, *, clock: Clock = SYSTEM) -> list[NodeStatus]:
    """Return whether each server answers.

    Args:
        config: `[cache]`.
        clock: source of time.
    """
    cache = backend(config, deadline=_PATIENT, hold=0.0, clock=clock)
    try:
        if not isinstance(cache, ServedCache):  # in this process, or none
            return []
        probe = [Request(Op.READ, "shardkit:nobody")]
        cache.run(probe)  # a cluster tells who is in it
        found = []
        for node in (*cache.nodes.homes, *cache.nodes.gutter):
            began = clock.monotonic()
            (answer,) = cache.asks(node, probe)
            answers = answer != UNKNOWN  # a cluster may send it on, which is an answer, too
            took = clock.monotonic() - began if answers else None
            found.append(NodeStatus(node.name, node.is_gutter, answers, node.must_flush, took))
        return found
    finally:
        cache.close()


def flush(config: CacheConfig, name: str, *, dry_run: bool = False) -> bool:
    """Empty a server, for every process; return whether it answered.

    Args:
        config: `[cache]`.
        name: of the server, as `node_status` says it.
        dry_run: change nothing.

    Raises:
        ConfigurationError: there is no such server.
    """
    known = [each.name for each in node_status(config)]
    if name not in known:
        raise ConfigurationError(
            f"the cache has no server {name!r}", hint=f"name one of: {', '.join(known) or 'none'}"
        )
    if dry_run:
        return True
    cache = backend(config, deadline=_PATIENT)
    try:
        cache.run([Request(Op.READ, "shardkit:nobody")])
        return cache.flush(name)
    finally:
        cache.close()


def audit(
    topology: Topology,
    config: CacheConfig,
    plans: Sequence[CachePlan],
    *,
    rows: int = 1000,
    delays: Sequence[float] = DELAYS,
    clock: Clock = SYSTEM,
    seed: int | None = None,
) -> AuditReport:
    """Sample rows that were written lately, and see what every server shows of them.

    Args:
        topology: the cluster.
        config: `[cache]`.
        plans: how classes are cached, by `plans_in`.
        rows: about how many are sampled, over all tables and logical shards.
        delays: seconds after that at which the servers are read.
        clock: source of time.
        seed: of the choice of logical shards.

    Raises:
        EndpointUnavailableError: a primary does not accept the admin login (retryable).
    """
    names = RowCache(config, SimpleNamespace(topology=topology), clock=clock)
    samples = _samples(topology, names, plans, rows, random.Random(seed))  # noqa: S311  a sample
    began = clock.monotonic()
    cache = backend(config, deadline=_PATIENT, hold=0.0, clock=clock)
    checked = cached = unanswered = 0
    violations: list[Violation] = []
    try:
        for delay in sorted(delays):
            clock.sleep(max(0.0, began + delay - clock.monotonic()))
            for sample, node, answer in _read(cache, samples):
                if answer.outcome is Outcome.UNKNOWN:
                    unanswered += 1
                    continue
                checked += 1
                version = shown(answer)
                cached += answer.outcome is Outcome.FOUND and answer.kind is Kind.VALUE
                if version is not None and version < sample.version:
                    violations.append(
                        Violation(
                            node,
                            sample.key,
                            sample.plan.table.name,
                            tuple(str(value) for value in sample.identity),
                            sample.version,
                            version,
                            delay,
                        )
                    )
    finally:
        cache.close()
        names.close()
    n = len(violations)
    return AuditReport(len(samples), checked, checked - n, cached, unanswered, tuple(violations))


def shown(answer: Answer) -> int | None:
    """Return the version that readers are shown of an entry; 0 for "no such row", None for none."""
    if answer.outcome is not Outcome.FOUND:
        return None
    if answer.kind is Kind.VALUE or answer.kind is Kind.ABSENCE:
        return answer.version
    if answer.kind is Kind.MARKER and len(answer.payload) >= 8:
        return uncarried(answer.payload)[0]
    return None


def _read(cache: Backend, samples: Sequence[_Sample]) -> list[tuple[_Sample, str, Answer]]:
    found: list[tuple[_Sample, str, Answer]] = []
    places = (Place.HOME, Place.GUTTER) if cache.has_gutter else (Place.HOME,)
    for place in places:
        for at in range(0, len(samples), _BATCH):
            part = samples[at : at + _BATCH]
            answers = cache.run([Request(Op.READ, sample.key) for sample in part], place=place)
            for sample, answer in zip(part, answers, strict=True):
                node = cache.home(sample.key) if place is Place.HOME else "gutter"
                found.append((sample, node, answer))
    return found


def _samples(
    topology: Topology,
    names: RowCache,
    plans: Sequence[CachePlan],
    rows: int,
    rng: random.Random,
) -> list[_Sample]:
    """Return rows as the primaries have them."""
    shards = list(range(topology.n_logical_shards))
    rng.shuffle(shards)
    each = max(1, math.ceil(rows / (len(plans) * len(shards))))
    found: dict[str, _Sample] = {}
    for physical in topology.physical.values():
        mine = [n for n in shards if topology.shard_map.owners[n] == physical.name]
        with connect(physical, application="shardkit cache audit") as primary:
            for logical_shard in mine:
                if len(found) >= rows:
                    break
                for plan in plans:
                    for values in primary.execute(_latest(plan, logical_shard, each)):
                        identity, version = tuple(values[:-1]), int(values[-1])
                        key = names.key(plan, logical_shard, identity)
                        found[key] = _Sample(key, plan, identity, version)
    return list(found.values())


def _latest(plan: CachePlan, logical_shard: int, limit: int) -> sql.Composed:
    table = sql.Identifier(schema_name(logical_shard), plan.table.name)
    columns = [plan.columns[index].name for index in (*plan.key_indexes, plan.version_index)]
    return _LATEST.format(
        columns=sql.SQL(", ").join(sql.Identifier(name) for name in columns),
        table=table,
        name=sql.Literal(f'"{schema_name(logical_shard)}"."{plan.table.name}"'),
        limit=sql.Literal(limit),
    )


def write_metrics(report: AuditReport, file: Path) -> None:
    """Write the counts of an audit as a text file that Prometheus' node exporter collects.

    Source: Prometheus, "Exposition formats", and node_exporter's textfile collector, which wants
    the file to be replaced at once.
    """
    lines = []
    for name, text, value in (
        ("checked", "Reads of cache servers that the last audit compared.", report.checked),
        ("consistent", "Of these, those that showed nothing old.", report.consistent),
        ("unanswered", "Reads that no server answered.", report.unanswered),
    ):
        metric = f"shardkit_cache_audit_{name}"
        lines += [f"# HELP {metric} {text}", f"# TYPE {metric} gauge", f"{metric} {value}"]
    beside = file.with_name(f"{file.name}.{os.getpid()}")
    beside.write_text("\n".join(lines) + "\n")
    beside.replace(file)
