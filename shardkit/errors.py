"""Every exception shardkit raises, so that callers can catch by family.

    ShardkitError
    ├── ConfigurationError
    │   └── NotCacheableError
    ├── RoutingError
    │   ├── NoShardKeyError
    │   │   └── ScatterNotAllowedError
    │   ├── InvalidShardKeyError
    │   ├── InvalidUniqueValueError
    │   ├── CrossShardWriteError
    │   ├── ShardKeyChangeError
    │   ├── ReadOnlySessionError
    │   ├── TooManyShardsError
    │   ├── TooManyRowsError
    │   ├── TooManyValuesError
    │   └── UnsupportedStatementError
    ├── IdError
    │   ├── InvalidIdError
    │   ├── IdRequestError
    │   └── ClockMovedBackError           retryable
    ├── UnavailableError                  retryable
    │   ├── EndpointUnavailableError      retryable
    │   │   └── BreakerOpenError          retryable
    │   ├── OverloadedError               retryable
    │   ├── PoolTimeoutError              retryable
    │   ├── ShardFencedError              retryable
    │   ├── ShardMovedError               retryable
    │   ├── StatementTimeoutError         retryable
    │   ├── ValueBusyError                retryable
    │   ├── DiskFullError                 retryable
    │   └── DeadlineExceededError         retryable
    ├── StorageError
    │   └── DamagedDataError
    ├── UniqueViolationError
    ├── OutboxError
    │   ├── InvalidEventError
    │   │   └── EventTooLargeError
    │   ├── HandlerTimeoutError
    │   └── HandlerStuckError
    ├── IdMapError
    │   ├── InvalidMappingError
    │   ├── IdMapMismatchError
    │   ├── IdMapFullError
    │   └── DamagedMapError
    ├── OutcomeUnknownError
    ├── OperationMismatchError
    ├── StreamEndedError
    ├── GatherError                       retryable
    └── OperationError
        ├── RefusedError
        ├── TryAgainError                 retryable
        ├── MigrationError
        ├── MoveError
        ├── InconsistentLookupError
        ├── BackupError
        └── LocalServerError

`retryable` means: the same call may succeed with no change by the caller, and nothing was
committed. Errors of the driver and of SQLAlchemy pass through untouched, except failures to
reach a server, and of its disk, which become errors of shardkit with the cause kept.
"""

from __future__ import annotations

from collections.abc import Mapping

from pybreaker import CircuitBreakerError


