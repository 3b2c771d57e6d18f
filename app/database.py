"""The cluster as one client sees it: its reads include its own writes.

Services take a `Database` and open sessions on it; the endpoint layer makes one per request
from the client's token and hands the newest token back. Services commit themselves, because a
follow is two transactions in a fixed order on two shards.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from shardkit import AsyncCluster, AsyncReadSession, AsyncWriteSession

__all__ = ["EVERYTHING", "Database"]

EVERYTHING = "everything"
"""Stands for several tokens: shardkit takes what is no token of its own as asking for all."""


class Database:
    """Sessions for one client.

    Attributes:
        token: what this client's readers must have seen; None when it wrote nothing lately.
        has_written: whether a write of this request moved the token.

    Args:
        cluster: the cluster.
        token: the token the client sent, unchecked.
    """

    def __init__(self, cluster: AsyncCluster, token: str | None = None) -> None:
        self._cluster = cluster
        self.token = token
        self.has_written = False

    def reader(self) -> AbstractAsyncContextManager[AsyncReadSession]:
        """Return a session on replicas that have seen this client's writes."""
        return self._cluster.reader(after=self.token)

    def primary(self) -> AbstractAsyncContextManager[AsyncWriteSession]:
        """Return a session on primaries for a read that must be the truth; nothing to commit."""
        return self._cluster.writer()

    @asynccontextmanager
    async def writer(self) -> AsyncIterator[AsyncWriteSession]:
        """Open a session on primaries; what it commits moves the token."""
        async with self._cluster.writer() as session:
            yield session
            token = session.token
        if token:
            self.token = token if self.token in {None, token} else EVERYTHING
            self.has_written = True
