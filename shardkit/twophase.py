"""Atomic commit over several physical shards: two phases around a decision record.

One participant coordinates. The others prepare; the coordinator commits a row that says
"commit" together with its own data, which is the decision; the others then commit what they have
prepared. Whoever finds something prepared asks the coordinator, and writes "abort" there where
nothing is decided yet: the primary key lets only one of the two answers exist, and the insert
waits for one that is under way. So every crash ends alike, whoever cleans up and whenever.

The writes of all participants hold or none; they do not become visible at one instant.
Source: presumed abort, C. Mohan, B. Lindsay, R. Obermarck, "Transaction Management in the R*
Distributed Database Management System", 1986; PostgreSQL manual, PREPARE TRANSACTION.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, Self, TypeVar

import psycopg
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError, IntegrityError

from shardkit.errors import (
    ConfigurationError,
    EndpointUnavailableError,
    OutcomeUnknownError,
    UnavailableError,
)
from shardkit.events import Listeners, TwoPhaseStep

__all__ = [
    "AtomicCommit",
    "Gid",
    "InDoubt",
    "Resolution",
    "Servers",
    "Settled",
    "in_doubt",
    "resolve",
    "settle",
]

T = TypeVar("T")

_PREFIX: Final = "shardkit"

IN_DOUBT_AFTER: Final = 3.0
"""Seconds after which a prepared transaction is taken for abandoned; a choice. Too short aborts
transactions that are slow to decide, which are then told so; nothing becomes inconsistent."""

KEEP_ABORTS: Final = 86_400.0
"""Seconds for which "abort" is remembered: longer than any client tries to commit."""

# Locks as any INSERT, and waits for a decision that is being committed, but not for ever: its
# client may be gone without its server's knowing.
_ABORT = """
WITH bound AS MATERIALIZED (SELECT pg_catalog.set_config('lock_timeout', '2s', true))
INSERT INTO shardkit.decisions (transaction, outcome) SELECT %(transaction)s, 'abort' FROM bound
ON CONFLICT DO NOTHING RETURNING outcome
"""

# A write, so that its answer tells that the decision, earlier in the log, is as durable.
_DECISION = """
UPDATE shardkit.decisions SET asked = clock_timestamp() WHERE transaction = %(transaction)s
RETURNING outcome
"""

_DECIDE = """
INSERT INTO shardkit.decisions (transaction, outcome, participants)
VALUES (%(transaction)s, 'commit', %(participants)s)
"""

# Losing this one costs a row that the resolver deletes.
_FORGET = (
    "BEGIN; SET LOCAL synchronous_commit = off; "
    "DELETE FROM shardkit.decisions WHERE transaction = '{0}'; COMMIT"
)

FINISHED_AFTER: Final = 60.0
"""Seconds after which "commit" is forgotten where no server holds a part of it any more."""

_CLEAN = """
DELETE FROM shardkit.decisions
WHERE outcome = 'abort' AND decided < clock_timestamp() - make_interval(secs => %(keep)s)
    OR outcome = 'commit' AND decided < clock_timestamp() - make_interval(secs => %(finished)s)
        AND transaction <> ALL (%(needed)s::text[])
"""

_IN_DOUBT = """
SELECT gid, extract(epoch FROM clock_timestamp() - prepared)::float8
FROM pg_catalog.pg_prepared_xacts
WHERE database = pg_catalog.current_database() AND starts_with(gid, 'shardkit:')
ORDER BY prepared
"""


@dataclass(frozen=True, slots=True)
class Gid:
    """The name of one prepared part of a transaction.

    Attributes:
        transaction: 32 hexadecimal digits.
        coordinator: name of the physical shard that decides.
        participant: name of the physical shard that has prepared.
    """

    transaction: str
    coordinator: str
    participant: str

    def __str__(self) -> str:
        return f"{_PREFIX}:{self.transaction}:{self.coordinator}:{self.participant}"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Return what a name says, or None when it is not one of ours."""
        prefix, *parts = text.split(":")
        if prefix != _PREFIX or len(parts) != 3 or not all(parts):
            return None
        return cls(*parts)


@dataclass(frozen=True, slots=True)
class InDoubt:
    """A prepared part that waits for its end.

    Attributes:
        gid: its name.
        seconds: since it was prepared, by its server's clock.
    """

    gid: Gid
    seconds: float


@dataclass(frozen=True, slots=True)
class Settled:
    """How a prepared part ended.

    Attributes:
        gid: its name.
        outcome: `"commit"` or `"abort"`.
    """

    gid: Gid
    outcome: str


@dataclass(frozen=True, slots=True)
class Resolution:
    """What one run of the resolver did.

    Attributes:
        settled: what it ended.
        waiting: what it left, being too young or out of reach.
        silent: error by name of each physical shard that did not answer.
    """

    settled: tuple[Settled, ...]
    waiting: tuple[InDoubt, ...]
    silent: Mapping[str, Exception]


