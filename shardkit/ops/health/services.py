"""What Redis and Memcached are asked, and the facts made of their answers.

Called by `shardkit.ops.health.collect`; changes nothing. Every call ends in time.
"""

from __future__ import annotations

import socket
from typing import Any

from shardkit.ops.health.facts import Memcached, Redis

__all__ = ["ask_memcached", "ask_redis", "is_redis"]

_REDIS = ("redis://", "rediss://", "unix://")
_MEMCACHED_PORT = 11211


def is_redis(address: str) -> bool:
    """Tell an address of Redis from others."""
    return address.startswith(_REDIS)


def ask_redis(name: str, address: str, *, timeout: float) -> Redis:
    """Ask a Redis what it is and how it keeps its data.

    Args:
        name: in `[services]`.
        address: its URL.
        timeout: seconds for each answer.

    Raises:
        ImportError: the client is not installed.
        OSError: it does not answer.
        redis.RedisError: it refuses.
    """
    from redis import Redis as Client  # noqa: PLC0415  an extra
    from redis import RedisError  # noqa: PLC0415  an extra

    client = Client.from_url(address, socket_timeout=timeout, socket_connect_timeout=timeout)
    try:
        told: dict[str, Any] = client.info()
        try:
            snapshots = bool(client.config_get("save").get("save"))
        except RedisError:
            snapshots = True  # a hosted one does not tell; INFO says the rest
    finally:
        client.close()
    return Redis(
        where=name,
        role=str(told.get("role", "")),
        policy=str(told.get("maxmemory_policy", "")),
        max_bytes=int(told.get("maxmemory", 0)),
        is_kept=bool(told.get("aof_enabled")) or snapshots,
    )


def ask_memcached(name: str, address: str, *, timeout: float) -> Memcached:
    """Ask a Memcached for its version and its largest entry.

    Args:
        name: in `[services]`.
        address: `host:port`.
        timeout: seconds for each answer.

    Raises:
        OSError: it does not answer.
        ValueError: its answer is not Memcached's.
    """
    host, _, port = address.rpartition(":")
    where = (host.strip("[]"), int(port)) if host else (address, _MEMCACHED_PORT)
    with socket.create_connection(where, timeout=timeout) as connection:
        file = connection.makefile("rb")
        connection.sendall(b"version\r\n")
        word, _, version = file.readline().decode("ascii", "replace").strip().partition(" ")
        if word != "VERSION":
            raise ValueError(f"answers {word!r} to `version`")
        connection.sendall(b"mn\r\n")
        knows_meta = file.readline().strip() == b"MN"
        connection.sendall(b"stats settings\r\n")
        settings = {}
        while (line := file.readline().strip()).startswith(b"STAT "):
            _, key, value = line.decode("ascii", "replace").split(" ", 2)
            settings[key] = value
    numbers = tuple(int(part) for part in version.split(".") if part.isdigit())
    return Memcached(name, numbers, knows_meta, int(settings.get("item_size_max", 0)))
