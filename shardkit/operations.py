"""Operations that are done once, however often they are run: a record beside the data.

The first statement of a named unit of work writes its name into `shardkit_operations` in the schema
of a logical shard, so that the record commits, replicates, moves and fails over with what the unit
writes. A second run waits there for a first one in flight, and then finds its result. Because it
writes, too, the answer to its own COMMIT confirms the first one's: the log is in order.

Rows expire by the time of the database. Each run deletes some that have; nothing else cleans up.

Source: Stripe, "Designing robust and predictable APIs with idempotency"; docs/architecture.md,
decision 19.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import TextClause, text

from shardkit.errors import OperationMismatchError
from shardkit.topology import schema_name

__all__ = ["Operation", "Record"]

KEEP: Final = 86_400.0
"""Seconds a record is kept: a client that tries again a day later means something new."""

MAX_RESULT: Final = 65_536
"""Characters of JSON that a result may have: it is an answer, not a store of documents."""

_LONGEST: Final = 255
_CLEANED: Final = 10
"""Expired records that each run deletes at most; more than it adds, so that they do not pile up."""

# Row locks: on the record itself, waiting for a run in flight, and on expired ones nobody holds.
_BEGIN: Final = """
WITH expired AS (
    SELECT operation FROM {schema}.shardkit_operations
    WHERE expires_at < now() AND operation <> :operation
    ORDER BY expires_at LIMIT {cleaned} FOR UPDATE SKIP LOCKED
), cleaned AS (
    DELETE FROM {schema}.shardkit_operations AS old USING expired
    WHERE old.operation = expired.operation
)
INSERT INTO {schema}.shardkit_operations AS held (operation, fingerprint, expires_at)
VALUES (:operation, :fingerprint, now() + make_interval(secs => :keep))
ON CONFLICT (operation) DO UPDATE SET
    n_runs = CASE WHEN held.expires_at < now() THEN 1 ELSE held.n_runs + 1 END,
    result = CASE WHEN held.expires_at < now() THEN NULL ELSE held.result END,
    fingerprint = CASE WHEN held.expires_at < now() THEN excluded.fingerprint
        ELSE held.fingerprint END,
    expires_at = CASE WHEN held.expires_at < now() THEN excluded.expires_at
        ELSE held.expires_at END
RETURNING n_runs, fingerprint, result
"""
# Locks the row that this transaction has locked already.
_END: Final = """
UPDATE {schema}.shardkit_operations SET result = :result WHERE operation = :operation
"""


@dataclass(frozen=True, slots=True)
class Record:
    """What is recorded of an operation.

    Attributes:
        is_done: whether an earlier run has committed.
        result: what that run returned; None while nothing has.
    """

    is_done: bool
    result: Any


class Operation:
    """A named operation on a logical shard; makes the statements of its record.

    Args:
        name: unique among the operations near the same logical shard; 1 to 255 characters.
        fingerprint: of what is asked for; a second run with another one is refused. None where
            the name says it all.
        logical_shard: where the record is kept.
        keep: seconds for which it is.

    Raises:
        ValueError: the name is empty, too long or contains a NUL.
    """

    __slots__ = ("_fingerprint", "_keep", "logical_shard", "name")

    def __init__(
        self, name: str, *, logical_shard: int, fingerprint: str | None = None, keep: float = KEEP
    ) -> None:
        for value, what in ((name, "operation"), (fingerprint, "fingerprint")):
            if value is not None and (not 0 < len(value) <= _LONGEST or "\0" in value):
                raise ValueError(f"{what}: give 1 to {_LONGEST} characters without NUL")
        self.name = name
        self.logical_shard = logical_shard
        self._fingerprint = fingerprint
        self._keep = keep

    def begin(self) -> tuple[TextClause, dict[str, Any]]:
        """Return the first statement of a run, and its parameters; `read` takes its row."""
        return self._text(_BEGIN), {
            "operation": self.name,
            "fingerprint": self._fingerprint,
            "keep": self._keep,
        }

    def read(self, row: Any) -> Record:
        """Return what the first statement found.

        Raises:
            OperationMismatchError: the operation was run before, for something else.
        """
        n_runs, fingerprint, result = row
        if n_runs > 1 and fingerprint != self._fingerprint:
            raise OperationMismatchError(
                f"operation {self.name!r} was run before for something else",
                logical_shard=self.logical_shard,
                hint="give each operation a name of its own",
            )
        return Record(n_runs > 1, None if result is None else json.loads(result))

    def end(self, result: Any) -> tuple[TextClause, dict[str, Any]]:
        """Return the last statement of a run, and its parameters.

        Raises:
            ValueError: the result is no JSON, or longer than `MAX_RESULT` characters of it.
        """
        try:
            encoded = json.dumps(result, allow_nan=False, separators=(",", ":"))
        except TypeError as error:
            raise ValueError(f"the result of operation {self.name!r} is no JSON: {error}") from None
        if len(encoded) > MAX_RESULT:
            raise ValueError(
                f"the result of operation {self.name!r} has {len(encoded):,} characters of JSON; "
                f"{MAX_RESULT:,} are kept"
            )
        return self._text(_END), {"operation": self.name, "result": encoded}

    def _text(self, template: str) -> TextClause:
        return text(template.format(schema=schema_name(self.logical_shard), cleaned=_CLEANED))
