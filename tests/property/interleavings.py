"""Every interleaving of units of work that take and give up unique values, with crashes anywhere.

The steps of `shardkit.reserving` are the real ones; the servers are a model: committed rows, what
open transactions have written, row locks, tickets, lookup rows. `explore` visits every state that
any order of steps, any crash and any time-out can lead to, and checks in each that no two rows
have one value and that no row lacks its pair. `Faults` break the model on purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from shardkit.reserving import (
    Busy,
    Insert,
    Own,
    Pair,
    Pairs,
    Read,
    Swap,
    Taken,
    Verify,
    note,
    release,
    reserve,
)

Rows = tuple[tuple[int, str | None], ...]
Answers = tuple[Any, ...]
Unit = Callable[[], Generator[Any, Any, None]]


@dataclass(frozen=True)
class Lock:
    """Lock a row that is stored, and tell its value."""

    id: int


@dataclass(frozen=True)
class Hold:
    """Take the lock of a ticket."""

    ticket: int


@dataclass(frozen=True)
class Write:
    """Write a row; None deletes it."""

    id: int
    value: str | None
    is_new: bool = False


@dataclass(frozen=True)
class Save:
    """Begin a savepoint."""


@dataclass(frozen=True)
class Undo:
    """Return to the last savepoint."""


@dataclass(frozen=True)
class Commit:
    """Commit."""


@dataclass(frozen=True)
class Rollback:
    """Roll back."""


@dataclass(frozen=True)
class At:
    """A request about the lookup row of a value."""

    value: str
    request: Any


@dataclass(frozen=True)
class Look:
    """The second half of Verify, a statement of its own."""

    value: str
    id: int


class FailedError(Exception):
    """A statement of the transaction failed."""


@dataclass(frozen=True)
class Main:
    """The transaction of one unit of work.

    Attributes:
        is_open: whether it has neither ended nor died.
        writes: what it wrote, by id.
        locks: rows it has locked.
        tickets: whose locks it holds.
        saved: what a savepoint returns to.
    """

    is_open: bool = True
    writes: Rows = ()
    locks: frozenset[int] = frozenset()
    tickets: frozenset[int] = frozenset()
    saved: tuple[Any, ...] = ()


@dataclass(frozen=True)
class State:
    """Everything that the servers know, and what each unit was answered so far."""

    rows: Rows
    lookups: tuple[tuple[str, Pairs], ...]
    mains: tuple[Main, ...]
    answers: tuple[Answers | None, ...]  # None: dead or done
    looking: tuple[bool, ...]


@dataclass(frozen=True)
class Faults:
    """Ways to break the model, to see that the checks would notice."""

    no_wait: bool = False
    swap_blindly: bool = False
    swap_by_id: bool = False
    no_row_lock: bool = False


@dataclass
class Found:
    """What an exploration met."""

    n_states: int = 0
    ends: set[State] = field(default_factory=set)


# -- units of work


@dataclass(frozen=True)
class Change:
    """One object of a flush: its new value, None to delete it."""

    id: int
    value: str | None
    is_new: bool = False


Step = tuple[Change, ...] | Save | Undo


def work(steps: Sequence[Step], tickets: Sequence[int]) -> Unit:
    """Return a unit of work: flushes, savepoints, then COMMIT, as `WriteSession` does it."""
    return _Work(steps, tickets).run


@dataclass
class _Work:
    """One unit of work; `run` may be asked for again, and begins anew."""

    steps: Sequence[Step]
    fresh: Sequence[int]

    def run(self) -> Generator[Any, Any, None]:
        tickets = iter(self.fresh)
        ticket, own = next(tickets), set[int]()
        touched: dict[str, set[int]] = {}
        try:
            for step in self.steps:
                if isinstance(step, Save | Undo):
                    yield step
                    ticket = next(tickets) if isinstance(step, Undo) else ticket
                else:
                    yield from _flush(step, ticket, own, touched)
            yield Commit()
        except (Taken, Busy, FailedError):
            yield Rollback()
        for value, ids in touched.items():
            try:
                yield from about(value, release(frozenset(ids), frozenset(own)))
            except Busy:
                continue


def _flush(
    changes: Sequence[Change], ticket: int, own: set[int], touched: dict[str, set[int]]
) -> Generator[Any, Any, None]:
    truth = {}
    for change in changes:
        if not change.is_new:
            truth[change.id] = yield Lock(change.id)
    leaving: dict[str, set[int]] = {}
    for change in changes:
        old = truth.get(change.id)
        if old is not None and old != change.value:
            leaving.setdefault(old, set()).add(change.id)
            touched.setdefault(old, set()).add(change.id)
    for change in changes:
        if change.value is None or truth.get(change.id) == change.value:
            continue
        if ticket not in own:
            yield Hold(ticket)
            own.add(ticket)
        touched.setdefault(change.value, set()).add(change.id)
        gone = frozenset(leaving.get(change.value, ()))
        mine = Pair(change.id, ticket)
        yield from about(change.value, reserve(mine, frozenset(own), gone))
    for change in changes:
        yield Write(change.id, change.value, change.is_new)


def backfill(id: int, value: str, ticket: int) -> Unit:  # noqa: A002
    """Return the backfill of one row that was read with a value."""

    def run() -> Generator[Any, Any, None]:
        if (yield Look(value, id)):
            yield from about(value, note(Pair(id, ticket)))

    return run


def sweep(value: str) -> Unit:
    """Return the repair of one lookup row."""

    def run() -> Generator[Any, Any, None]:
        try:
            yield from about(value, release(None))
        except Busy:
            return

    return run


def about(value: str, steps: Any) -> Generator[Any, Any, None]:
    """Yield the requests of some steps with the value they are about."""
    answer = None
    while True:
        try:
            request = steps.send(answer)
        except StopIteration:
            return
        try:
            answer = yield At(value, request)
        except Busy as busy:
            steps.throw(busy)


# -- the model


def explore(
    rows: dict[int, str],
    units: Sequence[Unit],
    *,
    crashes: int = 1,
    faults: Faults = Faults(),
    lookups: dict[str, Pairs] | None = None,
    check: Callable[[State], None] | None = None,
) -> Found:
    """Visit every state; raise AssertionError in one that breaks a promise.

    Args:
        rows: the values that are stored at first, by id.
        units: what runs at the same time.
        crashes: how many units may die.
        faults: how the model is broken.
        lookups: the lookup rows at first; None for those that the rows need.
        check: what has to hold in every state.
    """
    first = State(
        tuple(sorted(rows.items())),
        tuple(sorted((lookups or {v: (Pair(i, -i),) for i, v in rows.items()}).items())),
        tuple(Main() for _ in units),
        tuple(() for _ in units),
        tuple(False for _ in units),
    )
    pending = _Pending(units)
    found = Found()
    seen = {(first, crashes)}
    stack = [(first, crashes)]
    while stack:
        state, left = stack.pop()
        (check or promises)(state)
        nexts = []
        for i in range(len(units)):
            if state.answers[i] is None:
                continue
            nexts += [(s, left) for s in _stepped(state, i, pending, faults)]
            if left:
                nexts.append((_dead(state, i), left - 1))
        if all(answers is None for answers in state.answers):
            found.ends.add(state)
        assert nexts or all(a is None for a in state.answers), f"stuck: {state}"
        for following in nexts:
            if following not in seen:
                seen.add(following)
                stack.append(following)
    found.n_states = len(seen)
    return found


def promises(state: State) -> None:
    """Check what every state must keep."""
    values = [value for _, value in state.rows if value is not None]
    assert len(values) == len(set(values)), f"two rows with one value: {state}"
    complete(state)


def complete(state: State) -> None:
    """Check that every row has its pair."""
    lookups = dict(state.lookups)
    for id_, value in state.rows:
        if value is not None:
            ids = {pair.id for pair in lookups.get(value, ())}
            assert id_ in ids, f"row {id_} lacks its pair: {state}"


class _Pending:
    """What a unit asks for next, given what it was answered; each history is replayed once."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self._units = units
        self._known: dict[tuple[int, Answers], Any] = {}

    def __call__(self, unit: int, answers: Answers) -> Any:
        key = (unit, answers)
        if key not in self._known:
            self._known[key] = self._replayed(unit, answers)
        return self._known[key]

    def _replayed(self, unit: int, answers: Answers) -> Any:
        steps = self._units[unit]()
        try:
            request = next(steps)
            for answer in answers:
                kinds = {"busy": Busy, "failed": FailedError}
                if isinstance(answer, str) and answer in kinds:
                    request = steps.throw(kinds[answer]())
                else:
                    request = steps.send(answer)
        except StopIteration:
            return None
        return request


