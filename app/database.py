"""The cluster as one client sees it: its reads include its own writes.

Services take a `Database` and open sessions on it; the endpoint layer makes one per request
with what the client must see, which its writes add to. Services commit themselves, because a
follow is two transactions in a fixed order on two shards.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from shardkit import AsyncCluster, AsyncReadSession, AsyncWriteSession
from shardkit.contrib.asgi import Freshness

__all__ = ["Database"]


class Database:
    """Sessions for one client.

    Args:
        cluster: the cluster.
        fresh: what the client must see; None for nobody in particular.
    """

    def __init__(self, cluster: AsyncCluster, fresh: Freshness | None = None) -> None:
        self._cluster = cluster
        self._fresh = fresh or Freshness(None)

    def reader(self) -> AbstractAsyncContextManager[AsyncReadSession]:
        """Return a session on replicas that have seen this client's writes."""
        return self._cluster.reader(after=self._fresh.token)

    def primary(self) -> AbstractAsyncContextManager[AsyncWriteSession]:
        """Return a session on primaries for a read that must be the truth; nothing to commit."""
        return self._cluster.writer()

    @asynccontextmanager
    async def writer(self) -> AsyncIterator[AsyncWriteSession]:
        """Open a session on primaries; what it commits its reads then see."""
        async with self._cluster.writer() as session:
            yield session
            token = session.token
        self._fresh.saw(token)
