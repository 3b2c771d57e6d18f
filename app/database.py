"""The cluster as one client sees it: its reads include its own writes, its retries count once.

Services take a `Database`; the endpoint layer makes one per request, with what the client must see,
which its writes add to, and with the Idempotency-Key it sent. Nothing waits for longer than the
limit: readers, and units of work with all their attempts.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from app.sealing import opened, sealed
from app.timing import stage
from shardkit import (
    AsyncCluster,
    AsyncReadSession,
    AsyncWriteSession,
    deadline,
    tokens,
)
from shardkit.contrib.asgi import Freshness

__all__ = ["TIMEOUT", "Database", "Request"]

T = TypeVar("T")

TIMEOUT: Final = 5.0
"""Seconds that a unit of reads or writes may take, unless settings say otherwise."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for, so that the same key cannot be used for something else.

    Attributes:
        who: whose keys they are: a user id, or the name that somebody logs in by.
        what: the kind of request and its arguments; JSON.
    """

    who: int | str
    what: tuple[Any, ...]

    def fingerprint(self, key: str) -> str:
        """Return what tells it from other requests with a key, and nothing to who has no key."""
        return hmac.digest(key.encode(), json.dumps(self.what).encode(), "sha256").hex()


class Database:
    """Sessions for one client.

    Args:
        cluster: the cluster.
        fresh: what the client must see; None for nobody in particular.
        key: the Idempotency-Key of the request, or None.
        timeout: seconds that a unit of reads or writes may take.
    """

    def __init__(
        self,
        cluster: AsyncCluster,
        fresh: Freshness | None = None,
        *,
        key: str | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        self._cluster = cluster
        self._fresh = fresh or Freshness(None)
        self._key = key
        self._is_form = False
        self._timeout = timeout

    def take_form_key(self, key: str) -> None:
        """Take the key of a form, which was not known before its body was read.

        It counts together with what the form says: people go back to a page and change what they
        wrote, which is another request, where a program that does so has made a mistake.
        """
        self._key, self._is_form = key, True

    @property
    def has_key(self) -> bool:
        """Whether the request may be the repetition of an earlier one."""
        return self._key is not None

    def secret(self, salt: bytes) -> bytes:
        """Return a secret that a repetition of the request gets too, and nobody else.

        Only the salt is kept: without the client's key it says nothing.
        """
        return hmac.digest(salt, (self._key or "").encode(), "sha256")

    def saw(self, token: str) -> None:
        """Have this client's reads see what somebody else has written for it.

        Args:
            token: of the session that wrote.
        """
        self._fresh.saw(token)

    @asynccontextmanager
    async def reader(self, *, fresh: bool = True) -> AsyncIterator[AsyncReadSession]:
        """Open a session on replicas that have seen this client's writes.

        Args:
            fresh: False takes any replica, also one whose primary is gone: nobody can tell what
                that one has missed.
        """
        after = self._fresh.token if fresh else None
        with stage("sessions"), deadline(self._timeout):
            async with self._cluster.reader(after=after) as session:
                yield session

    @asynccontextmanager
    async def primary(self) -> AsyncIterator[AsyncWriteSession]:
        """Open a session on primaries for a read that must be the truth; nothing to commit."""
        with stage("sessions"), deadline(self._timeout):
            async with self._cluster.writer() as session:
                yield session

    @asynccontextmanager
    async def writer(self) -> AsyncIterator[AsyncWriteSession]:
        """Open a session on primaries; what it commits its reads then see.

        For what needs no key, since it does the same however often it is done.
        """
        with stage("sessions"), deadline(self._timeout):
            async with self._cluster.writer() as session:
                yield session
                token = session.token
        self._fresh.saw(token)

    async def run(
        self, request: Request, work: Callable[[AsyncWriteSession], Awaitable[T]], *, near: int
    ) -> T:
        """Run a unit of work and commit it: once for each key, if the client sent one.

        Args:
            request: what is asked for.
            work: given a session, perhaps several times; does not commit, and returns JSON.
            near: id beside whose rows it works, where the record of the key is kept.

        Returns:
            What `work` returned; of the first request with the key, if this is not the first. What
            is kept of it can be read with the key only (`app.sealing`).

        Raises:
            OperationMismatchError: the key came with another request before.
            AnswerLostError: it was done before, and what is kept of it cannot be read.
            OutcomeUnknownError: whether it was committed is not known.
        """
        sessions: list[AsyncWriteSession] = []

        async def unit(session: AsyncWriteSession) -> T:
            sessions.append(session)
            return await work(session)

        with stage("sessions"), deadline(self._timeout):
            if (key := self._key) is None:
                result = await self._cluster.run(unit)
            else:
                operation = self._operation(request, key)

                async def noted(session: AsyncWriteSession) -> str:
                    return sealed(key, await unit(session), of=operation)

                note = await self._cluster.run(
                    noted,
                    operation=operation,
                    near=near,
                    fingerprint=request.fingerprint(key),
                )
                result = opened(key, note, of=operation)
        token = sessions[-1].token if sessions else ""
        if self._key is not None and not token:  # committed by an earlier attempt or request
            token = tokens.ASK_PRIMARIES
        self._fresh.saw(token)
        return result

    def _operation(self, request: Request, key: str) -> str:
        """Name the unit of work of a request: alike for repetitions, and for nothing else."""
        parts = ["form", request.fingerprint(key)] if self._is_form else []
        return hashlib.sha256("\0".join([str(request.who), key, *parts]).encode()).hexdigest()