def _stepped(state: State, i: int, pending: _Pending, faults: Faults) -> Iterator[State]:
    answers = state.answers[i]
    assert answers is not None, "it runs"
    request = pending(i, answers)
    if request is None:
        yield _finished(state, i)
        return
    outcome = _outcome(state, i, request, faults)
    if outcome is None:  # it waits: it may go on doing so, or be told that it took too long
        answer = "busy" if isinstance(request, At) else "failed"
        yield _answered(state, i, answer)
        return
    yield outcome


def _outcome(  # noqa: PLR0911 - one for each kind of request
    state: State, i: int, request: Any, faults: Faults
) -> State | None:
    """Return the state after a request, or None when it has to wait."""
    main = state.mains[i]
    rows, mine = dict(state.rows), dict(main.writes)
    match request:
        case Look(value, id_):
            return _answered(state, i, rows.get(id_) == value)
        case Lock(id_):
            if not faults.no_row_lock:
                if _is_locked(state, i, id_):
                    return None
                main = replace(main, locks=main.locks | {id_})
            seen = mine[id_] if id_ in mine else rows.get(id_)
            return _answered(_with(state, i, main), i, seen)
        case Hold(ticket):
            main = replace(main, tickets=main.tickets | {ticket})
            return _answered(_with(state, i, main), i, None)
        case Write(id_, value, is_new):
            if _is_locked(state, i, id_):
                return None
            if is_new and rows.get(id_) is not None and id_ not in mine:
                return _answered(state, i, "failed")
            writes = tuple(sorted({**mine, id_: value}.items()))
            main = replace(main, writes=writes, locks=main.locks | {id_})
            return _answered(_with(state, i, main), i, None)
        case Save():
            saved = (*main.saved, (main.writes, main.locks, main.tickets))
            return _answered(_with(state, i, replace(main, saved=saved)), i, None)
        case Undo():
            writes, locks, tickets = main.saved[-1]
            main = Main(True, writes, locks, tickets, main.saved[:-1])
            return _answered(_with(state, i, main), i, None)
        case Commit():
            kept = tuple(sorted((rows | mine).items()))
            ended = _with(replace(state, rows=kept), i, Main(is_open=False))
            return _answered(ended, i, None)
        case Rollback():
            return _answered(_with(state, i, Main(is_open=False)), i, None)
        case At(value, inner):
            return _looked_up(state, i, value, inner, faults)
    raise AssertionError(request)


