"""Pools in which nobody waits beyond the deadline; the engines of `shardkit.connections` use them.

SQLAlchemy's own pools with one difference: how long to wait for a connection is asked each time.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.pool import AsyncAdaptedQueuePool, QueuePool

from shardkit import deadlines

__all__ = ["AsyncDeadlinePool", "DeadlinePool"]


class _Waits:
    """How long a pool waits; SQLAlchemy keeps it in `_timeout`."""

    _cap: float

    @property
    def _timeout(self) -> float:
        return deadlines.left(self._cap)

    @_timeout.setter
    def _timeout(self, seconds: float) -> None:
        self._cap = seconds

    def recreate(self) -> Any:
        """Return an empty pool of the same kind, when SQLAlchemy disposes of this one."""
        fresh = super().recreate()  # type: ignore[misc]  # of the pool this is mixed into
        fresh._timeout = self._cap  # noqa: SLF001  one of its own kind
        return fresh


class DeadlinePool(_Waits, QueuePool):
    """For threads."""


class AsyncDeadlinePool(_Waits, AsyncAdaptedQueuePool):
    """For asyncio."""
