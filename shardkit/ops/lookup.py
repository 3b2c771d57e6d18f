"""`shardkit lookup`: unique columns filled from rows that are there, checked, and repaired.

Two scans, a page at a time, one physical shard beside the others. From rows to lookup rows: a row
that its value does not name is missing, and is added. From lookup rows to rows: a pair whose row
has another value is stale, and is removed. Both run beside those who write; what looks wrong is
looked at again before it counts. Nothing is remembered between runs: what is done is found done,
so a run that was killed is continued by the next. Called by the command line and by tests.
Source: docs/lookup.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from sqlalchemy import MetaData

from shardkit import ids
from shardkit.clock import SYSTEM, Clock
from shardkit.cluster import Cluster
from shardkit.errors import (
    ConfigurationError,
    InconsistentLookupError,
    InvalidUniqueValueError,
    ValueBusyError,
)
from shardkit.lookup import Lookups, Task, new_ticket, quoted, stored_value, value_or_none
from shardkit.reserving import Busy, Pair, note, release
from shardkit.topology import schema_name
from shardkit.uniques import Lookup, Value, lookups_of

__all__ = ["Kind", "Limits", "Report", "lookups_in", "run"]

Kind = Literal["backfill", "check", "repair"]
"""Add what is missing; look; add what is missing and remove what is stale."""

# AccessShareLock; a page of the primary key's index.
_ROWS: Final = (
    "SELECT {1} FROM {0} WHERE {2} > %(after)s AND {3} IS NOT NULL ORDER BY {2} LIMIT %(n)s"
)
_VALUES: Final = "SELECT {1}, {2} FROM {0} WHERE {1} = ANY(%(ids)s::bigint[])"
_LOOKUP_ROWS: Final = (
    "SELECT lookup, value, ids, tickets FROM {0}.shardkit_lookup "
    "WHERE lookup = %(lookup)s AND value > %(after)s ORDER BY value LIMIT %(n)s"
)


@dataclass(frozen=True, slots=True)
class Limits:
    """How fast a scan may go.

    Attributes:
        batch: rows of a page, 1 or more.
        pause: seconds between two pages of a physical shard.
        from_shard: logical shards below are left out.
        rows: of each logical shard that are looked at, the oldest first, and no lookup rows, for a
            sample; None for all.
    """

    batch: int = 500
    pause: float = 0.0
    from_shard: int = 0
    rows: int | None = None


@dataclass(slots=True)
class Report:
    """What a run found of one unique column.

    Attributes:
        lookup: its name, `table.column`.
        n_rows: rows that have a value.
        n_missing: rows that their value did not name.
        n_added: those of them that it names now.
        n_pairs: pairs of lookup rows that were looked at.
        n_stale: pairs whose row has another value, or is gone.
        n_removed: those of them that were removed.
        n_busy: values that a transaction was about to change; look again.
        duplicates: ids of rows that have one value, each group once.
        unkept: ids of rows whose value cannot be kept unique, as it is too long.
    """

    lookup: str
    n_rows: int = 0
    n_missing: int = 0
    n_added: int = 0
    n_pairs: int = 0
    n_stale: int = 0
    n_removed: int = 0
    n_busy: int = 0
    duplicates: set[tuple[int, ...]] = field(default_factory=set)
    unkept: set[int] = field(default_factory=set)

    @property
    def error(self) -> InconsistentLookupError | None:
        """What somebody has to see to, or None."""
        parts = [
            f"{n:,} {what}"
            for n, what in (
                (len(self.duplicates), "values that several rows have"),
                (len(self.unkept), "rows whose value cannot be kept"),
                (self.n_missing - self.n_added, "rows that their value does not name"),
            )
            if n
        ]
        if not parts:
            return None
        return InconsistentLookupError(f"{self.lookup}: {', '.join(parts)}")


def lookups_in(metadata: MetaData, wanted: str | None = None) -> list[Lookup]:
    """Return the unique columns of models.

    Args:
        metadata: of the models.
        wanted: `table.column` of the one meant; None for all.

    Raises:
        ConfigurationError: there is none.
    """
    found = [lookup for table in metadata.sorted_tables for lookup in lookups_of(table)]
    chosen = [lookup for lookup in found if wanted in {None, lookup.name}]
    if not chosen:
        names = ", ".join(lookup.name for lookup in found) or "none"
        raise ConfigurationError(
            f"no unique column {wanted}" if wanted else "the models have no unique column",
            hint=f"the models declare {names}",
        )
    return chosen


def run(
    cluster: Cluster,
    lookup: Lookup,
    kind: Kind,
    *,
    limits: Limits = Limits(),
    on_shard: Callable[[int], None] = lambda _: None,
    clock: Clock = SYSTEM,
) -> Report:
    """Fill, check or repair one unique column.

    Args:
        cluster: where.
        lookup: the column.
        kind: what to do.
        limits: how fast.
        on_shard: told of every logical shard that is through.
        clock: what pauses.

    Raises:
        UnavailableError: a server does not answer; what was done stays done (retryable).
    """
    scan = _Scan(cluster, lookup, kind, limits, clock)
    owned = cluster.connections.owners.ask().owned_by
    groups = [
        [shard for shard in owned(name) if shard >= limits.from_shard]
        for name in cluster.topology.physical
    ]

    def work(shards: Sequence[int]) -> Report:
        report = Report(lookup.name)
        for shard in shards:
            scan.rows(shard, report)
            if kind != "backfill" and limits.rows is None:
                scan.pairs(shard, report)
            on_shard(shard)
        return report

    groups = [group for group in groups if group]
    with ThreadPoolExecutor(len(groups) or 1) as pool:
        return _together(lookup.name, list(pool.map(work, groups)))


def _together(name: str, reports: Sequence[Report]) -> Report:
    whole = Report(name)
    for part in reports:
        whole.n_rows += part.n_rows
        whole.n_missing += part.n_missing
        whole.n_added += part.n_added
        whole.n_pairs += part.n_pairs
        whole.n_stale += part.n_stale
        whole.n_removed += part.n_removed
        whole.n_busy += part.n_busy
        whole.duplicates |= part.duplicates
        whole.unkept |= part.unkept
    return whole


class _Scan:
    def __init__(
        self, cluster: Cluster, lookup: Lookup, kind: Kind, limits: Limits, clock: Clock
    ) -> None:
        self._servers = cluster.connections
        self._lookups: Lookups = cluster.connections.lookups
        self._lookup = lookup
        self._kind = kind
        self._limits = limits
        self._clock = clock

    # -- from rows to lookup rows

    def rows(self, shard: int, report: Report) -> None:
        """Look at the rows of a logical shard, and add those that are missing."""
        for page in self._pages(shard, report):
            report.n_rows += len(page)
            pairs = self._lookups.read(set(page.values()))
            missing = {
                row_id: value
                for row_id, value in page.items()
                if row_id not in {pair.id for pair in pairs[value]}
            }
            if missing and self._kind == "check":
                # Others write meanwhile: only a row that still has the value lacks its pair.
                missing = self._still(shard, missing)
                again = self._lookups.read(set(missing.values()))
                missing = {
                    row_id: value
                    for row_id, value in missing.items()
                    if row_id not in {pair.id for pair in again[value]}
                }
            report.n_missing += len(missing)
            if missing and self._kind != "check":
                report.n_added += self._add(missing, report)
                pairs |= self._lookups.read(set(missing.values()))
            for value, some in pairs.items():
                if len(some) > 1 or missing:
                    self._compare(value, some, report)

    def _pages(self, shard: int, report: Report) -> Iterator[dict[int, Value]]:
        lookup, after = self._lookup, -1
        names = f"{quoted(lookup.id_column)}, {quoted(lookup.column)}"
        table = f"{schema_name(shard)}.{quoted(lookup.table)}"
        query = _ROWS.format(table, names, quoted(lookup.id_column), quoted(lookup.column))
        left = self._limits.rows
        while left is None or left > 0:
            n_rows = self._limits.batch if left is None else min(left, self._limits.batch)
            found = self._ask(shard, query, {"after": after, "n": n_rows})
            if not found:
                return
            after = found[-1][0]
            left = None if left is None else left - len(found)
            page = {}
            for row_id, given in found:
                try:
                    page[row_id] = lookup.value(
                        bytes(given) if isinstance(given, memoryview) else given
                    )
                except InvalidUniqueValueError:
                    report.unkept.add(row_id)
            yield page
            if self._limits.pause:
                self._clock.sleep(self._limits.pause)

    def _still(self, shard: int, rows: Mapping[int, Value]) -> dict[int, Value]:
        """Return those rows that have their values now."""
        with self._servers.borrow(shard, waits=False) as connection:
            return {
                row_id: value
                for row_id, value in rows.items()
                if stored_value(connection, self._lookup, row_id) == value
            }

    def _add(self, rows: Mapping[int, Value], report: Report) -> int:
        """Add rows to the lookup rows of their values; return how many."""
        tasks = [Task(value, note(Pair(row_id, new_ticket()))) for row_id, value in rows.items()]
        try:
            self._lookups.run(tasks)
        except ValueBusyError:
            report.n_busy += 1
            return 0  # the next run finds what was done
        return len(tasks)

    def _compare(self, value: Value, pairs: Sequence[Pair], report: Report) -> None:
        """Note rows that have one value."""
        if len({pair.id for pair in pairs}) < 2:
            return
        try:
            having = {pair.id for pair in pairs if self._lookups.verified(value, pair)}
        except Busy:
            report.n_busy += 1
            return
        if len(having) > 1:
            report.duplicates.add(tuple(sorted(having)))

    # -- from lookup rows to rows

    def pairs(self, shard: int, report: Report) -> None:
        """Look at the lookup rows of a logical shard, and remove stale pairs."""
        after = b""
        query = _LOOKUP_ROWS.format(schema_name(shard))
        while True:
            found = self._ask(
                shard,
                query,
                {"lookup": self._lookup.name, "after": after, "n": self._limits.batch},
            )
            if not found:
                return
            after = bytes(found[-1][1])
            entries = {
                Value(self._lookup, bytes(key)): tuple(map(Pair, row_ids, tickets))
                for _, key, row_ids, tickets in found
            }
            stored = self._stored({pair.id for pairs in entries.values() for pair in pairs})
            for value, pairs in entries.items():
                report.n_pairs += len(pairs)
                suspects = [pair for pair in pairs if stored.get(pair.id) != value]
                if suspects:
                    self._remove(value, suspects, report)
            if self._limits.pause:
                self._clock.sleep(self._limits.pause)

    def _stored(self, row_ids: set[int]) -> dict[int, Value | None]:
        """Return the values of rows, by id."""
        by_shard: dict[int, list[int]] = {}
        for row_id in row_ids:
            by_shard.setdefault(ids.shard_of(row_id), []).append(row_id)
        lookup = self._lookup
        stored: dict[int, Value | None] = {}
        for shard, mine in by_shard.items():
            if shard >= self._lookups.total:
                continue
            query = _VALUES.format(
                f"{schema_name(shard)}.{quoted(lookup.table)}",
                quoted(lookup.id_column),
                quoted(lookup.column),
            )
            for row_id, given in self._ask(shard, query, {"ids": mine}):
                stored[row_id] = value_or_none(lookup, given)
        return stored

    def _remove(self, value: Value, suspects: Sequence[Pair], report: Report) -> None:
        try:
            stale = [pair for pair in suspects if not self._lookups.verified(value, pair)]
            report.n_stale += len(stale)
            if stale and self._kind == "repair":
                row_ids = frozenset(pair.id for pair in stale)
                self._lookups.run([Task(value, release(row_ids))])
                left = self._lookups.read([value])[value]
                report.n_removed += sum(pair not in left for pair in stale)
        except (Busy, ValueBusyError):
            report.n_busy += 1

    def _ask(self, shard: int, query: str, parameters: dict[str, Any]) -> Sequence[Sequence[Any]]:
        with self._servers.borrow(shard, waits=False) as connection:
            return connection.exec_driver_sql(query, parameters).all()