class Servers(Protocol):
    """What this needs of the cluster."""

    listeners: Listeners

    def ask(
        self, physical: str, query: str, parameters: Mapping[str, Any], *, primary: bool
    ) -> Sequence[Sequence[Any]]:
        """Run one statement by itself on a physical shard and return its rows."""

    def parallel(self, tasks: Sequence[Callable[[], T]]) -> list[T | Exception]:
        """Run tasks at the same time; return result or exception of each, in order."""


class AtomicCommit:
    """One commit over several physical shards, on the connections of a session.

    Args:
        servers: the cluster.
        roots: the session's connection to each physical shard that was written, two at least;
            each in a transaction.
        session: number of the session, for those who listen.

    Attributes:
        pending: after `finish`, physical shards that have not committed their part yet: it is
            decided, and the resolver will.
    """

    def __init__(self, servers: Servers, roots: Mapping[str, Connection], session: int) -> None:
        self._servers = servers
        self._session = session
        self.transaction = secrets.token_hex(16)
        self.coordinator, *self.participants = sorted(roots)
        self._roots = dict(roots)
        self._is_unknown = False
        self.pending: tuple[str, ...] = ()

    def prepare(self) -> None:
        """Prepare every participant and write the decision, which the coordinator's COMMIT makes.

        Raises:
            ConfigurationError: a server is not set up for prepared transactions.
            EndpointUnavailableError: it took so long that the resolver undid it (retryable).
            sqlalchemy.exc.DBAPIError: a part cannot be prepared.
        """
        self._tell("preparing")
        tasks = [self._preparing(name) for name in self.participants]
        for outcome in self._servers.parallel(tasks):
            if isinstance(outcome, Exception):
                raise outcome
        self._tell("prepared")
        try:
            self._roots[self.coordinator].exec_driver_sql(
                _DECIDE, {"transaction": self.transaction, "participants": self.participants}
            )
        except IntegrityError as error:
            raise self._undone() from error

    def decide(self) -> None:
        """Commit the coordinator's part, and so the whole, or find out what became of it.

        Raises:
            EndpointUnavailableError: the coordinator went away, and nothing holds (retryable).
            OutcomeUnknownError: it went away and cannot be asked either.
            sqlalchemy.exc.DBAPIError: its part cannot be committed; nothing holds.
        """
        self._tell("deciding")
        root = self._roots[self.coordinator]
        driver: Any = root.connection.dbapi_connection
        try:
            driver.commit()
        except psycopg.Error as error:
            real = root.connection.driver_connection
            if real is None or not real.closed:
                raise _wrapped(error, root) from error
            try:
                outcome = _decision(self._servers, self.coordinator, self.transaction)
            except (UnavailableError, DBAPIError):
                root.invalidate(error)
                self._is_unknown = True
                raise OutcomeUnknownError from error
            if outcome == "abort":
                root.invalidate(error)
                raise self._undone() from error
            real.has_committed = True
        self._tell("decided")

    def finish(self) -> None:
        """Commit what is prepared, after the coordinator has committed. Raises nothing."""
        tasks = [self._committing(name) for name in self.participants]
        outcomes = self._servers.parallel(tasks)
        pending = [
            name
            for name, outcome in zip(self.participants, outcomes, strict=True)
            if isinstance(outcome, Exception) and not self._settled(name)
        ]
        self.pending = tuple(pending)
        if pending:
            self._tell("pending")
            return
        root = self._roots[self.coordinator]
        if root.connection.driver_connection.has_committed:  # type: ignore[union-attr]
            root.invalidate()  # it is closed; the resolver deletes the row
        else:
            try:
                _outside_transaction(root, _FORGET.format(self.transaction))
            except psycopg.Error as error:
                root.invalidate(error)
        self._tell("finished")

    def abandon(self) -> None:
        """Undo what was prepared after an error anywhere; what cannot be reached stays in doubt.

        To be called when the session has let go of the coordinator's transaction. Asks the
        coordinator like everybody else, so this is right also where its COMMIT was sent and the
        answer lost.
        """
        if not self._is_unknown:
            for name in self.participants:
                self._settled(name)
        self._tell("abandoned")

    def _gid(self, participant: str) -> Gid:
        return Gid(self.transaction, self.coordinator, participant)

    def _undone(self) -> EndpointUnavailableError:
        return EndpointUnavailableError(
            "the commit was undone before it was decided",
            endpoint=f"{self.coordinator}/primary",
            hint="nothing holds on any server; run the unit of work again",
        )

    def _preparing(self, participant: str) -> Callable[[], None]:
        connection = self._roots[participant]

        def task() -> None:
            try:
                connection.exec_driver_sql(f"PREPARE TRANSACTION '{self._gid(participant)}'")
            except DBAPIError as error:
                if isinstance(error.orig, psycopg.errors.ObjectNotInPrerequisiteState):
                    raise ConfigurationError(
                        "prepared transactions are disabled",
                        endpoint=f"{participant}/primary",
                        hint="set max_prepared_transactions on every server of every shard",
                    ) from error
                raise

        return task

    def _committing(self, participant: str) -> Callable[[], None]:
        connection = self._roots[participant]

        def task() -> None:
            try:
                _outside_transaction(connection, f"COMMIT PREPARED '{self._gid(participant)}'")
            except psycopg.Error as error:
                connection.invalidate(error)
                raise

        return task

    def _settled(self, participant: str) -> bool:
        try:
            settle(self._servers, self._gid(participant))
        except (UnavailableError, DBAPIError):
            return False
        return True

    def _tell(self, step: str) -> None:
        if self._servers.listeners:
            self._servers.listeners.emit(
                TwoPhaseStep(
                    self._session,
                    self.transaction,
                    step,
                    self.coordinator,
                    tuple(self.participants),
                    self.pending,
                )
            )


