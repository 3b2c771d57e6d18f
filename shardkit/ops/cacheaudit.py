"""`shardkit cache audit`: whether any server shows something older than what was committed.

Called by the command line. It reads as a client does, and judges by the databases: what was seen
committed may not be hidden by anything older once the bound has passed. Nothing that is not proven
is called old: a row is old when its version is below the committed one and the database has another
one now; a list or count when it differs from what the database had, and the very same entry is
still there the bound later. Writes nothing.
"""

from __future__ import annotations

import heapq
import itertools
import math
import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

from shardkit.cached import CachePlan
from shardkit.cachereads import Plan
from shardkit.caches.backend import Backend, Place
from shardkit.caches.opening import backend
from shardkit.caches.served import ServedCache
from shardkit.caching.entries import uncarried
from shardkit.caching.operations import Answer, Cas, Kind, Op, Outcome, Request
from shardkit.clock import SYSTEM, Clock
from shardkit.derivedplan import DerivedPlan
from shardkit.ops.cache import PATIENT
from shardkit.ops.cachesamples import Primaries, Sample
from shardkit.rowcache import RowCache
from shardkit.sections import CacheConfig
from shardkit.topology import Topology

__all__ = [
    "DELAYS",
    "WATCH",
    "AuditReport",
    "ServerCount",
    "Violation",
    "audit",
    "shown",
    "write_metrics",
]

DELAYS: Final = (0.25, 1.0, 5.0)
"""Seconds after a commit was seen at which every server is read."""

WATCH: Final = 5.0
"""Seconds that the outboxes are watched for commits."""

_BOUND: Final = DELAYS[0]
_PAUSE: Final = 0.01
"""Seconds between two looks into the outboxes."""
_BATCH: Final = 500


@dataclass(frozen=True, slots=True)
class Violation:
    """A server shows something older than what had been committed.

    Attributes:
        node: the server.
        key: of the entry.
        table: of the row; the list or count.
        identity: its primary key, or the key of the list, as text.
        committed: version that was committed.
        found: version that is shown; 0 for "no such row". Of a list it may be any: its values
            were compared.
        after: seconds since the commit was seen, at least.
    """

    node: str
    key: str
    table: str
    identity: tuple[str, ...]
    committed: int
    found: int
    after: float


