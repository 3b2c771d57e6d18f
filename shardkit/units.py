"""Units of work: a function that writes, run until it is committed once, or known to have failed.

`Cluster.run` and its twin call `Unit` around each attempt; what may be tried again, and how soon,
is `shardkit.retry`'s to say, and `shardkit.operations` keeps the record of a named unit. The loops
differ between threads and tasks in how they wait and in nothing else.

    COMMIT not sent                     transient errors: again; others: raised
    COMMIT sent, answer lost            named: again, which tells; else OutcomeUnknownError
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from sqlalchemy import inspect
from sqlalchemy.util import greenlet_spawn

from shardkit.async_session import AsyncWriteSession
from shardkit.clock import Clock
from shardkit.errors import NoShardKeyError, OutcomeUnknownError, ShardkitError
from shardkit.guards import EndpointGuard
from shardkit.operations import KEEP, Operation, Record
from shardkit.placing import sharding_of_mapper
from shardkit.retry import Attempts, is_moving, is_transient
from shardkit.strategies import EMBEDDED
from shardkit.topology import Endpoint
from shardkit.writer import WriteSession

__all__ = ["Near", "Unit", "run", "run_async"]

T = TypeVar("T")

Near = int | tuple[type[Any], Any]
"""Where the record of an operation is kept: beside the rows of an id, or `(Model, shard key)`."""


@dataclass(frozen=True, slots=True)
class Named:
    """How a unit of work is named; see `Cluster.run`."""

    operation: str
    near: Near
    fingerprint: str | None = None
    keep: float = KEEP

    def operation_of(self, session: WriteSession) -> Operation:
        """Return the operation, whose logical shard the session looks up."""
        if isinstance(self.near, tuple):
            model, key = self.near
            sharding = sharding_of_mapper(inspect(model))
            if sharding is None:
                raise NoShardKeyError(
                    f"{model.__name__} is not a sharded class", hint="name one, or an id"
                )
            shard = session._named(sharding.rule, key)
        else:
            shard = session._named(EMBEDDED, self.near)
        return Operation(
            self.operation, logical_shard=shard, fingerprint=self.fingerprint, keep=self.keep
        )


def named(
    operation: str | None, near: Near | None, fingerprint: str | None, keep: float
) -> Named | None:
    """Return how a unit is named, or None when it is not.

    Raises:
        ValueError: a name without a place for its record, or the other way round.
    """
    if operation is None:
        if near is not None or fingerprint is not None:
            raise ValueError("near= and fingerprint= go with operation=")
        return None
    if near is None:
        raise ValueError(f"operation={operation!r}: say near which id, or (Model, key), it works")
    return Named(operation, near, fingerprint, keep)


class Unit:
    """One attempt at a unit of work, in a session of its own.

    Args:
        session: fresh, and closed by the caller.
        name: of the unit, or None.
    """

    def __init__(self, session: WriteSession, name: Named | None) -> None:
        self._session = session
        self._operation = None if name is None else name.operation_of(session)
        session._is_unit = True

    def begin(self) -> Record:
        """Write the record, first of all; return what an earlier run has left."""
        if self._operation is None:
            return Record(is_done=False, result=None)
        statement, parameters = self._operation.begin()
        here = {"logical_shard": self._operation.logical_shard}
        row = self._session.execute(statement, parameters, bind_arguments=here).one()
        return self._operation.read(row)

    def end(self, result: Any, *, is_done: bool = False) -> Any:
        """Keep the result, unless it was kept before, and commit; return it as it is kept."""
        session = self._session
        if self._operation is not None and not is_done:
            session.flush()
            statement, parameters = self._operation.end(result)
            here = {"logical_shard": self._operation.logical_shard}
            session.execute(statement, parameters, bind_arguments=here)
            result = json.loads(parameters["result"])
        session._commit_unit()
        return result


def run(
    writer: Callable[[], WriteSession],
    fn: Callable[[WriteSession], T],
    name: Named | None,
    *,
    guards: Mapping[Endpoint, EndpointGuard],
    waits: Callable[[BaseException], float],
    settle: Callable[[BaseException], None],
    clock: Clock,
) -> T:
    """Run a unit of work; see `Cluster.run`."""
    attempts = _attempts(name, guards, waits)
    unknown: OutcomeUnknownError | None = None
    while True:
        try:
            with writer() as session:
                unit = Unit(session, name)
                record, unknown = unit.begin(), None
                result: Any = record.result if record.is_done else fn(session)
                return cast("T", unit.end(result, is_done=record.is_done))
        except Exception as error:  # noqa: BLE001 - raised again unless it may be tried again
            with _settled(unknown):
                pause = attempts.pause(error)
                settle(error)
            if isinstance(error, OutcomeUnknownError):
                unknown = error
        clock.sleep(pause)


async def run_async(
    writer: Callable[[], AsyncWriteSession],
    fn: Callable[[AsyncWriteSession], Awaitable[T]],
    name: Named | None,
    *,
    guards: Mapping[Endpoint, EndpointGuard],
    waits: Callable[[BaseException], float],
    settle: Callable[[BaseException], None],
) -> T:
    """Run a unit of work in a task; see `AsyncCluster.run`."""
    attempts = _attempts(name, guards, waits)
    unknown: OutcomeUnknownError | None = None
    while True:
        try:
            async with writer() as session:
                unit = await greenlet_spawn(Unit, session.sync_session, name)
                record, unknown = await greenlet_spawn(unit.begin), None
                result: Any = record.result if record.is_done else await fn(session)
                return cast("T", await greenlet_spawn(unit.end, result, is_done=record.is_done))
        except Exception as error:  # noqa: BLE001 - as in `run`
            with _settled(unknown):
                pause = attempts.pause(error)
                await greenlet_spawn(settle, error)
            if isinstance(error, OutcomeUnknownError):
                unknown = error
        await asyncio.sleep(pause)


@contextmanager
def _settled(unknown: OutcomeUnknownError | None) -> Iterator[None]:
    """Say of the last attempt's error that an earlier outcome is unknown still, if it is.

    That nothing was committed by the last attempt says nothing of the one before it, until the
    record of the unit has been asked.
    """
    try:
        yield
    except OutcomeUnknownError:
        raise
    except Exception as error:
        if unknown is None:
            raise
        raise unknown from error


def _attempts(
    name: Named | None,
    guards: Mapping[Endpoint, EndpointGuard],
    waits: Callable[[BaseException], float],
) -> Attempts:
    def guard_of(error: BaseException) -> EndpointGuard | None:
        where = getattr(error, "endpoint", None)
        return next((g for e, g in [*guards.items()] if str(e) == where), None) if where else None

    def is_retryable(error: BaseException) -> bool:
        if isinstance(error, OutcomeUnknownError):
            return name is not None  # running it again tells
        return is_transient(error)

    def spend(error: BaseException) -> bool:
        guard = guard_of(error)
        # A deadlock or a move is nobody's failure: what the attempts of one unit allow is enough.
        is_nobodys = is_moving(error) or not isinstance(error, ShardkitError)
        return is_nobodys or guard is None or guard.budget.spend()

    return Attempts(is_retryable, spend, waits=waits)