def _wrapped(error: psycopg.Error, connection: Connection) -> BaseException:
    """Return an error of the driver as SQLAlchemy's, like that of any other commit."""
    return DBAPIError.instance("COMMIT", None, error, psycopg.Error, dialect=connection.dialect)


def settle(servers: Servers, gid: Gid) -> Settled:
    """End one prepared part as its coordinator has decided, or decides now: abort.

    May be called at any time, by anybody, any number of times.

    Raises:
        UnavailableError: the coordinator or the participant does not answer (retryable).
    """
    outcome = _decision(servers, gid.coordinator, gid.transaction)
    end = "COMMIT" if outcome == "commit" else "ROLLBACK"
    try:
        servers.ask(gid.participant, f"{end} PREPARED '{gid}'", {}, primary=True)
    except DBAPIError as error:
        if not isinstance(error.orig, psycopg.errors.UndefinedObject):
            raise
        # Somebody else was faster.
    return Settled(gid, outcome)


def _decision(servers: Servers, coordinator: str, transaction: str) -> str:
    """Return what was decided, or decide: abort. Waits a while for a COMMIT under way."""
    which = {"transaction": transaction}
    rows: Sequence[Sequence[Any]] = ()
    while not rows:  # again where the row went away in between: then nothing is prepared any more
        rows = servers.ask(coordinator, _ABORT, which, primary=True)
        rows = rows or servers.ask(coordinator, _DECISION, which, primary=True)
    return str(rows[0][0])


def in_doubt(
    servers: Servers, physical: Iterable[str]
) -> tuple[list[InDoubt], dict[str, Exception]]:
    """Return what is prepared on physical shards, and the error of each that does not answer."""
    found: list[InDoubt] = []
    silent: dict[str, Exception] = {}
    for name in physical:
        try:
            rows = servers.ask(name, _IN_DOUBT, {}, primary=True)
        except (UnavailableError, DBAPIError) as error:
            silent[name] = error
            continue
        for text, seconds in rows:
            gid = Gid.parse(text)
            if gid is not None:
                found.append(InDoubt(gid, float(seconds)))
    return found, silent


def resolve(
    servers: Servers, physical: Iterable[str], *, older_than: float = IN_DOUBT_AFTER
) -> Resolution:
    """End every prepared part that is older than a bound, and forget decisions nobody needs.

    Run again and again by whoever delivers the outbox, and by `shardkit twophase resolve`.

    Args:
        servers: the cluster.
        physical: names of all its physical shards.
        older_than: seconds, by the clocks of the servers; 0 takes everything.
    """
    names = tuple(physical)
    found, silent = in_doubt(servers, names)
    settled, waiting = [], []
    for part in found:
        if part.seconds < older_than:
            waiting.append(part)
            continue
        if not {part.gid.coordinator, part.gid.participant} <= set(names):
            silent.setdefault(part.gid.coordinator, _unknown(part.gid))
            waiting.append(part)
            continue
        try:
            settled.append(settle(servers, part.gid))
        except (UnavailableError, DBAPIError) as error:
            silent.setdefault(part.gid.coordinator, error)
            waiting.append(part)
    if not silent:  # who does not answer may hold a part of any of them
        needed = [part.gid.transaction for part in waiting]
        bounds = {"needed": needed, "keep": KEEP_ABORTS, "finished": FINISHED_AFTER}
        for name in names:
            try:
                servers.ask(name, _CLEAN, bounds, primary=True)
            except (UnavailableError, DBAPIError) as error:
                silent[name] = error
    return Resolution(tuple(settled), tuple(waiting), silent)


def _unknown(gid: Gid) -> ConfigurationError:
    return ConfigurationError(
        f"{gid} names a physical shard that the configuration does not",
        hint="name both in shardkit.toml until nothing is in doubt",
    )


def _outside_transaction(connection: Connection, query: str) -> None:
    """Run a command that refuses transactions on a connection that has just ended one."""
    driver: Any = connection.connection.dbapi_connection
    driver.autocommit = True
    try:
        with driver.cursor() as cursor:
            cursor.execute(query)
    finally:
        if not driver.closed:
            driver.autocommit = False