@dataclass(frozen=True, slots=True)
class ServerCount:
    """What an audit saw of one server.

    Attributes:
        node: its name.
        checked: reads that it answered.
        consistent: of these, that showed nothing old.
        unanswered: reads that it did not answer.
    """

    node: str
    checked: int
    consistent: int
    unanswered: int


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What an audit saw.

    Attributes:
        commits: changes of rows, lists and counts that were seen in outboxes.
        rows: that were sampled in tables.
        checked: reads that a server answered.
        consistent: of these, that showed nothing old.
        cached: of these, that showed a row, list or count.
        unanswered: reads that no server answered.
        servers: the same of each.
        violations: what was old.
    """

    commits: int
    rows: int
    checked: int
    consistent: int
    cached: int
    unanswered: int
    servers: tuple[ServerCount, ...]
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
class _Read:
    """A read that is due: of a sample, at first; or of an entry that was not what it should be."""

    sample: Sample
    delay: float
    place: Place | None = None
    cas: Cas = None


def audit(
    topology: Topology,
    config: CacheConfig,
    plans: Sequence[Plan],
    *,
    rows: int = 1000,
    watch: float = WATCH,
    delays: Sequence[float] = DELAYS,
    clock: Clock = SYSTEM,
    seed: int | None = None,
) -> AuditReport:
    """Sample commits, and rows that were written lately, and see what every server shows of them.

    Args:
        topology: the cluster.
        config: `[cache]`.
        plans: how things are cached, by `plans_in`.
        rows: about how many commits are sampled at most, and how many rows beside them.
        watch: seconds that commits are waited for; 0 for rows in tables alone.
        delays: seconds after each at which the servers are read.
        clock: source of time.
        seed: of what is chosen.

    Raises:
        EndpointUnavailableError: a primary does not accept the admin login (retryable).
    """
    names = RowCache(config, SimpleNamespace(topology=topology), clock=clock)
    rng = random.Random(seed)  # noqa: S311  a sample
    cache = backend(config, deadline=PATIENT, hold=0.0, clock=clock)
    try:
        with Primaries(topology, names, plans, clock=clock, rng=rng) as primaries:
            found = _Audit(cache, primaries, clock)
            n_rows = found.add(primaries.latest(rows), delays)
            n_commits, until = 0, clock.monotonic() + watch
            while True:
                is_watching = clock.monotonic() < until and n_commits < rows
                if is_watching:
                    n_commits += found.add(primaries.commits()[: rows - n_commits], delays)
                found.read_due()
                if not is_watching and found.next_due == math.inf:
                    return found.report(n_commits, n_rows)
                left = found.next_due - clock.monotonic()
                clock.sleep(max(0.0, min(left, _PAUSE) if is_watching else left))
    finally:
        cache.close()
        names.close()


class _Audit:
    """Reads what is due, and judges."""

    def __init__(self, cache: Backend, primaries: Primaries, clock: Clock) -> None:
        self._cache = cache
        self._primaries = primaries
        self._clock = clock
        self._due: list[tuple[float, int, _Read]] = []
        self._number = itertools.count()
        self._counts: dict[str, Counter[str]] = defaultdict(Counter)
        self._cached = 0
        self._violations: list[Violation] = []
        self._places = (Place.HOME, Place.GUTTER) if cache.has_gutter else (Place.HOME,)

    def add(self, samples: Sequence[Sample], delays: Sequence[float]) -> int:
        """Have samples read so many seconds after they were seen; return their number."""
        for sample in samples:
            for delay in delays:
                self._push(sample.seen + delay, _Read(sample, delay))
        return len(samples)

    @property
    def next_due(self) -> float:
        """When the next read is due; never, when there is none."""
        return self._due[0][0] if self._due else math.inf

    def read_due(self) -> None:
        """Carry out all reads that are due."""
        reads: list[_Read] = []
        while self._due and self.next_due <= self._clock.monotonic():
            reads.append(heapq.heappop(self._due)[2])
        for place in self._places:
            here = [read for read in reads if read.place in (None, place)]
            keys = list({read.sample.key: None for read in here})
            answers: dict[str, Answer] = {}
            for at in range(0, len(keys), _BATCH):
                part = keys[at : at + _BATCH]
                asked = [Request(Op.READ, key) for key in part]
                answers |= zip(part, self._cache.run(asked, place=place), strict=True)
            self._judge(here, answers, place)

    def _judge(self, reads: Sequence[_Read], answers: Mapping[str, Answer], place: Place) -> None:
        lists: dict[DerivedPlan, list[tuple[_Read, Any]]] = defaultdict(list)
        for read in reads:
            sample, answer = read.sample, answers[read.sample.key]
            plan = sample.plan
            if answer.outcome is Outcome.UNKNOWN:
                self._counts[self._node(sample.key, place)]["unanswered"] += 1
            elif read.place is not None:  # the second look at a list
                self._checked(read, answer, place, is_old=answer.cas == read.cas)
            elif isinstance(plan, CachePlan):
                self._checked(read, answer, place, is_old=self._is_old(sample, answer))
            elif answer.kind is not Kind.VALUE or answer.outcome is not Outcome.FOUND:
                self._checked(read, answer, place, is_old=False)
            else:
                values = plan.decode(answer.payload, answer.version)
                if values is None or plan.identity(values) != sample.identity:
                    self._checked(read, answer, place, is_old=False)  # a miss, to readers
                else:
                    lists[plan].append((read, plan.value(values)))
        for plan, found in lists.items():
            now = self._primaries.values(plan, [read.sample for read, _ in found])
            later = self._clock.monotonic() + _BOUND
            for read, value in found:
                answer = answers[read.sample.key]
                if value == now[read.sample.key]:
                    self._checked(read, answer, place, is_old=False)
                else:  # older than what the primary has shown, if it is this entry that stays
                    again = _Read(read.sample, read.delay + _BOUND, place, answer.cas)
                    self._push(later, again)

    def _is_old(self, sample: Sample, answer: Answer) -> bool:
        version = shown(answer)
        if version is None or version >= sample.version:
            return False
        committed = self._primaries.version(sample)
        if version == 0:  # there may be none by now
            return committed == sample.version
        return committed != version  # a key that was inserted again may have a lower one

    def _checked(self, read: _Read, answer: Answer, place: Place, *, is_old: bool) -> None:
        sample, node = read.sample, self._node(read.sample.key, place)
        self._counts[node]["checked"] += 1
        self._cached += answer.outcome is Outcome.FOUND and answer.kind is Kind.VALUE
        if is_old:
            self._counts[node]["old"] += 1
            self._violations.append(
                Violation(
                    node,
                    sample.key,
                    sample.plan.entry if isinstance(sample.plan, CachePlan) else sample.plan.name,
                    tuple(str(value) for value in sample.identity),
                    sample.version,
                    shown(answer) or 0,
                    read.delay,
                )
            )

    def _node(self, key: str, place: Place) -> str:
        if place is Place.HOME:
            return self._cache.home(key)
        return self._cache.nodes.stand_in(key).name if isinstance(self._cache, ServedCache) else ""

    def _push(self, due: float, read: _Read) -> None:
        heapq.heappush(self._due, (due, next(self._number), read))

    def report(self, commits: int, rows: int) -> AuditReport:
        """Return what was seen."""
        servers = tuple(
            ServerCount(node, n["checked"], n["checked"] - n["old"], n["unanswered"])
            for node, n in sorted(self._counts.items())
        )
        checked = sum(each.checked for each in servers)
        return AuditReport(
            commits=commits,
            rows=rows,
            checked=checked,
            consistent=checked - len(self._violations),
            cached=self._cached,
            unanswered=sum(each.unanswered for each in servers),
            servers=servers,
            violations=tuple(self._violations),
        )


def shown(answer: Answer) -> int | None:
    """Return the version that readers are shown of an entry; 0 for "no such row", None for none."""
    if answer.outcome is not Outcome.FOUND:
        return None
    if answer.kind is Kind.VALUE or answer.kind is Kind.ABSENCE:
        return answer.version
    if answer.kind is Kind.MARKER and len(answer.payload) >= 8:
        return uncarried(answer.payload)[0]
    return None


_METRICS: Final[tuple[tuple[str, str, Callable[[ServerCount], int]], ...]] = (
    ("checked", "Reads that the last audit compared.", lambda each: each.checked),
    ("consistent", "Of these, those that showed nothing old.", lambda each: each.consistent),
    ("unanswered", "Reads that the server did not answer.", lambda each: each.unanswered),
)


def write_metrics(report: AuditReport, file: Path) -> None:
    """Write the counts of an audit as a text file that Prometheus' node exporter collects.

    Source: Prometheus, "Exposition formats", and node_exporter's textfile collector, which wants
    the file to be replaced at once.
    """
    lines: list[str] = []
    for name, text, value in _METRICS:
        metric = f"shardkit_cache_audit_{name}"
        lines += [f"# HELP {metric} {text}", f"# TYPE {metric} gauge"]
        lines += [f'{metric}{{server="{each.node}"}} {value(each)}' for each in report.servers]
    metric = "shardkit_cache_audit_samples"
    lines += [f"# HELP {metric} What the last audit looked for.", f"# TYPE {metric} gauge"]
    lines += [f'{metric}{{source="commits"}} {report.commits}']
    lines += [f'{metric}{{source="tables"}} {report.rows}']
    beside = file.with_name(f"{file.name}.{os.getpid()}")
    beside.write_text("\n".join(lines) + "\n")
    beside.replace(file)
