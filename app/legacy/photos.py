"""Which photo an old number is: a packed map in Redis, filled once by `shardkit idmap load`."""

from __future__ import annotations

from typing import Final

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from shardkit.idmap import AsyncIdMap

__all__ = ["MAP", "TIMEOUT", "WIDTH", "open_client", "open_map"]

MAP: Final = "legacy-photos"
WIDTH: Final = 8
"""Bytes of a value: an id of today."""
TIMEOUT: Final = 0.5
"""Seconds that Redis has: an old address is not worth waiting for."""


def open_client(url: str) -> Redis:
    """Return a client that gives up soon; it connects when it is used."""
    retry = Retry(NoBackoff(), 1)
    client: Redis = Redis.from_url(
        url, socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT, retry=retry
    )
    return client


def open_map(client: Redis) -> AsyncIdMap:
    """Return the map from old numbers to ids."""
    return AsyncIdMap(client, MAP, width=WIDTH)