def _looked_up(state: State, i: int, value: str, request: Any, faults: Faults) -> State | None:
    lookups = dict(state.lookups)
    found = lookups.get(value, ())
    match request:
        case Insert(pair):
            if found:
                return _answered(state, i, False)
            return _answered(_stored(state, lookups | {value: (pair,)}), i, True)
        case Read():
            return _answered(state, i, found)
        case Own(id_):
            mine = dict(state.mains[i].writes)
            seen = mine[id_] if id_ in mine else dict(state.rows).get(id_)
            return _answered(state, i, seen == value)
        case Swap(old, new):
            agrees = found == old
            if faults.swap_blindly:
                agrees = True
            elif faults.swap_by_id:
                agrees = [p.id for p in found] == [p.id for p in old]
            if not agrees:
                return _answered(state, i, False)
            return _answered(_stored(state, lookups | {value: new}), i, True)
        case Verify(pair):
            if not state.looking[i]:
                if any(pair.ticket in m.tickets for m in state.mains) and not faults.no_wait:
                    return None
                return replace(state, looking=_set(state.looking, i, True))
            matches = dict(state.rows).get(pair.id) == value
            after = replace(state, looking=_set(state.looking, i, False))
            return _answered(after, i, matches)
    raise AssertionError(request)


def _is_locked(state: State, i: int, id_: int) -> bool:
    return any(id_ in main.locks for j, main in enumerate(state.mains) if j != i)


def _stored(state: State, lookups: dict[str, Pairs]) -> State:
    return replace(state, lookups=tuple(sorted((v, p) for v, p in lookups.items() if p)))


def _with(state: State, i: int, main: Main) -> State:
    return replace(state, mains=_set(state.mains, i, main))


def _answered(state: State, i: int, answer: Any) -> State:
    answers = state.answers[i]
    assert answers is not None, "it runs"
    return replace(state, answers=_set(state.answers, i, (*answers, answer)))


def _finished(state: State, i: int) -> State:
    return replace(state, answers=_set(state.answers, i, None))


def _dead(state: State, i: int) -> State:
    """Return the state after a unit died: the server rolls its transaction back."""
    died = _with(state, i, Main(is_open=False))
    return _finished(replace(died, looking=_set(died.looking, i, False)), i)


def _set(values: tuple[Any, ...], i: int, value: Any) -> tuple[Any, ...]:
    return (*values[:i], value, *values[i + 1 :])
