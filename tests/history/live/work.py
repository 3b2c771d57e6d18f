"""What one client does, and writes down: one operation after the other, through shardkit only.

Whatever writes has a name, so that `Cluster.run` may run it again after a lost answer to COMMIT:
a client's error is then one that the default retry has not spared it.
"""

from __future__ import annotations

import itertools
import sys
import time
import traceback
from collections import Counter as Counts
from collections.abc import Callable
from typing import Any

from sqlalchemy import func, select, update

from shardkit import ReadSession, WriteSession, deadline, ids
from shardkit.errors import OutcomeUnknownError, UniqueViolationError
from shardkit.retry import is_transient
from tests.history.live.plan import NotedCluster, Plan, draw_of
from tests.history.live.tables import (
    ACCOUNTS,
    Account,
    Base,
    Chain,
    Counter,
    Element,
    Holder,
    Note,
    Page,
    Register,
    place,
)  # fmt: skip
from tests.history.recorder import Recorder

__all__ = ["ChangedItsMindError", "Client", "stamp_of"]

_NAMES = 24
_PAUSE = 0.05


class ChangedItsMindError(Exception):
    """The program rolls back on purpose."""


class Client:
    """One client: a thread with a recorder.

    Args:
        plan: of the run.
        cluster: shared by the threads of the process.
        name: unique in the run.
    """

    def __init__(self, plan: Plan, cluster: NotedCluster, name: str, recorder: Recorder) -> None:
        self.plan = plan
        self.cluster = cluster
        self.name = name
        self.recorder = recorder
        self.draw = draw_of(plan, name)
        self.token: str | None = None
        self.errors: Counts[str] = Counts()
        self._numbers = itertools.count(1)
        self._held: dict[str, int] = {}

    def step(self) -> None:
        """Do one thing."""
        getattr(self, f"_do_{self.draw.choice(self.plan.kinds)}")()

    # -- how an operation is run and written down

    def _serial(self) -> str:
        return f"{self.name}.{next(self._numbers)}"

    def _number(self) -> int:
        """Return a number that nobody else writes."""
        # A name is a word and a number of at most three digits each: client-7.2 writes 7002000001.
        process, _, thread = self.name.rpartition("-")[2].partition(".")
        return (int(process) * 1000 + int(thread)) * 1_000_000 + next(self._numbers)

    def _op(
        self,
        kind: str,
        do: list[Any],
        shard: int,
        run: Callable[[], tuple[Any, dict[str, Any]]],
        **more: Any,
    ) -> bool:
        """Run an operation and write down what came of it; return whether it happened."""
        seconds = self.plan.deadline
        n = self.recorder.invoke(kind, do, shard=shard, deadline=seconds, **more)
        try:
            with deadline(seconds):
                got, also = run()
        except (UniqueViolationError, ChangedItsMindError) as no:
            self.recorder.fail(n, is_refused=True, why=type(no).__name__)
        except OutcomeUnknownError as unknown:
            self._failed(kind, unknown)
            self.recorder.unknown(n, why=_text(unknown))
        except Exception as error:  # noqa: BLE001  whatever a client is told is written down
            self._failed(kind, error)
            self.recorder.fail(n, why=_text(error))
        else:
            self.recorder.ok(n, got, **also)
            return True
        return False

    def _failed(self, kind: str, error: Exception) -> None:
        # A fact of the history, so that it is counted whatever becomes of this process.
        self.recorder.fact("error", text=f"{kind}: {_text(error)}")
        seconds = time.monotonic() - self.plan.began
        print(f"{seconds:.3f} {self.name} {kind}", file=sys.stderr)
        traceback.print_exception(error)  # into the log of the process

    def _writes(
        self, fn: Callable[[WriteSession], Any], near: int
    ) -> Callable[[], tuple[Any, dict[str, Any]]]:
        """Return what runs a unit of work that has a name."""
        operation = self._serial()

        def run() -> tuple[Any, dict[str, Any]]:
            if self.plan.is_named:
                got: Any = self.cluster.run(fn, operation=operation, near=near)
            else:
                got = self.cluster.run(fn)
            self.token = self.cluster.last_token()
            return (got["got"], got["more"]) if isinstance(got, dict) and "more" in got else (got, {})  # fmt: skip

        return run

    def _hold(self) -> None:
        """Let a transaction stay open for a moment."""
        if self.plan.hold:
            time.sleep(self.draw.random() * self.plan.hold)

    def _looks(self, fn: Callable[[WriteSession], Any]) -> Callable[[], tuple[Any, dict[str, Any]]]:
        """Return what reads from the primary."""
        return lambda: (self.cluster.run(fn), {})

    def _shard(self) -> int:
        return self.draw.randrange(self.plan.logical_shards)

    def _list(self) -> int:
        return self.draw.choice(self.plan.lists_at(time.monotonic()))

    # -- kinds

    def _do_append(self) -> None:
        shard = self._shard()
        keys = sorted(self._list() for _ in range(self.draw.randint(1, 3)))
        do: list[list[Any]] = []
        for key in keys:
            name = f"k{shard}.{key}"
            is_append = self.draw.random() < 0.6
            do.append(["append", name, self._number()] if is_append else ["read", name])
        changes_its_mind = self.draw.random() < 0.05

        def unit(session: WriteSession) -> list[list[int]]:
            got = []
            for key, (verb, _, *value) in zip(keys, do, strict=True):
                row = place(Chain, shard, key)
                if verb == "append":
                    items = func.array_append(Chain.items, value[0])
                    session.execute(update(Chain).where(Chain.id == row).values(items=items))
                else:
                    found = session.scalars(select(Chain.items).where(Chain.id == row)).one()
                    got.append(list(found))
            if changes_its_mind:
                raise ChangedItsMindError
            return got

        run = self._writes(unit, place(Chain, shard, keys[0]))
        if all(verb == "read" for verb, *_ in do):
            run = self._looks(unit)
        self._op("append", do, shard, run, level="read committed")

    def _do_register(self) -> None:
        shard, number = self._shard(), self.draw.randrange(3)
        row, key = place(Register, shard, number), f"r{shard}.{number}"
        if self.draw.random() < 0.5:
            value = self._number()

            def write(session: WriteSession) -> None:
                session.execute(update(Register).where(Register.id == row).values(value=value))

            self._op("register", ["write", key, value], shard, self._writes(write, row))
        else:
            read = self._looks(
                lambda s: s.scalars(select(Register.value).where(Register.id == row)).one()
            )
            self._op("register", ["read", key], shard, read)

    def _do_set(self) -> None:
        shard, number = self._shard(), self._list()
        home, name = place("sets", shard, number), f"s{shard}.{number}"
        if self.draw.random() < 0.25:
            read = self._looks(
                lambda s: list(s.scalars(select(Element.value).where(Element.set_id == home)))
            )
            self._op("set", ["read", name], shard, read)
            return
        value = self._serial()

        def add(session: WriteSession) -> dict[str, Any]:
            element = Element(set_id=home, value=value, stamp=func.history.stamp(shard))
            session.add(element)
            session.flush()
            self._hold()
            ids_ = [element.id, f"{shard}/{element.number}"]
            return {"got": None, "more": {"ids": ids_, "stamp": stamp_of(element.stamp)}}

        self._op("set", ["add", name, value], shard, self._writes(add, home))

    def _do_bank(self) -> None:
        shard = self._shard()
        bank, name = place("banks", shard, 0), f"b{shard}"
        if self.draw.random() < 0.4:
            self._op("bank", ["read", name], shard, self._looks(lambda s: balances(s, shard)))
            return
        source, target = self.draw.sample(range(ACCOUNTS), 2)
        amount = self.draw.randint(1, 9)
        do = ["transfer", name, str(source), str(target), amount]

        def transfer(session: WriteSession) -> None:
            for number in sorted((source, target)):  # one order: no deadlocks
                row = place(Account, shard, number)
                change = -amount if number == source else amount
                session.execute(
                    update(Account)
                    .where(Account.id == row, Account.bank_id == bank)
                    .values(balance=Account.balance + change)
                )

        self._op("bank", do, shard, self._writes(transfer, bank))

    def _do_name(self) -> None:
        name = f"name {self.draw.randrange(_NAMES)}"
        chance = self.draw.random()
        if name in self._held and chance < 0.5:
            home = self._held.pop(name)
            shard = ids.shard_of(home)

            def release(session: WriteSession) -> None:
                held = session.get_by(Holder, name=name)
                if held is not None and held.owner == self.name:
                    session.delete(held)

            do = ["release", name, self.name]
            if not self._op("name", do, shard, self._writes(release, home)):
                self._held[name] = home
        elif chance < 0.3:

            def owner(session: WriteSession) -> str | None:
                held = session.get_by(Holder, name=name)
                return None if held is None else str(held.owner)

            self._op("name", ["read", name], 0, self._looks(owner))
        else:
            shard = self._shard()
            home = place("homes", shard, 0)

            def claim(session: WriteSession) -> None:
                session.add(Holder(home_id=home, name=name, owner=self.name))

            if self._op("name", ["claim", name, self.name], shard, self._writes(claim, home)):
                self._held[name] = home

    def _do_page(self) -> None:
        self._row(Page, "page")

    def _do_note(self) -> None:
        self._row(Note, "note")

    def _row(self, model: type[Page | Note], word: str) -> None:
        shard, number = self._shard(), self.draw.randrange(3)
        row, key = place(model, shard, number), f"{word} {shard}.{number}"
        if self.draw.random() < 0.3:

            def write(session: WriteSession) -> int:
                found: Any = session.get(model, row, with_for_update=True)
                found.number += 1
                return int(found.number)

            self._op("row", ["write", key], shard, self._writes(write, row), session=self.name)
            return
        self._op("row", ["read", key], shard, lambda: self._read(model, row), session=self.name)

    def _read(self, model: type[Base], row: int) -> tuple[int, dict[str, Any]]:
        """Read in a reader with the token, again while that may help: readers are not run."""
        while True:
            try:
                with self.cluster.reader(after=self.token) as session:
                    self.cluster.forget_hits()
                    found: Any = session.get(model, row)
                    number = 0 if found is None else int(found.number)
                    source = "cache" if self.cluster.had_hits() else "database"
                    self.token = session.token
                    return number, {"source": source}
            except Exception as error:
                if not is_transient(error):
                    raise
                self.errors["(readers that tried again)"] += 1
                time.sleep(self.draw.random() * _PAUSE)

    def _do_emit(self) -> None:
        shard, number = self._shard(), self.draw.randrange(3)
        row, key = place(Counter, shard, number), f"e{shard}.{number}"
        event = self._serial()
        home = place("homes", self._shard(), 1)
        changes_its_mind = self.draw.random() < 0.1

        def emit(session: WriteSession) -> int:
            counter: Any = session.get(Counter, row, with_for_update=True)
            counter.number += 1
            payload = {"event": event, "key": key, "position": counter.number, "home": home}
            session.emit("happened", payload, key=row)
            if changes_its_mind:
                session.flush()
                raise ChangedItsMindError
            return int(counter.number)

        self._op("emit", ["emit", key, event], shard, self._writes(emit, row))


def balances(session: WriteSession | ReadSession, shard: int) -> dict[str, int]:
    """Return what every account of a bank has, in one statement."""
    bank = place("banks", shard, 0)
    rows = session.execute(select(Account.id, Account.balance).where(Account.bank_id == bank))
    numbers = {place(Account, shard, n): str(n) for n in range(ACCOUNTS)}
    return {numbers[row]: balance for row, balance in rows}


def stamp_of(text: str) -> list[Any]:
    """Return what a database said of itself: system, timeline, epoch."""
    system, timeline, epoch = text.split(":")
    return [system, int(timeline, 16), int(epoch)]


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
