"""Reads rows through the cache: drives `Reader` machines against the servers and a primary.

Called by sessions that read. What the cache does not answer, because it is not there or is slow,
is left to the session, which reads as it would without a cache: a cache fails no request. What it
answers with "nothing", "being written" or "garbage" is read from the primary: a replica may be
behind what the cache would have shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from shardkit import deadlines
from shardkit.cache import Kind, Outcome, Reader
from shardkit.cached import CachePlan
from shardkit.caching.lives import MARKER_LIFE
from shardkit.caching.operations import Answer, Request
from shardkit.caching.repair import Phase
from shardkit.caching.tally import CacheCounts
from shardkit.derivedplan import DerivedPlan
from shardkit.errors import UnavailableError
from shardkit.flights import Flights

if TYPE_CHECKING:  # which makes this
    from shardkit.rowcache import Rows

__all__ = ["ELSEWHERE", "CacheReads", "Found", "Plan", "Primaries", "Reading", "Where"]

Plan = CachePlan | DerivedPlan
"""How rows of a class are cached, or one list or count of rows."""

Where = tuple[int, tuple[Any, ...]]
"""Logical shard and primary key of a row."""

Primaries = Callable[[Sequence[int]], AbstractContextManager[Any]]
"""Returns a session in which statements about logical shards are asked of their primaries and of
nobody else, each by itself: on a snapshot of its own."""


class Found(NamedTuple):
    """What became of looking for one row.

    Attributes:
        values: in the order of the plan's columns; None where there is no row, or no answer.
        payload: the row, encoded, for those who share the answer; None when it has no code.
        is_known: whether this is the answer; else the session has to read the row itself.
    """

    values: Sequence[Any] | None
    payload: bytes | None
    is_known: bool


ELSEWHERE: Final = Found(None, None, is_known=False)
"""The session has to read the row itself."""

_ABSENT: Final = Found(None, None, is_known=True)


class CacheReads:
    """Reads rows of one cluster through its cache, for any number of sessions.

    Args:
        rows: the cache.
        flights: what others of this process are reading.
    """

    def __init__(self, rows: Rows, flights: Flights[Found]) -> None:
        self._rows = rows
        self._flights = flights

    def reading(self, plan: Plan, primaries: Primaries) -> Reading:
        """Return one read of rows of a class, apart from those of others."""
        return Reading(self._rows, plan, primaries)

    def one(
        self, plan: Plan, shard: int, identity: tuple[Any, ...], primaries: Primaries
    ) -> tuple[Found, CacheCounts | None]:
        """Return one row; of those who want it at the same time, one asks for all.

        Args:
            plan: of its class.
            shard: its logical shard.
            identity: its primary key, for which `plan.names_row` holds.
            primaries: reads it, when it has to be read.

        Returns:
            The row, and what happened on the way; None for a hit and nothing else.
        """
        rows = self._rows
        key = rows.key(plan, shard, identity)
        reading = self.reading(plan, primaries)
        found, is_shared = self._flights.fetch(
            key, lambda: reading.one(key, (shard, identity)), deadlines.left(MARKER_LIFE)
        )
        if is_shared:
            found = _own(plan, found)
            counts = CacheCounts(hits=1) if found.is_known else CacheCounts(misses=1)
            rows.tally.add(counts)
            return found, counts
        if reading.is_plain_hit:
            rows.tally.hit()
            return found, None
        rows.tally.add(counts := reading.counts)
        return found, counts

    def many(
        self, plan: Plan, wanted: Sequence[Where], primaries: Primaries
    ) -> tuple[Mapping[tuple[Any, ...], Found], CacheCounts]:
        """Return many rows by primary key: one round trip per cache server, one read of misses.

        Args:
            plan: of their class.
            wanted: where they are, each once.
            primaries: reads those that have to be read.
        """
        return self.together([(plan, wanted)], primaries)[0]

    def together(
        self, parts: Sequence[tuple[Plan, Sequence[Where]]], primaries: Primaries
    ) -> list[tuple[Mapping[tuple[Any, ...], Found], CacheCounts]]:
        """Return rows of several plans as `many` does; all are asked for in the same round trip.

        Args:
            parts: plans, and where their rows are.
            primaries: reads those that have to be read.
        """
        readings = [self.reading(plan, primaries) for plan, _ in parts]
        requests: list[Request] = []
        for reading, (_, wanted) in zip(readings, parts, strict=True):
            requests += reading.begun(wanted)
        answers = iter(self._rows.run(requests))
        for reading in readings:
            reading.answered(answers)
        found = []
        for at, reading in enumerate(readings):
            try:
                found.append((reading.ended(), reading.counts))
            except BaseException:
                for other in readings[at + 1 :]:
                    other.release()
                raise
            self._rows.tally.add(reading.counts)
        return found


def _own(plan: Plan, found: Found) -> Found:
    """Return the answer of another one with values of its own, as some can be changed."""
    if found.payload is None:
        return found if found.values is None else ELSEWHERE
    values = plan.decode(found.payload)
    return ELSEWHERE if values is None else found._replace(values=values)


class Reading:
    """One read: of one row, or of many in step.

    Attributes:
        is_plain_hit: whether that was one hit and nothing else.
    """

    __slots__ = (
        "_counted",
        "_found",
        "_machines",
        "_plan",
        "_primaries",
        "_rows",
        "_wanted",
        "is_plain_hit",
    )

    def __init__(self, rows: Rows, plan: Plan, primaries: Primaries) -> None:
        self._rows = rows
        self._plan = plan
        self._primaries = primaries
        self._machines: dict[str, Reader] = {}
        self._wanted: dict[str, Where] = {}
        self._found: dict[str, Found] = {}
        self._counted: Counter[str] = Counter()
        self.is_plain_hit = False

    @property
    def counts(self) -> CacheCounts:
        """What happened so far."""
        return CacheCounts(**self._counted)

    def one(self, key: str, where: Where) -> Found:
        """Return one row."""
        plan, rows = self._plan, self._rows
        machine = Reader(key, rows.floor(key), plan.lives)
        answer = rows.run((machine.request,))[0]  # type: ignore[arg-type]  # it has just begun
        machine = machine.advance(answer)
        if machine.phase is Phase.DONE:  # nearly always a hit
            found = self._hit(where, machine)
            if found is not None:
                self.is_plain_hit = True
                return found
        self._machines[key] = machine
        self._wanted[key] = where
        self._heard(key, answer)
        self._finish()
        return self._found[key]

    def begun(self, wanted: Sequence[Where]) -> Sequence[Request]:
        """Begin to read many rows; return what to ask first."""
        rows, plan = self._rows, self._plan
        for where in wanted:
            key = rows.key(plan, *where)
            self._machines[key] = Reader(key, rows.floor(key), plan.lives)
            self._wanted[key] = where
        return [m.request for m in self._machines.values()]  # type: ignore[misc]  # just begun

    def answered(self, answers: Iterator[Answer]) -> None:
        """Take the answers to what was asked first."""
        for key in list(self._machines):
            answer = next(answers)
            self._machines[key] = self._machines[key].advance(answer)
            self._heard(key, answer)

    def ended(self) -> Mapping[tuple[Any, ...], Found]:
        """Read what the cache has not, and return all rows by primary key."""
        self._finish()
        return {where[1]: self._found[key] for key, where in self._wanted.items()}

    def release(self) -> None:
        """Read nothing more: give leases back, for others wait for the rows."""
        for key, machine in self._machines.items():
            if machine.must_load:
                self._found[key] = ELSEWHERE
                self._machines[key] = machine.not_loaded()
        self._release()

    # -- the machines, in step

    def _finish(self) -> None:
        """Drive the machines until all have found their rows."""
        while self._machines:
            self._load()
            while any(m.phase in _AFTER for m in self._machines.values()):
                self._ask(_AFTER)
            if not self._machines:
                return
            if any(m.must_load for m in self._machines.values()):
                continue
            self._counted["waits"] += len(self._machines)
            self._rows.pause(deadlines.left(max(m.pause for m in self._machines.values())))
            if deadlines.is_over():  # whoever reads the database is told so
                self._give_up()
            else:
                self._ask()

    def _ask(self, phases: frozenset[Phase] | None = None) -> None:
        """Send what machines ask, in one round trip per server."""
        asking = [
            (key, request)
            for key, machine in self._machines.items()
            if (phases is None or machine.phase in phases)
            and (request := machine.request) is not None
        ]
        answers = self._rows.run([request for _, request in asking])
        for (key, _), answer in zip(asking, answers, strict=True):
            before = self._machines[key]
            self._machines[key] = before.advance(answer)
            if before.phase is Phase.FILL:
                self._counted["fills"] += answer.outcome is Outcome.DONE
            self._heard(key, answer, is_asked=before.phase is Phase.ASK)

    def _heard(self, key: str, answer: Answer, *, is_asked: bool = True) -> None:
        """Note what a server answered a machine that has advanced."""
        machine = self._machines[key]
        if answer.outcome is Outcome.UNKNOWN:
            self._counted["unanswered"] += 1
            if is_asked:  # as if there were no cache
                self._settle(key, ELSEWHERE, "misses")
                return
        if is_asked and answer.kind is Kind.GARBAGE:
            self._counted["garbage"] += 1
        if machine.phase is not Phase.DONE:
            return
        if key in self._found:  # loaded, and stored by now
            del self._machines[key]
            return
        found = self._hit(self._wanted[key], machine)
        if found is None:
            self._counted["garbage"] += 1
            self._machines[key] = machine.rejected()
        else:
            self._settle(key, found, "hits")

    def _hit(self, where: Where, machine: Reader) -> Found | None:
        """Return the row that the cache had, or None when it had none of this row."""
        if machine.kind is Kind.ABSENCE:
            return _ABSENT
        plan = self._plan
        values = plan.decode(machine.payload, machine.version)
        if values is None or plan.identity(values) != where[1]:
            return None
        return Found(values, machine.payload, is_known=True)

    def _load(self) -> None:
        """Read from the primaries what has to be read, in one statement that starts now."""
        loading = [key for key, machine in self._machines.items() if machine.must_load]
        if not loading:
            return
        self._counted["misses"] += len(loading)
        try:
            read = self._read([self._wanted[key] for key in loading])
        except UnavailableError:  # a replica may be there
            for key in loading:
                self._not_loaded(key, ELSEWHERE)
        except BaseException:
            for key in loading:
                self._not_loaded(key, ELSEWHERE)
            self._release()
            raise
        else:
            for key in loading:
                self._loaded(key, read.get(self._wanted[key][1]))

    def _loaded(self, key: str, values: Sequence[Any] | None) -> None:
        plan = self._plan
        payload = None if values is None else plan.encode(values)
        if values is not None and payload is None:  # too large, or strange: it stays out
            self._not_loaded(key, Found(values, None, is_known=True))
            return
        version = 0 if values is None else values[plan.version_index]
        self._found[key] = Found(values, payload, is_known=True)
        self._advanced(key, self._machines[key].loaded(version, payload))

    def _not_loaded(self, key: str, found: Found) -> None:
        self._found[key] = found
        self._advanced(key, self._machines[key].not_loaded())

    def _advanced(self, key: str, machine: Reader) -> None:
        if machine.is_done:
            del self._machines[key]
        else:
            self._machines[key] = machine

    def _release(self) -> None:
        """Give leases back whose rows are not read: others wait for them."""
        held = [m.request for m in self._machines.values() if m.phase is Phase.REMOVE]
        self._machines.clear()
        if held:
            self._rows.run([request for request in held if request is not None])

    def _give_up(self) -> None:
        for key in list(self._machines):
            self._settle(key, ELSEWHERE, "misses")

    def _settle(self, key: str, found: Found, what: str) -> None:
        self._counted[what] += 1
        self._found[key] = found
        del self._machines[key]

    # -- the database

    def _read(self, wanted: Sequence[Where]) -> Mapping[tuple[Any, ...], list[Any]]:
        plan, found = self._plan, list[list[Any]]()
        with self._primaries([shard for shard, _ in wanted]) as session:
            for statement, params, shard in plan.questions(wanted, self._rows.group):
                bound = None if shard is None else {"logical_shard": shard}
                result = session.execute(statement, params, bind_arguments=bound)
                found += [plan.answered(row, wanted) for row in result]
        return {plan.identity(values): values for values in found}


_AFTER: Final = frozenset({Phase.REMOVE, Phase.FILL})
