"""Clients of the simulated databases, as programs that use shardkit behave.

Each runs one unit of work after the other: it looks up who owns the logical shard, and runs a
transaction; what certainly did not commit is run again, what may have committed is unknown. What
it was told goes into the journal. Writers of one kind share a client, so that every history has a
bit of everything.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Final

from shardkit.ops.moves.transitions import Expire
from shardkit.ownership import LIFT_AFTER
from tests.history.records import Operation
from tests.simulation.answers import Error, Ok
from tests.simulation.database import Database
from tests.simulation.holding import Timed
from tests.simulation.scheduler import LOST, Call

if TYPE_CHECKING:
    from tests.simulation.world import World

__all__ = ["ACCOUNTS", "Client", "FailedError", "UnknownError"]

ACCOUNTS: Final = {"a": 10, "b": 10, "c": 10}
_ATTEMPTS: Final = 7
_TIMEOUT: Final = 0.5
DEADLINE: Final = 40.0
"""Seconds that a client's deadline allows: more than its attempts may take together."""

Work = Generator[Any, Any, Any]


class FailedError(Exception):
    """The transaction certainly did not commit."""


class RefusedError(FailedError):
    """It was not to be: nothing has failed."""


class UnknownError(Exception):
    """The transaction may have committed."""


class Client:
    """One client process.

    Args:
        world: where it lives.
        name: its name in the history.
    """

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.journal = world.journal
        self.random = world.simulation.random
        self.bugs = world.bugs
        self._owners: dict[int, str] = {}
        self._count = 0
        self._tokens: dict[Any, tuple[str, int, int]] = {}
        self._last = ("", 0, 0)

    # -- transactions

    def owner(self, shard: int) -> Database:
        """Return the server that it takes for the owner."""
        return self.world.databases[self._owners.get(shard, self.world.home(shard))]

    def take_owner(self, shard: int, name: str) -> None:
        """Take a server for the owner of a logical shard."""
        self._owners[shard] = name

    def ask(self, shard: int, *request: Any) -> Work:
        """Send a statement to the owner; return what it answers.

        Raises:
            FailedError: it was refused, or not answered.
        """
        answer = yield Call(self.owner(shard), request, _TIMEOUT)
        if isinstance(answer, Ok):
            return answer.value
        if isinstance(answer, Error) and answer.why == "moved":
            other = self.world.other(self.owner(shard).name)
            self._owners[shard] = answer.hint or other
        raise FailedError(answer.why if isinstance(answer, Error) else "no answer")

    def commit(self, shard: int, name: str) -> Work:
        """Commit; return the number of the commit, and the stamp of what was written.

        Raises:
            FailedError: it was rolled back.
            UnknownError: there was no answer.
        """
        answer = yield Call(self.owner(shard), ("commit", name), _TIMEOUT)
        if answer is LOST:
            raise UnknownError("no answer to COMMIT")
        if isinstance(answer, Error):
            raise FailedError(answer.why)
        return answer.value

    def run(
        self, op: Operation, shard: int, body: Callable[[str], Work], *, attempts: int = _ATTEMPTS
    ) -> Work:
        """Run a transaction until it has committed or is known not to have, or nobody knows."""
        for attempt in range(attempts):
            self._count += 1
            name = f"{self.name}.{self._count}"
            try:
                got = yield from body(name)
                sequence, stamp = yield from self.commit(shard, name)
            except FailedError as failed:
                why = str(failed)
                yield Call(self.owner(shard), ("rollback", name), 0.05)
                if why == "fenced":
                    yield from self._lift(shard)
                is_refused = isinstance(failed, RefusedError)
                if attempt + 1 < attempts and not is_refused:
                    yield self.random.random() * 0.02 * (attempt + 1)
                    continue
                self.journal.fail(op, why=why, is_refused=is_refused)
                return None
            except UnknownError as unknown:
                if "blind retry" in self.bugs and attempt + 1 < attempts:
                    continue
                self.journal.unknown(op, why=str(unknown))
                return None
            value, more = got if isinstance(got, tuple) else (got, {})
            if stamp is not None:
                more = {**more, "stamp": stamp}
                self._last = (*stamp[:2], sequence)
            self.journal.ok(op, value, **more)
            return op
        return None

    def _lift(self, shard: int) -> Work:
        """Lift a fence whose mover has gone silent, as whoever waits for it may."""
        yield Call(self.owner(shard), ("change", shard, Timed(Expire, (LIFT_AFTER,))), 0.05)

    def begin(self, kind: str, do: list[Any], shard: int, **more: Any) -> Operation:
        """Note the beginning of an operation."""
        deadline = 0.05 if "no deadline" in self.bugs else DEADLINE
        return self.journal.invoke(self.name, kind, do, shard=shard, deadline=deadline, **more)

    # -- what it does

    def lists(self) -> Work:
        """Append to lists and read lists of one logical shard."""
        world, draw = self.world, self.random
        shard = draw.randrange(world.n_shards)
        do: list[list[Any]] = []
        for _ in range(draw.randint(1, 4)):
            key = f"k{shard}.{draw.randrange(3)}"
            is_append = draw.random() < 0.5
            do.append(["append", key, world.serial()] if is_append else ["read", key])
        is_snapshot = draw.random() < 0.8
        level = "repeatable read" if is_snapshot else "read committed"
        fails = draw.random() < 0.1
        op = self.begin("append", do, shard, level=level)

        def body(name: str) -> Work:
            got = []
            for verb, key, *value in do:
                place = (shard, "lists", key)
                if verb == "append":
                    yield from self.ask(
                        shard, "update", name, is_snapshot, place, "append", value[0]
                    )
                else:
                    read = yield from self.ask(shard, "read", name, is_snapshot, place)
                    got.append(list(read or ()))
            if fails:
                raise RefusedError("the program changed its mind")
            return got

        yield from self.run(op, shard, body)

    def register(self) -> Work:
        """Write or read a register."""
        draw = self.random
        shard = draw.randrange(self.world.n_shards)
        place = (shard, "registers", f"r{shard}.{draw.randrange(2)}")
        if draw.random() < 0.5:
            value = self.world.serial()
            op = self.begin("register", ["write", place[2], value], shard)
            yield from self.run(
                op, shard, lambda n: self.ask(shard, "update", n, False, place, "set", value)
            )
        else:
            op = self.begin("register", ["read", place[2]], shard)
            yield from self.run(op, shard, lambda n: self.ask(shard, "read", n, False, place))

    def look(self, shard: int) -> Work:
        """Read everything of a logical shard, for good."""
        more: dict[str, Any] = {"final": True, "endpoint": "primary"}
        op = self.begin("set", ["read", f"s{shard}"], shard, **more)
        yield from self.run(op, shard, lambda n: self._elements(shard, n))
        op = self.begin("bank", ["read", f"b{shard}"], shard, **more)
        yield from self.run(op, shard, lambda n: self._balances(shard, n))
        do = [["read", f"k{shard}.{key}"] for key in range(3)]
        op = self.begin("append", do, shard, level="repeatable read")

        def body(name: str) -> Work:
            got = []
            for _, key in do:
                read = yield from self.ask(shard, "read", name, True, (shard, "lists", key))
                got.append(list(read or ()))
            return got

        yield from self.run(op, shard, body)

    def element(self) -> Work:
        """Add an element to a set, by an id that the database mints, or read the set."""
        draw = self.random
        shard = draw.randrange(self.world.n_shards)
        if draw.random() < 0.3:
            op = self.begin("set", ["read", f"s{shard}"], shard)
            yield from self.run(op, shard, lambda n: self._elements(shard, n))
            return
        element = self.world.serial()
        op = self.begin("set", ["add", f"s{shard}", element], shard)

        def body(name: str) -> Work:
            id_ = yield from self.ask(shard, "next", shard)
            place = (shard, "elements", element)
            yield from self.ask(shard, "update", name, False, place, "set", id_)
            return None, {"ids": [id_]}

        yield from self.run(op, shard, body)

    def _elements(self, shard: int, name: str) -> Work:
        found = yield from self.ask(shard, "scan", name, False, shard, "elements")
        return sorted(found)

    def bank(self) -> Work:
        """Transfer between two accounts, or read all."""
        draw = self.random
        shard = draw.randrange(self.world.n_shards)
        if draw.random() < 0.5:
            op = self.begin("bank", ["read", f"b{shard}"], shard)
            yield from self.run(op, shard, lambda n: self._balances(shard, n))
            return
        source, target = draw.sample(sorted(ACCOUNTS), 2)
        amount = draw.randint(1, 5)
        op = self.begin("bank", ["transfer", f"b{shard}", source, target, amount], shard)

        def body(name: str) -> Work:
            where = (shard, "accounts", source)
            yield from self.ask(shard, "update", name, True, where, "add", -amount)
            if "half a transfer" in self.bugs:
                yield from self.commit(shard, name)
                name += "'"
            where = (shard, "accounts", target)
            yield from self.ask(shard, "update", name, True, where, "add", amount)
            if "half a transfer" in self.bugs:
                yield from self.commit(shard, name)
            return None

        yield from self.run(op, shard, body)

    def _balances(self, shard: int, name: str) -> Work:
        changes = yield from self.ask(shard, "scan", name, True, shard, "accounts")
        return {account: changes.get(account, 0) + first for account, first in ACCOUNTS.items()}

    def name_(self) -> Work:
        """Claim a name, or see whose it is."""
        draw = self.random
        shard = draw.randrange(self.world.n_shards)
        name = f"n{shard}.{draw.randrange(8)}"
        place = (shard, "names", name)
        if draw.random() < 0.3:
            op = self.begin("name", ["read", name], shard)
            yield from self.run(op, shard, lambda t: self.ask(shard, "read", t, False, place))
            return
        op = self.begin("name", ["claim", name, self.name], shard)

        def body(transaction: str) -> Work:
            is_snapshot = "double claim" not in self.bugs
            owner = yield from self.ask(shard, "read", transaction, is_snapshot, place)
            if owner is not None:
                raise RefusedError("taken")
            yield from self.ask(shard, "update", transaction, is_snapshot, place, "set", self.name)
            return None

        yield from self.run(op, shard, body)

    def row(self) -> Work:
        """Write a row or read it from a replica, in a session of its own."""
        draw = self.random
        shard = draw.randrange(self.world.n_shards)
        place = (shard, "rows", draw.randrange(2))
        key = f"row {shard}.{place[2]}"
        least = self._tokens.get(shard, ("", 0, 0))
        if draw.random() < 0.4:
            op = self.begin("row", ["write", key], shard, session=self.name)
            done = yield from self.run(
                op, shard, lambda n: self.ask(shard, "update", n, False, place, "add", 1)
            )
            if done is not None:
                self._tokens[shard] = self._last
            return
        op = self.begin("row", ["read", key], shard, session=self.name)
        answer = yield Call(self.owner(shard), ("replica", place, least), _TIMEOUT)
        if isinstance(answer, Ok):
            value, token = answer.value
            if token > least and "token not raised" not in self.bugs:
                self._tokens[shard] = token
            self.journal.ok(op, value or 0, role="replica")
        else:
            yield from self.run(
                op, shard, lambda n: self._version(shard, n, place), attempts=_ATTEMPTS
            )

    def _version(self, shard: int, name: str, place: Any) -> Work:
        value = yield from self.ask(shard, "read", name, False, place)
        return value or 0

    def event(self) -> Work:
        """Emit an event in the transaction of a change, which may fail."""
        draw = self.random
        shard = draw.randrange(self.world.n_shards)
        key, event = f"e{shard}.{draw.randrange(2)}", f"event {self.world.serial():06}"
        op = self.begin("emit", ["emit", key, event], shard)
        fails = draw.random() < 0.15

        def body(name: str) -> Work:
            yield draw.random() * 0.02  # ids are older than positions
            transaction = f"{name} outbox" if "event outside" in self.bugs else name
            place = (shard, "positions", key)
            position = yield from self.ask(shard, "update", transaction, False, place, "add", 1)
            yield from self.ask(
                shard, "update", transaction, False, (shard, "outbox", event), "set",
                (key, position),
            )  # fmt: skip
            if transaction != name:
                yield from self.commit(shard, transaction)
            if fails:
                raise RefusedError("the program changed its mind")
            return position

        yield from self.run(op, shard, body)