class ShardkitError(Exception):
    """A shardkit operation failed.

    Attributes:
        hint: what the reader should do about it, or None when the message says it all.
        logical_shard: the logical shard concerned, when one is known.
        endpoint: the server concerned as `physical/role@host:port`, when one is known.
        retry_after: seconds after which to try again, when they are known.
        retryable: whether the same call may succeed unchanged, nothing having been committed.
    """

    retryable = False

    def __init__(
        self,
        message: str | None = None,
        *,
        hint: str | None = None,
        logical_shard: int | None = None,
        endpoint: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        self.message = message or (self.__doc__ or type(self).__name__).strip().splitlines()[0]
        self.hint = hint
        self.logical_shard = logical_shard
        self.endpoint = endpoint
        self.retry_after = retry_after
        super().__init__(self.message)

    def __str__(self) -> str:
        where = [
            text
            for text in (
                None if self.logical_shard is None else f"logical shard {self.logical_shard}",
                self.endpoint,
            )
            if text
        ]
        located = f"{self.message} [{', '.join(where)}]" if where else self.message
        return f"{located} ({self.hint})" if self.hint else located


class ConfigurationError(ShardkitError):
    """The configuration is wrong; correct the named key and start again."""


class NotCacheableError(ConfigurationError):
    """The rows of a class cannot be cached; leave out its __cache_ttl__ or change the class."""


class RoutingError(ShardkitError):
    """The call cannot be routed; the caller has to change it."""


class NoShardKeyError(RoutingError):
    """No shard key was found; filter on the shard key or on an id, or add all_shards()."""


class InvalidShardKeyError(RoutingError):
    """The shard key has a value that cannot place a row; give a real value of its type."""


class InvalidUniqueValueError(RoutingError, ValueError):
    """A value cannot be kept unique; give a real value of its column's type, not too long."""


class ScatterNotAllowedError(NoShardKeyError):
    """The statement touches every logical shard; say so with .options(all_shards())."""


class CrossShardWriteError(RoutingError):
    """One unit of work would write to several physical shards; nothing was written."""


class ShardKeyChangeError(RoutingError):
    """A shard key never changes; insert a new row under the new key and delete the old one."""


class ReadOnlySessionError(RoutingError):
    """A reader session cannot write; use cluster.writer()."""


class TooManyShardsError(RoutingError):
    """The statement goes to more logical shards than it allows; name fewer keys or allow more."""


class TooManyRowsError(RoutingError):
    """The statement fetches more rows than may be held; add a LIMIT or allow more."""


class TooManyValuesError(RoutingError):
    """The statement carries more values than PostgreSQL takes; pass them as one array."""


class UnsupportedStatementError(RoutingError):
    """The statement cannot be answered exactly over several logical shards."""


class IdError(ShardkitError):
    """An id could not be read or made."""


class InvalidIdError(IdError, ValueError):
    """The value is not an id of this layout."""


class IdRequestError(IdError, ValueError):
    """Ids cannot be minted in that number, or for a logical shard that does not exist."""


class ClockMovedBackError(IdError):
    """The clock stands too far behind the last id; wait for it to catch up."""

    retryable = True


class UnavailableError(ShardkitError):
    """A server needed for the call is unavailable; try again."""

    retryable = True


class EndpointUnavailableError(UnavailableError):
    """A server does not accept connections; try again once it is back."""


class BreakerOpenError(EndpointUnavailableError, CircuitBreakerError):
    """A server failed too often and is left alone for now; try again after `retry_after`.

    Also pybreaker's own error, so that programs which catch that one need no change.
    """


class OverloadedError(UnavailableError):
    """A server has as many calls in flight as it can answer in time; try again later."""


class PoolTimeoutError(UnavailableError):
    """No pooled connection came free in time; try again or raise pool_size."""


class ShardFencedError(UnavailableError):
    """A logical shard does not admit the statement, as when it is moved; try again."""


class ShardMovedError(UnavailableError):
    """A logical shard has moved to another physical shard while it was used; try again."""


class StatementTimeoutError(UnavailableError):
    """A server did not finish a statement in the time it was given; try again or allow more."""


class ValueBusyError(UnavailableError):
    """Another transaction is about to take or give up a unique value; try again."""


class DeadlineExceededError(UnavailableError):
    """The deadline is over; try again with more time, or when the servers are quicker."""


class DiskFullError(UnavailableError):
    """A server's disk is full, and nothing was written; try again when there is room."""


class StorageError(ShardkitError):
    """A server's disk fails; have another server become the primary and replace it."""


class DamagedDataError(StorageError):
    """A server cannot read what it has stored; see whether another copy is whole.

    Nobody is shown that such rows were not there.

    Attributes:
        table: the table that is damaged, or has a damaged index; None where nobody could say.
    """

    table: str | None = None

    def named(self, table: str, logical_shard: int | None) -> None:
        """Say of which table, once that is known."""
        self.table, self.logical_shard = table, logical_shard
        self.message = f"table {table!r} is damaged: {self.message}"
        self.args = (self.message,)


class UniqueViolationError(ShardkitError):
    """Another row has the value of a unique column; give another value.

    Attributes:
        column: the column, as `table.column`.
    """

    def __init__(
        self, message: str | None = None, *, column: str = "", hint: str | None = None
    ) -> None:
        self.column = column
        super().__init__(message, hint=hint)


class OutboxError(ShardkitError):
    """An event could not be emitted or handled."""


class InvalidEventError(OutboxError, ValueError):
    """The event cannot be stored; give a topic, a key and a payload that JSON can hold."""


class EventTooLargeError(InvalidEventError):
    """The payload is larger than an event may be; store it as a row and emit its id."""


class HandlerTimeoutError(OutboxError):
    """A handler did not end before its deadline; its event is tried again later."""


class HandlerStuckError(OutboxError):
    """Too many handlers never ended; start the relay's process anew."""


class IdMapError(ShardkitError):
    """Redis refused a command of the id map; its message says why."""


class InvalidMappingError(IdMapError, ValueError):
    """An id or a value cannot stand in a map; give an int from 0 to 2^63 - 1."""


class IdMapMismatchError(IdMapError):
    """The map was made with another width or format; open it as it was made."""


class IdMapFullError(IdMapError):
    """Redis has no memory left for the map; raise maxmemory or remove something else."""


class DamagedMapError(IdMapError):
    """What is stored is not what was written; delete the key and load its ids again.

    Attributes:
        block: number of the block, or None when it is none at all.
    """

    def __init__(
        self, message: str | None = None, *, hint: str | None = None, block: int | None = None
    ) -> None:
        self.block = block
        super().__init__(message, hint=hint)


class OutcomeUnknownError(ShardkitError):
    """The answer to COMMIT was lost; read the rows before you write them again."""


class OperationMismatchError(ShardkitError):
    """An operation of this name has already done something else; give each its own name."""


class StreamEndedError(ShardkitError):
    """The stream ended before its last row; read it before its session or transaction ends."""


class GatherError(ShardkitError):
    """Some physical shards did not answer a scatter; try again or ask for partial results.

    Attributes:
        failures: `UnavailableError` by name of the physical shard that did not answer.
        answers: rows fetched, by name of the physical shard that did.
    """

    retryable = True

    def __init__(self, failures: Mapping[str, Exception], answers: Mapping[str, int]) -> None:
        self.failures = dict(failures)
        self.answers = dict(answers)
        first = next(iter(self.failures.values()))
        super().__init__(
            f"no answer from physical shard {', '.join(sorted(self.failures))}: {first}",
            hint=f"{len(self.answers)} other physical shards answered",
        )


class OperationError(ShardkitError):
    """A shardkit command failed."""


class RefusedError(OperationError):
    """The command was refused as unsafe before it changed anything."""


class TryAgainError(OperationError):
    """The command cannot run now; try again."""

    retryable = True


class MigrationError(OperationError):
    """A migration failed; shards already migrated stay so, and a rerun continues."""


class MoveError(OperationError):
    """A move was given up, and its source goes on as before; see why, and move again."""


class InconsistentLookupError(OperationError):
    """Rows and the lookup rows of their values disagree; the report lists what to see to."""


class BackupError(OperationError):
    """A backup or an export cannot be made or used; nothing half made is left behind."""


class LocalServerError(OperationError):
    """An embedded server did not start or stop; its log says why."""
