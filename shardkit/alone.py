"""Sends a commit that is one INSERT and nothing else, without BEGIN and COMMIT around it.

Which commits are that is `shardkit.lone`. PostgreSQL commits such a statement by itself, so what
is lost with its answer is its outcome. Called by `WriteSession`.
"""

from __future__ import annotations

from collections.abc import Callable

import psycopg
from sqlalchemy.exc import DBAPIError

from shardkit import gates
from shardkit.checks import is_unsent
from shardkit.errors import (
    DeadlineExceededError,
    EndpointUnavailableError,
    OutcomeUnknownError,
    ShardkitError,
    StatementTimeoutError,
)
from shardkit.waits import WaitedTooLongError

__all__ = ["Alone", "Driver"]

Driver = gates.Writer | gates.AsyncWriter


class Alone:
    """Whether a session is sending a commit that is one INSERT, and over which connection."""

    __slots__ = ("_driver", "_is_sending")

    def __init__(self) -> None:
        self._is_sending = False
        self._driver: Driver | None = None

    def opened(self, driver: Driver) -> None:
        """Take a connection that the session has just opened."""
        driver.is_alone = self._is_sending
        if self._is_sending:
            self._driver = driver

    def run(self, flush: Callable[[], None]) -> None:
        """Flush what the server commits by itself, so that a lost answer is a lost outcome.

        Raises:
            OutcomeUnknownError: the INSERT was sent, and its answer lost or late.
        """
        self._is_sending = True
        try:
            flush()
        except (EndpointUnavailableError, DeadlineExceededError, StatementTimeoutError) as error:
            driver = self._driver
            if driver is not None and not driver.is_alone and not _is_undone(driver, error):
                raise OutcomeUnknownError from error
            raise
        finally:
            self._is_sending = False
            self._driver = None


def _is_undone(driver: Driver, error: ShardkitError) -> bool:
    """Tell whether the server, or its pooler, said itself that a lost statement left nothing."""
    cause = error.__cause__.orig if isinstance(error.__cause__, DBAPIError) else None
    if isinstance(cause, WaitedTooLongError):
        return driver.was_undone
    return isinstance(cause, psycopg.errors.QueryCanceled) or is_unsent(cause)
