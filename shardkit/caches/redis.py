"""Redis for threads and for asyncio: one script an operation, one round trip per server.

    cache = Redis(["redis://10.0.0.1:6379/0", "redis://10.0.0.2:6379/0"])

redis-py makes the connections, with their logins and TLS; batches are run as Memcached's are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, Final, Unpack

from redis import Redis as Client
from redis import exceptions
from redis.backoff import NoBackoff
from redis.retry import Retry

from shardkit.caches.async_served import AsyncServedCache
from shardkit.caches.node import Node
from shardkit.caches.redis_wire import (
    AsyncRedisConnection,
    Keeper,
    RedisConnection,
    parse_url,
)
from shardkit.caches.served import ServedCache
from shardkit.caches.serving import Options

__all__ = ["PREFIX", "AsyncRedis", "Redis", "flush", "named"]

PREFIX: Final = "shardkit:cache:"
_FLUSH_TIME: Final = 5.0


class _Addresses:
    """Where servers are, by names without logins, and which key says of which life the data are."""

    def __init__(self, prefix: str, *urls: Mapping[str, str]) -> None:
        self._urls = {name: url for each in urls for name, url in each.items()}
        self._life_key = f"{prefix}life".encode()

    def of(self, node: Node) -> str:
        return self._urls[node.name]

    def life_key(self, _: Node) -> bytes:
        return self._life_key


class Redis(ServedCache):
    """A static ring of Redis servers.

    Args:
        servers: addresses, as `redis://user:password@host:port/database`.
        prefix: before every key; what `flush` deletes.
        options: see `Options`.
    """

    keeper: Keeper

    def __init__(
        self, servers: Sequence[str], *, prefix: str = PREFIX, **options: Unpack[Options]
    ) -> None:
        homes, extra = named(servers), named(options.get("gutter", ()))
        options["gutter"] = [*extra]
        where = _Addresses(prefix, homes, extra)
        super().__init__([*homes], lambda node: RedisConnection(node, self.keeper), **options)
        self.keeper = Keeper(self.nodes, prefix, where.of, where.life_key)

    def flush(self, name: str) -> bool:
        """Delete every entry of a server and read it again; return whether it answered."""
        return flush(self.keeper, name)


class AsyncRedis(AsyncServedCache):
    """The same for asyncio; the arguments are those of `Redis`."""

    keeper: Keeper

    def __init__(
        self, servers: Sequence[str], *, prefix: str = PREFIX, **options: Unpack[Options]
    ) -> None:
        homes, extra = named(servers), named(options.get("gutter", ()))
        options["gutter"] = [*extra]
        where = _Addresses(prefix, homes, extra)
        super().__init__(
            [*homes],
            lambda node: AsyncRedisConnection(node, self.keeper),
            **options,
        )
        self.keeper = Keeper(self.nodes, prefix, where.of, where.life_key)

    async def flush(self, name: str) -> bool:
        """Delete every entry of a server and read it again; return whether it answered."""
        return await asyncio.to_thread(flush, self.keeper, name)


def named(urls: Sequence[str]) -> dict[str, str]:
    """Return addresses by names without logins."""
    found: dict[str, str] = {}
    for url in urls:
        parts = parse_url(url)
        where = parts.get("path") or f"{parts.get('host', 'localhost')}:{parts.get('port', 6379)}"
        found[f"{where}/{parts.get('db', 0)}"] = url
    return found


def flush(keeper: Keeper, name: str) -> bool:
    """Delete every entry of a server and read it again; return whether it answered."""
    node = keeper.nodes.named(name)
    retry = Retry(NoBackoff(), 0)
    client: Any = Client.from_url(keeper.address(node), socket_timeout=_FLUSH_TIME, retry=retry)
    try:
        found = client.scan_iter(match=f"{keeper.prefix}*", count=1000)
        while keys := list(islice(found, 1000)):
            pipeline = client.pipeline(transaction=False)
            for key in keys:
                pipeline.unlink(key)
            pipeline.execute()
        if (key := keeper.life_key(node)) is not None:  # open connections would not write it again
            client.set(key, f"run_id:{client.info('server')['run_id']}")
    except (OSError, exceptions.RedisError):
        return False
    finally:
        client.close()
    keeper.nodes.flushed(name)
    return True
