"""Memcached for asyncio: the same requests and replies as for threads, over asyncio's streams."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, Unpack

from shardkit.caches.async_served import AsyncServedCache
from shardkit.caches.memcached import split_address
from shardkit.caches.meta import Life, Replies, answers_of, hello, life_of, render
from shardkit.caches.node import Node
from shardkit.caches.serving import Options
from shardkit.caching.operations import Answer, Request

__all__ = ["AsyncMemcached"]

_PIECE: Final = 65536
_FLUSH_TIME: Final = 1.0


class _Connection:
    """A connection of one event loop."""

    def __init__(self, node: Node) -> None:
        self.is_used = False
        self._node = node
        self._life: Life | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def exchange(self, requests: Sequence[Request]) -> list[Answer]:
        if self._life is None:
            host, port = split_address(self._node.name)
            self._reader, self._writer = await asyncio.open_connection(host, port)
            first = await self._ask(hello(secrets.token_hex(8).encode()), 2)
            self._life = life_of(self._node.name, first)
            self._node.met(self._life)
        data, sent = render(requests, self._life)
        replies = await self._ask(data, len(sent))
        return answers_of(requests, sent, replies.replies, self._life)

    async def _ask(self, data: bytes, n: int) -> Replies:
        assert self._reader is not None
        assert self._writer is not None
        replies = Replies(n)
        if data:
            self._writer.write(data)
            await self._writer.drain()
        while not replies.is_complete:
            arrived = await self._reader.read(_PIECE)
            if not arrived:
                raise ConnectionResetError("the server closed the connection")
            replies.feed(arrived)
        return replies

    async def flush_all(self) -> bool:
        host, port = split_address(self._node.name)
        self._reader, self._writer = await asyncio.open_connection(host, port)
        self._writer.write(b"flush_all\r\n")
        return await self._reader.readline() == b"OK\r\n"

    def shut(self) -> None:
        self._life = None
        if self._writer is not None:
            with suppress(RuntimeError):  # its event loop is closed, and so is it
                self._writer.transport.abort()
            self._reader = self._writer = None


class AsyncMemcached(AsyncServedCache):
    """A static ring of Memcached servers; the arguments are those of `Memcached`."""

    def __init__(self, servers: Sequence[str], **options: Unpack[Options]) -> None:
        super().__init__(servers, _Connection, **options)

    async def flush(self, name: str) -> bool:
        """Empty a server and read it again; return whether it answered."""
        node = self.nodes.named(name)
        connection = _Connection(node)
        try:
            async with asyncio.timeout(_FLUSH_TIME):
                if not await connection.flush_all():
                    return False
        except OSError:
            return False
        finally:
            connection.shut()
        self.nodes.flushed(name)
        return True
